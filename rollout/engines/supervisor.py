"""No orphan, whatever dies: a process that runs a command and ends it when its owner goes away.

The owner keeps the write end of a pipe whose read end is `--owner-fd`. When that pipe closes, for any reason
(a normal end, an exception, `kill -9`), the command's whole process group is terminated: SIGTERM, then
SIGKILL. Three processes share the watch, so that a `kill -9` of any one of them leaves nothing behind:

    owner ---pipe---> supervisor ---pipe---> guard
                          |                    |
                          +---- command <------+  (a session of its own, with all of its children)

The guard only acts when the supervisor vanishes without a word. The command itself also asks the kernel to be
killed with its parent (PDEATHSIG). The supervisor has one thread: PDEATHSIG fires when the *thread* that
spawned ends.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import psutil

from polyturn.tools.children import end_with

PR_SET_CHILD_SUBREAPER = 36
OWNER_CHECK_S = 1.0
DONE = b"d"
SHARED_MEMORY_PREFIX = "/dev/shm/sgl"
TRACKER = "multiprocessing.resource_tracker"
TRACKER_S = 1.0
STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)


def supervise(command: Sequence[str], *, owner_fd: int, owner_pid: int, grace_s: float) -> int:
    """Run `command` until it ends or the owner goes away.

    Returns the command's exit status (128 + n for signal n).
    """
    libc = ctypes.CDLL(None, use_errno=True)
    # Descendants that leave the command's process group become our children when their parent dies, not
    # init's.
    libc.prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    wakeup = _wake_on_signals()
    guard_pid, guard_fd = _start_guard(close=(owner_fd, *wakeup))
    supervisor_pid = os.getpid()

    def die_with_the_supervisor() -> None:
        end_with(supervisor_pid)

    child = subprocess.Popen(
        command, stdin=subprocess.DEVNULL, start_new_session=True, preexec_fn=die_with_the_supervisor
    )
    os.write(guard_fd, f"{child.pid}\n".encode())
    _wait(child, owner_fd=owner_fd, owner_pid=owner_pid, wakeup_fd=wakeup[0])
    segments = _shared_memory(child.pid)
    status = _terminate(child, guard_pid=guard_pid, grace_s=grace_s)
    for path in segments:
        path.unlink(missing_ok=True)
    os.write(guard_fd, DONE)
    os.close(guard_fd)
    os.waitpid(guard_pid, 0)
    return status


def _wait(child: subprocess.Popen[bytes], *, owner_fd: int, owner_pid: int, wakeup_fd: int) -> None:
    """Return when the command has ended, the owner has gone away, or we are told to stop."""
    poll = select.poll()
    poll.register(owner_fd, select.POLLIN)
    poll.register(wakeup_fd, select.POLLIN)
    while child.poll() is None:
        events = dict(poll.poll(OWNER_CHECK_S * 1000))
        # A process that the owner forked may hold the pipe open after the owner's death: look at the parent
        # as well.
        if owner_fd in events or os.getppid() != owner_pid:
            return
        if wakeup_fd in events and set(os.read(wakeup_fd, 64)) & set(STOP_SIGNALS):
            return


def _wake_on_signals() -> tuple[int, int]:
    """A pipe that becomes readable with the number of each signal that arrives."""
    read_end, write_end = os.pipe()
    os.set_blocking(write_end, False)
    for number in (*STOP_SIGNALS, signal.SIGCHLD):
        signal.signal(number, lambda *_: None)
    signal.set_wakeup_fd(write_end, warn_on_full_buffer=False)
    return read_end, write_end


def _start_guard(*, close: Sequence[int]) -> tuple[int, int]:
    """Fork the guard.

    Returns its pid and the write end of its pipe: the group's leader first, `DONE` at the end.
    """
    read_end, write_end = os.pipe()
    pid = os.fork()
    if pid:
        os.close(read_end)
        return pid, write_end
    signal.set_wakeup_fd(-1)
    for number in STOP_SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    for descriptor in (write_end, *close):
        os.close(descriptor)
    os.setsid()
    said = b""
    while chunk := os.read(read_end, 64):
        said += chunk
    if said and not said.endswith(DONE):
        _signal_group(int(said.split(b"\n")[0]), signal.SIGKILL)
    os._exit(0)


def _terminate(child: subprocess.Popen[bytes], *, guard_pid: int, grace_s: float) -> int:
    """End the command's process group and every descendant that left it."""
    _signal_group(child.pid, signal.SIGTERM)
    _wait_for_group(child, guard_pid=guard_pid, seconds=grace_s)
    # Python's resource trackers are spared: they remove semaphores and the like once all others have ended.
    for process in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.Error):
            if process.pid != guard_pid and TRACKER not in " ".join(process.cmdline()):
                process.kill()
    _wait_for_group(child, guard_pid=guard_pid, seconds=TRACKER_S)
    _signal_group(child.pid, signal.SIGKILL)
    status = child.wait()
    while adopted := _adopted(child.pid, guard_pid):
        for pid in adopted:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        _reap(adopted)
        time.sleep(0.005)
    return 128 - status if status < 0 else status


def _wait_for_group(child: subprocess.Popen[bytes], *, guard_pid: int, seconds: float) -> None:
    """Wait until the whole process group has ended, but not for longer."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline and (child.poll() is None or _group_exists(child.pid)):
        _reap(_adopted(child.pid, guard_pid))
        time.sleep(0.02)


def _shared_memory(pid: int) -> set[Path]:
    """Shared memory that the command's processes have mapped: SGLang leaves it behind however it ends."""
    segments: set[Path] = set()
    with contextlib.suppress(psutil.Error):
        command = psutil.Process(pid)
        for process in (command, *command.children(recursive=True)):
            with contextlib.suppress(OSError):
                for line in Path(f"/proc/{process.pid}/maps").read_text().splitlines():
                    path = line.split(maxsplit=5)[-1]
                    if path.startswith(SHARED_MEMORY_PREFIX) and not path.endswith(" (deleted)"):
                        segments.add(Path(path))
    return segments


def _adopted(child_pid: int, guard_pid: int) -> list[int]:
    """Our children beside the command and the guard: descendants of the command whose parents have ended."""
    return [
        process.pid for process in psutil.Process().children() if process.pid not in (child_pid, guard_pid)
    ]


def _reap(pids: Sequence[int]) -> None:
    for pid in pids:
        with contextlib.suppress(ChildProcessError):
            os.waitpid(pid, os.WNOHANG)


def _signal_group(group: int, number: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(group, number)


def _group_exists(group: int) -> bool:
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return False
    return True


def main() -> int:
    """Parse the arguments and supervise."""
    parser = argparse.ArgumentParser(description="Run a command that ends with its owner.")
    parser.add_argument(
        "--owner-fd", type=int, required=True, help="read end of a pipe that the owner holds open"
    )
    parser.add_argument("--owner-pid", type=int, required=True)
    parser.add_argument("--grace-s", type=float, required=True, help="seconds from SIGTERM to SIGKILL")
    parser.add_argument("command", nargs=argparse.REMAINDER)
    arguments = parser.parse_args()
    command = arguments.command[1:] if arguments.command[:1] == ["--"] else arguments.command
    return supervise(
        command, owner_fd=arguments.owner_fd, owner_pid=arguments.owner_pid, grace_s=arguments.grace_s
    )


if __name__ == "__main__":
    sys.exit(main())
