"""Runs a command and ends it, with all that it started, when the process that started this one is gone.

A server should end when its input does. One that does not would outlive an owner that was killed. What the command
writes is passed on as long as its lines are bounded: who reads them keeps a line until its end. This program needs the
standard library only, and is run by its path.
"""

import os
import signal
import subprocess
import sys
import threading
import time

_POLL_S = 0.25
_GRACE_S = 2.0
_DRAIN_S = 1.0
MAX_LINE_BYTES = 16 * 1024 * 1024
"""The `mcp` package joins a line from its pieces in time quadratic in its length."""


def main(command: list[str]) -> int:
    """The command's exit status."""
    owner = os.getppid()
    try:
        process = subprocess.Popen(command, stdout=subprocess.PIPE)
    except OSError as error:
        print(f"cannot start {command[0]}: {error.strerror}", file=sys.stderr)
        return 127
    # It has the input now; held here too, its end would never be seen.
    null = os.open(os.devnull, os.O_RDWR)
    os.dup2(null, 0)
    assert process.stdout is not None
    relay = threading.Thread(target=_relay, args=(process.stdout.fileno(), null), daemon=True)
    relay.start()
    while True:
        try:
            status = process.wait(_POLL_S)
            relay.join(_DRAIN_S)  # a child of the command may hold its output open
            return status
        except subprocess.TimeoutExpired:
            if os.getppid() != owner:
                break
    # This process leads the group that the command and its children are in.
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    os.killpg(0, signal.SIGTERM)
    deadline = time.monotonic() + _GRACE_S
    while process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.05)
    os.killpg(0, signal.SIGKILL)
    return 1


def _relay(source: int, null: int) -> None:
    """Pass on what is written, until it ends or a line has no end; then the command goes."""
    length = 0
    while chunk := os.read(source, 1 << 16):
        newline = chunk.rfind(b"\n")
        length = length + len(chunk) if newline < 0 else len(chunk) - newline - 1
        if length > MAX_LINE_BYTES:
            print(
                f"a line has more than {MAX_LINE_BYTES:,} bytes: the server is ended",
                file=sys.stderr,
                flush=True,
            )
            os.killpg(0, signal.SIGKILL)
        view = memoryview(chunk)
        while view:
            view = view[os.write(1, view) :]
    os.dup2(null, 1)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
