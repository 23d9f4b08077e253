"""What a runner is told once, before the first code, and what every process that runs code puts on itself, after the
fork and before the code.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import resource
import signal
from dataclasses import dataclass
from typing import Any

from .kernel import PR_SET_DUMPABLE, Filter, abi, make_ruleset, prctl, restrict, syscall

MIB = 1 << 20


@dataclass(frozen=True, kw_only=True, slots=True)
class Config:
    """The limits of every execution, and the layers that `runner.confine` puts on it."""

    work: str = "/work"
    """The work folder: where code starts, and what `read` and `write` are relative to."""
    memory_bytes: int = 256 * MIB
    """Address space of one process beyond what the interpreter itself takes."""
    cpu_s: int = 10
    output_bytes: int = 64 * 1024
    """Of stdout, and as much of stderr."""
    num_processes: int = 32
    file_bytes: int = 16 * MIB
    num_open_files: int = 256
    readable: tuple[str, ...] = ("/usr", "/lib", "/lib64", "/lib32", "/bin", "/sbin", "/etc", "/proc", "/dev")
    """What landlock lets code read and execute; folders that do not exist are left out."""
    writable: tuple[str, ...] = ("/work", "/tmp", "/dev/shm", "/dev/null", "/dev/zero", "/dev/full")
    """What landlock lets code write, too."""
    import_folders: tuple[str, ...] = ()
    """Folders of packages that code may import, after the standard library."""
    preload: tuple[str, ...] = ()
    """Modules imported before the first fork, so that code gets them for nothing."""
    rlimits: bool = True
    landlock: bool = True
    seccomp: bool = True
    deny_memfd: bool = False
    """Refuse memfd_create, whose memory no rlimit counts: for sandboxes without a memory cgroup."""
    kill_all: bool = True
    """Kill every process that an execution leaves behind."""
    oom_score: bool = True
    """Make the kernel's out-of-memory killer choose code before anything else."""

    @classmethod
    def from_header(cls, header: dict[str, Any]) -> Config:
        """Reads the `configure` question. Raises TypeError for unknown fields."""
        fields: dict[str, Any] = {
            key: tuple(value) if isinstance(value, list) else value
            for key, value in header.items()
            if key != "op"
        }
        return cls(**fields)


CLOSE_RANGE = 436  # on every architecture, from Linux 5.9
LAST_DESCRIPTOR = (1 << 32) - 1
STACK_BYTES = 8 * MIB
PROCESSES_OF_THE_RUNNER = 2
"""The runner and a persistent interpreter count against the limit of processes, too."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Confinement:
    """The layers, worked out once, so that a fork only has to put them on."""

    config: Config
    address_space: int
    ruleset: int | None
    filter: Filter | None
    landlock_abi: int

    @classmethod
    def prepare(cls, config: Config) -> Confinement:
        """To be called in the runner. Raises OSError or ValueError where a layer that was asked for cannot be had.

        A kernel without landlock is no error: `landlock_abi` is 0 then.
        """
        with open("/proc/self/statm") as statm:
            own_bytes = int(statm.read().split()[0]) * os.sysconf("SC_PAGE_SIZE")
        imports = (*config.readable, *config.import_folders)
        return cls(
            config=config,
            address_space=own_bytes + config.memory_bytes,
            ruleset=make_ruleset(imports, config.writable) if config.landlock else None,
            filter=Filter(deny_memfd=config.deny_memfd) if config.seccomp else None,
            landlock_abi=abi() if config.landlock else 0,
        )

    def apply(self, *, keep: tuple[int, ...], one_execution: bool = True) -> None:
        """Puts the layers on this process for good and closes all descriptors above 2 but `keep`.

        A process that lives for one execution gets a limit of CPU seconds from the kernel; beside it, and for one that
        lives for several, the runner watches.
        """
        prctl(PR_SET_DUMPABLE, 1)  # or /proc/self would belong to root
        if self.config.oom_score:
            with open("/proc/self/oom_score_adj", "w") as score:
                score.write("1000")
        os.chdir(self.config.work)
        if self.config.rlimits:
            self._set_rlimits(one_execution=one_execution)
        if self.ruleset is not None:
            restrict(self.ruleset)
        close_all_but(keep)
        if self.filter is not None:
            self.filter.apply()
        signal.pthread_sigmask(signal.SIG_SETMASK, ())

    def _set_rlimits(self, *, one_execution: bool) -> None:
        config = self.config
        limits = {
            resource.RLIMIT_CORE: 0,
            resource.RLIMIT_AS: self.address_space,
            resource.RLIMIT_FSIZE: config.file_bytes,
            resource.RLIMIT_NOFILE: config.num_open_files,
            resource.RLIMIT_NPROC: config.num_processes + PROCESSES_OF_THE_RUNNER,
            resource.RLIMIT_STACK: STACK_BYTES,
            resource.RLIMIT_MEMLOCK: 0,
        }
        for which, value in limits.items():
            set_rlimit(which, value)
        for which, value in ((resource.RLIMIT_MSGQUEUE, 0), (resource.RLIMIT_SIGPENDING, 256)):
            # gVisor knows neither, and bounds both by itself.
            with contextlib.suppress(ValueError):
                set_rlimit(which, value)
        if one_execution:
            set_rlimit(resource.RLIMIT_CPU, config.cpu_s, hard=config.cpu_s + 1)


def set_rlimit(which: int, value: int, *, hard: int | None = None) -> None:
    """Sets the soft and the hard limit; never above a hard limit that is there, which would need a privilege."""
    present = resource.getrlimit(which)[1]
    hard = value if hard is None else hard
    if present != resource.RLIM_INFINITY:
        hard = min(hard, present)
    resource.setrlimit(which, (min(value, hard), hard))


def close_all_but(keep: tuple[int, ...]) -> None:
    """Closes every descriptor above 2 that is not in `keep`."""
    start = 3
    for fd in sorted(keep):
        if start < fd:
            _close_range(start, fd - 1)
        start = fd + 1
    _close_range(start, LAST_DESCRIPTOR)


def _close_range(first: int, last: int) -> None:
    """close_range(2), which not every build of Python uses: its own loop over a million descriptors takes long."""
    try:
        syscall(CLOSE_RANGE, "close_range", ctypes.c_uint(first), ctypes.c_uint(last), 0)
    except OSError:  # an old kernel, or gVisor, which may take no range beyond what is open
        for fd in map(int, os.listdir("/proc/self/fd")):
            if first <= fd <= last:
                with contextlib.suppress(OSError):  # the one of the listing is closed already
                    os.close(fd)
