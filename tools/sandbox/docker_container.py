"""One container of the Docker backend: what it is allowed, from the limits of a sandbox, and the connection to the
runner in it.
"""

from __future__ import annotations

import contextlib
import errno
import json
import random
import struct
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from polyturn.tools.sandbox.docker_daemon import remove
from polyturn.tools.sandbox.sandbox import MIB, Limits, Link, Runner

_HEADER = struct.Struct(">BxxxL")
"""Without a terminal the daemon puts this before every piece: which stream it belongs to, and its length.

https://docs.docker.com/reference/api/engine (attach to a container, stream format)
"""
STDOUT, STDERR = 1, 2
_KEPT_BYTES_OF_STDERR = 4096


class Pieces:
    """Reads the stream of a container or command without a terminal: which stream each piece belongs to."""

    def __init__(self) -> None:
        self._pending = b""

    def feed(self, data: bytes) -> list[tuple[int, bytes]]:
        """Every piece that is whole now: 1 for stdout or 2 for stderr, and what was written."""
        data = self._pending + data
        pieces, start = [], 0
        while len(data) - start >= _HEADER.size:
            stream, length = _HEADER.unpack_from(data, start)
            end = start + _HEADER.size + length
            if end > len(data):
                break
            pieces.append((stream, data[start + _HEADER.size : end]))
            start = end
        self._pending = data[start:]
        return pieces


class AttachedLink(Link):
    """Frames to and from a container, whose stdout and stderr the daemon joins."""

    def __init__(self, attached: Any) -> None:
        """`attached` is what `Container.attach_socket` gives; it must be attached before the container starts."""
        super().__init__(getattr(attached, "_sock", attached))
        self._attached = attached
        self._pieces = Pieces()
        self._stderr = b""

    @property
    def said(self) -> str:
        """The end of what the runner wrote to stderr."""
        return self._stderr.decode(errors="replace").strip()[-300:]

    def close(self) -> None:
        """Closes it, upon which the runner ends."""
        # The response's own buffer has to go before the socket that it reads from.
        response = getattr(self._attached, "_response", None)
        if response is not None:
            response.close()
        self._attached.close()
        super().close()

    def _feed(self, data: bytes) -> None:
        """Hands on every whole piece."""
        for stream, piece in self._pieces.feed(data):
            if stream == STDOUT:
                self._decoder.feed(piece)
            elif stream == STDERR:
                self._stderr = (self._stderr + piece)[-_KEPT_BYTES_OF_STDERR:]


class ContainerRunner(Runner):
    """The runner in a container."""

    def __init__(
        self, handle: Any, link: AttachedLink, discard_soon: Callable[[ContainerRunner], None]
    ) -> None:
        """`handle` is a `docker.models.containers.Container`; `discard_soon` calls `discard` in the background."""
        super().__init__(link)
        self.handle = handle
        self._discard_soon = discard_soon

    def memory_mark(self) -> float:
        """The time."""
        return time.time()

    def ran_out_of_memory(self, mark: float) -> bool:
        """Whether the daemon tells of a kill for want of memory since then (by its clock; it keeps no count)."""
        events = self.handle.client.events(
            since=f"{mark:.6f}",
            until=f"{time.time() + 0.001:.6f}",
            filters={"container": self.handle.id, "event": "oom"},
            decode=True,
        )
        return any(True for _ in events)

    def _end(self) -> None:
        """In the background."""
        self._link.interrupt()
        self._discard_soon(self)

    def discard(self) -> None:
        """Kills and removes the container; what a daemon refuses is left to the next sweep."""
        from docker.errors import DockerException

        self._closed = True
        self._link.interrupt()
        with self._asking:
            self._link.close()
        with contextlib.suppress(DockerException):
            remove(self.handle)


_FILES = """
access faccessat faccessat2 open openat openat2 close close_range creat read readv pread64 preadv preadv2 write writev
pwrite64 pwritev pwritev2 lseek stat fstat lstat newfstatat statx statfs fstatfs getdents getdents64 getcwd chdir fchdir
mkdir mkdirat rmdir rename renameat renameat2 link linkat symlink symlinkat readlink readlinkat unlink unlinkat mknod
mknodat chmod fchmod fchmodat fchmodat2 chown fchown lchown fchownat umask utime utimes futimesat utimensat truncate
ftruncate fallocate fadvise64 readahead fsync fdatasync sendfile copy_file_range splice tee dup dup2 dup3 fcntl
ioctl pipe pipe2 getxattr lgetxattr fgetxattr listxattr llistxattr flistxattr
"""
_WAITING = """
select pselect6 poll ppoll epoll_create epoll_create1 epoll_ctl epoll_wait epoll_pwait epoll_pwait2 eventfd eventfd2
signalfd signalfd4 timerfd_create timerfd_settime timerfd_gettime timer_create timer_settime timer_gettime
timer_getoverrun timer_delete setitimer getitimer alarm pause nanosleep clock_nanosleep clock_gettime clock_getres
gettimeofday time times restart_syscall
"""
_MEMORY = "brk mmap munmap mprotect mremap madvise mincore msync mlock mlock2 munlock mlockall munlockall membarrier"
_PROCESSES = """
fork vfork execve exit exit_group wait4 waitid kill tkill tgkill getpid getppid gettid getpgid getpgrp setpgid getsid
setsid set_tid_address set_robust_list get_robust_list rseq futex futex_waitv sched_yield sched_getaffinity
sched_setaffinity sched_getparam sched_getscheduler sched_getattr sched_get_priority_max sched_get_priority_min
getpriority setpriority getcpu prlimit64 getrlimit setrlimit getrusage sysinfo uname arch_prctl prctl pidfd_open
pidfd_send_signal rt_sigaction rt_sigprocmask rt_sigpending rt_sigreturn rt_sigsuspend rt_sigtimedwait rt_sigqueueinfo
rt_tgsigqueueinfo sigaltstack getrandom
"""
_IDENTITY = "getuid geteuid getgid getegid getgroups getresuid getresgid capget capset"
_SOCKETS = """
socketpair bind connect listen accept accept4 getsockname getpeername getsockopt setsockopt sendto recvfrom sendmsg
recvmsg sendmmsg recvmmsg shutdown
"""
_CONFINEMENT = "seccomp landlock_create_ruleset landlock_add_rule landlock_restrict_self"
"""The runner confines each execution further."""

_NAMESPACE_FLAGS = 0x7E020000
"""CLONE_NEWNS, NEWCGROUP, NEWUTS, NEWIPC, NEWUSER, NEWPID and NEWNET (NEWTIME is no flag of clone)."""
_AF_UNIX = 1


def allowed_calls() -> tuple[str, ...]:
    """The names that are allowed whatever their arguments."""
    groups = (_FILES, _WAITING, _MEMORY, _PROCESSES, _IDENTITY, _SOCKETS, _CONFINEMENT)
    return tuple(sorted(name for group in groups for name in group.split()))


def seccomp_profile() -> str:
    """The profile as the JSON that the daemon takes."""
    rules = [
        {"names": list(allowed_calls()), "action": "SCMP_ACT_ALLOW"},
        {
            "names": ["clone"],
            "action": "SCMP_ACT_ALLOW",
            "args": [{"index": 0, "value": _NAMESPACE_FLAGS, "valueTwo": 0, "op": "SCMP_CMP_MASKED_EQ"}],
        },
        {
            "names": ["socket"],
            "action": "SCMP_ACT_ALLOW",
            "args": [{"index": 0, "value": _AF_UNIX, "valueTwo": 0, "op": "SCMP_CMP_EQ"}],
        },
        {"names": ["clone3"], "action": "SCMP_ACT_ERRNO", "errnoRet": errno.ENOSYS},
    ]
    architectures = [{"architecture": "SCMP_ARCH_X86_64"}, {"architecture": "SCMP_ARCH_AARCH64"}]
    profile = {"defaultAction": "SCMP_ACT_ERRNO", "archMap": architectures, "syscalls": rules}
    return json.dumps(profile)


WORK = "/work"
GVISOR = "runsc"
"""The usual name of gVisor's runtime."""
SCRATCH_BYTES = 16 * MIB
"""Of /tmp, and as much of /dev/shm."""
RUNNER_BYTES = 48 * MIB
PROCESSES_OF_THE_RUNNER = 4
"""The runner and a persistent interpreter, and one that is about to go of each."""

_SENTRY_PROCESSES, _SENTRY_BYTES = 256, 192 * MIB
"""gVisor's kernel is a program inside the container, with threads and memory of its own."""

_USER_IDS = range(1 << 20, 1 << 30)
"""A container gets a user id of its own: the kernel counts processes, inotify watches, pipes and keys by user, also
across containers. (Where the daemon maps users, only low ids exist.)"""
_MAPPED_USER_IDS = range(2000, 60000)


@dataclass(frozen=True, kw_only=True, slots=True)
class DockerLayers:
    """What confines a container; each can be left out by the tests, which show so that it is needed."""

    no_network: bool = True
    read_only: bool = True
    drop_capabilities: bool = True
    no_new_privileges: bool = True
    seccomp: bool = True
    pids: bool = True
    memory: bool = True
    own_user: bool = True
    sized_tmpfs: bool = True


def memory_of(limits: Limits, runtime: str | None = None) -> int:
    """Bytes of the container: what the code may have, what its files may take (they lie in memory), and the runner."""
    own = RUNNER_BYTES + (_SENTRY_BYTES if runtime == GVISOR else 0)
    return limits.memory_bytes + limits.disk_bytes + 2 * SCRATCH_BYTES + own


def user_id(*, mapped: bool) -> int:
    """The user (and group) of a new container."""
    return random.SystemRandom().choice(_MAPPED_USER_IDS if mapped else _USER_IDS)


def container_options(
    limits: Limits,
    *,
    layers: DockerLayers,
    runtime: str | None,
    cpus: float,
    labels: dict[str, str],
    uid: int,
    hidden: Sequence[str] = (),
) -> dict[str, Any]:
    """The keyword arguments of `client.containers.create`, beside image and command. `hidden` folders are empty."""
    from docker.types import LogConfig, Ulimit

    options: dict[str, Any] = {
        "stdin_open": True,
        "working_dir": WORK,
        "hostname": "sandbox",
        "labels": labels,
        "log_config": LogConfig(type="none"),
        "healthcheck": {"test": ["NONE"]},
        "nano_cpus": int(cpus * 1e9),
        "oom_score_adj": 500,
        "shm_size": SCRATCH_BYTES,
        "environment": {
            "HOME": WORK,
            "USER": "sandbox",
            "LANG": "C.UTF-8",
            "PYTHONDONTWRITEBYTECODE": "1",
            "PYTHONHASHSEED": "0",
            "MALLOC_ARENA_MAX": "2",
            "OPENBLAS_NUM_THREADS": "1",
            "OMP_NUM_THREADS": "1",
        },
        "ulimits": [
            Ulimit(name="core", soft=0, hard=0),
            Ulimit(name="memlock", soft=0, hard=0),
            Ulimit(name="nofile", soft=limits.num_open_files + 64, hard=limits.num_open_files + 64),
        ],
        "tmpfs": {
            **_tmpfs(limits, sized=layers.sized_tmpfs),
            **dict.fromkeys(hidden, "ro,size=4k,mode=0555"),
        },
        "read_only": layers.read_only,
    }
    security = []
    if layers.no_new_privileges:
        security.append("no-new-privileges:true")
    # gVisor is a kernel of its own, which takes no profile.
    if runtime != GVISOR:
        security.append(f"seccomp={seccomp_profile() if layers.seccomp else 'unconfined'}")
    options["security_opt"] = security
    if layers.no_network:
        options |= {"network_mode": "none", "network_disabled": True}
    else:
        options["network_mode"] = "host"
    if layers.drop_capabilities:
        options["cap_drop"] = ["ALL"]
    if layers.pids:
        own = PROCESSES_OF_THE_RUNNER + (_SENTRY_PROCESSES if runtime == GVISOR else 0)
        options["pids_limit"] = limits.num_processes + own
    if layers.memory:
        options |= dict.fromkeys(("mem_limit", "memswap_limit"), memory_of(limits, runtime))
    if layers.own_user:
        options["user"] = f"{uid}:{uid}"
    if runtime is not None:
        options["runtime"] = runtime
    return options


def _tmpfs(limits: Limits, *, sized: bool) -> dict[str, str]:
    """The folders that can be written. Root owns them (1777), so that code cannot lock the runner out of its own."""
    common = "rw,nosuid,nodev,mode=1777"
    if not sized:
        return dict.fromkeys((WORK, "/tmp", "/dev/shm"), f"{common},exec")
    scratch = f"{common},noexec,size={SCRATCH_BYTES},nr_inodes=1024"
    return {
        WORK: f"{common},exec,size={limits.disk_bytes},nr_inodes={limits.num_files + 1}",  # itself is one
        "/tmp": scratch,
        "/dev/shm": scratch,
    }
