"""The seccomp profile of a Docker sandbox: an allow-list, narrower than Docker's own.

Docker's default lets through what its version does not know to be dangerous (io_uring and ptrace in 20.10). Here a
system call that is not named fails: EPERM, or ENOSYS for `clone3`, whose flags no filter can read, so that the C
library falls back to `clone`. Sockets are Unix sockets only, and `clone` makes no namespaces.
"""

from __future__ import annotations

import errno
import json

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
