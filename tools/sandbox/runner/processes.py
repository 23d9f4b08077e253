"""Ending and reaping processes: the runner is the parent, by birth or by adoption, of all that runs in the sandbox."""

from __future__ import annotations

import contextlib
import os
import select
import signal
import time
from collections import deque

KILL_DEADLINE_S = 2.0
NUM_ROUNDS = 200


class Children:
    """Notices the end of children: a descriptor that becomes readable, and the statuses."""

    def __init__(self) -> None:
        self.wakeup, self._signalled = os.pipe()
        os.set_blocking(self.wakeup, False)
        os.set_blocking(self._signalled, False)
        signal.set_wakeup_fd(self._signalled, warn_on_full_buffer=False)
        signal.signal(signal.SIGCHLD, lambda *_: None)
        self._statuses: dict[int, int] = {}
        self._watched: set[int] = set()
        self._unwatched: deque[tuple[int, int]] = deque(maxlen=64)

    def watch(self, pid: int) -> None:
        """The status of this child is going to be asked for; of others only the latest few are kept."""
        self._watched.add(pid)
        for ended, status in tuple(self._unwatched):
            if ended == pid:  # it ended before anyone could say that it matters
                self._unwatched.remove((ended, status))
                self._keep(ended, status)

    def collect(self) -> None:
        """Reaps whatever has ended; never waits."""
        try:
            while os.read(self.wakeup, 4096):
                pass
        except BlockingIOError:
            pass
        while True:
            try:
                pid, status = os.waitpid(-1, os.WNOHANG)
            except ChildProcessError:
                return
            if pid == 0:
                return
            self._keep(pid, status)

    def wait_for_all(self) -> None:
        """Waits until no child is left; all have been killed before."""
        while True:
            try:
                self._keep(*os.waitpid(-1, 0))
            except ChildProcessError:
                return

    def status(self, pid: int) -> int | None:
        """The exit status of a watched child (minus the signal's number), None while it lives."""
        return self._statuses.get(pid)

    def forget(self, pid: int) -> None:
        """Nobody asks for this child any more."""
        self._watched.discard(pid)
        self._statuses.pop(pid, None)

    def _keep(self, pid: int, status: int) -> None:
        if pid in self._watched:
            self._statuses[pid] = os.waitstatus_to_exitcode(status)
        else:
            self._unwatched.append((pid, status))

    def kill_all(self) -> None:
        """Kills every process in the sandbox but the runner, and waits for the end of all."""
        # Outside a PID namespace this would end the machine's every process; `serve` refuses to run there.
        assert os.getpid() == 1
        with contextlib.suppress(ProcessLookupError):
            os.kill(-1, signal.SIGKILL)  # never this process itself
        self.wait_for_all()

    def kill_all_but(self, keep: int) -> bool:
        """Kills every process but `keep` and the runner; False where `keep` had to be killed, too.

        Processes that fork all the time are stopped before they are killed: stopped ones hold the places that the
        limit of processes leaves, so no new ones come up.
        """
        spared = {1, os.getpid(), keep}
        end = time.monotonic() + KILL_DEADLINE_S
        stopped: set[int] = set()
        for _ in range(NUM_ROUNDS):
            new = processes() - spared - stopped
            if not new:
                break
            for pid in new:
                _signal(pid, signal.SIGSTOP)
            stopped |= new
        while time.monotonic() < end:
            self.collect()
            left = processes() - spared
            if not left:
                return self.status(keep) is None
            for pid in left:
                _signal(pid, signal.SIGKILL)
            select.select([self.wakeup], [], [], 0.002)
        self.kill_all()
        return False


def cpu_seconds(pid: int) -> float:
    """User and system time that a process has used; 0 where it has gone."""
    try:
        with open(f"/proc/{pid}/stat") as stat:
            fields = stat.read().rpartition(")")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        return 0.0
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def processes() -> set[int]:
    """All processes but zombies, which may wait for a parent that is stopped."""
    return {int(name) for name in os.listdir("/proc") if name.isdigit() and _is_running(name)}


def _is_running(pid: str) -> bool:
    try:
        with open(f"/proc/{pid}/stat") as stat:
            fields = stat.read().rpartition(")")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        return False
    state, num_threads = fields[0], int(fields[17])
    return state not in "ZX" or num_threads > 1  # whose first thread alone may have ended


def _signal(pid: int, number: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, number)
