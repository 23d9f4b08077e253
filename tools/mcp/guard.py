"""Runs a command and ends it, with all that it started, when the process that started this one is gone.

A server should end when its input does. One that does not would outlive an owner that was killed. This program needs
the standard library only, and is run by its path.
"""

import os
import signal
import subprocess
import sys
import time

_POLL_S = 0.25
_GRACE_S = 2.0


def main(command: list[str]) -> int:
    """The command's exit status."""
    owner = os.getppid()
    try:
        process = subprocess.Popen(command)
    except OSError as error:
        print(f"cannot start {command[0]}: {error.strerror}", file=sys.stderr)
        return 127
    # It has the pipes now; held here too, their ends would never be seen.
    null = os.open(os.devnull, os.O_RDWR)
    os.dup2(null, 0)
    os.dup2(null, 1)
    while True:
        try:
            return process.wait(_POLL_S)
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


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
