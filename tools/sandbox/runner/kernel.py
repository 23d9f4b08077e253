"""What Python has no function for: system calls, landlock and seccomp filters."""

from __future__ import annotations

import ctypes
import errno
import os
import struct
from collections.abc import Sequence
from typing import Any

LIBC = ctypes.CDLL(None, use_errno=True)

PR_SET_PDEATHSIG = 1
PR_SET_DUMPABLE = 4
PR_SET_SECCOMP = 22
PR_CAPBSET_DROP = 24
PR_SET_CHILD_SUBREAPER = 36
PR_SET_NO_NEW_PRIVS = 38
PR_CAP_AMBIENT = 47
PR_CAP_AMBIENT_CLEAR_ALL = 4

LAST_CAPABILITY = 63


def check(result: int, what: str) -> int:
    """Raises OSError, naming `what`, where a call of the C library failed."""
    if result < 0:
        code = ctypes.get_errno()
        raise OSError(code, f"{what}: {os.strerror(code)}")
    return result


def prctl(option: int, *arguments: int) -> None:
    """prctl(2) with unsigned long arguments. Raises OSError."""
    padded = [ctypes.c_ulong(argument) for argument in (*arguments, 0, 0, 0, 0)[:4]]
    check(LIBC.prctl(option, *padded), f"prctl {option}")


def syscall(number: int, what: str, *arguments: Any) -> int:
    """A system call that the C library has no function for. Raises OSError."""
    return check(LIBC.syscall(ctypes.c_long(number), *arguments), what)


def drop_bounding_set() -> None:
    """Gives up the right ever to gain a capability, as far as this process may."""
    for capability in range(LAST_CAPABILITY + 1):
        # Fails for numbers that the kernel does not know, and without CAP_SETPCAP, where there is nothing to drop.
        LIBC.prctl(PR_CAPBSET_DROP, ctypes.c_ulong(capability), 0, 0, 0)


def drop_capabilities() -> None:
    """Gives up every capability for good: bounding, ambient, effective, permitted and inheritable."""
    drop_bounding_set()
    LIBC.prctl(PR_CAP_AMBIENT, ctypes.c_ulong(PR_CAP_AMBIENT_CLEAR_ALL), 0, 0, 0)
    header = (ctypes.c_uint32 * 2)(0x20080522, 0)  # _LINUX_CAPABILITY_VERSION_3, this process
    check(LIBC.capset(header, (ctypes.c_uint32 * 6)()), "capset")


CREATE_RULESET, ADD_RULE, RESTRICT_SELF = 444, 445, 446  # the same on every architecture
ABI_QUERY = 1
RULE_PATH_BENEATH = 1

EXECUTE, WRITE_FILE, READ_FILE, READ_DIR = 1 << 0, 1 << 1, 1 << 2, 1 << 3
MAKE_CHAR, MAKE_BLOCK = 1 << 6, 1 << 11
REFER, TRUNCATE, IOCTL_DEVICE = 1 << 13, 1 << 14, 1 << 15
READ = EXECUTE | READ_FILE | READ_DIR
OF_A_FILE = EXECUTE | WRITE_FILE | READ_FILE | TRUNCATE | IOCTL_DEVICE


def abi() -> int:
    """The version that the kernel speaks; 0 where it has none or it is switched off."""
    return max(LIBC.syscall(ctypes.c_long(CREATE_RULESET), None, ctypes.c_size_t(0), ABI_QUERY), 0)


def make_ruleset(readable: Sequence[str], writable: Sequence[str]) -> int | None:
    """A descriptor of rules that allow reading and writing there and nothing else; None without landlock.

    All that the kernel's version knows is handled: TCP ports from version 4, signals and abstract sockets that leave
    the sandbox from version 6. Paths that do not exist are left out.
    """
    version = abi()
    if version == 0:
        return None
    rights = (1 << 13) - 1
    rights |= REFER if version >= 2 else 0
    rights |= TRUNCATE if version >= 3 else 0
    rights |= IOCTL_DEVICE if version >= 5 else 0
    attributes = struct.pack("=Q", rights)
    if version >= 4:
        attributes += struct.pack("=Q", 3)  # bind and connect TCP
    if version >= 6:
        attributes += struct.pack("=Q", 3)  # abstract UNIX sockets, signals
    size = ctypes.c_size_t(len(attributes))
    ruleset = syscall(CREATE_RULESET, "landlock_create_ruleset", attributes, size, 0)
    os.set_inheritable(ruleset, False)
    for path in readable:
        _allow(ruleset, path, READ & rights)
    for path in writable:
        _allow(ruleset, path, rights & ~(MAKE_CHAR | MAKE_BLOCK))
    return ruleset


def _allow(ruleset: int, path: str, rights: int) -> None:
    try:
        fd = os.open(path, os.O_PATH | os.O_CLOEXEC)
    except FileNotFoundError:
        return
    try:
        if not os.path.isdir(path):
            rights &= OF_A_FILE
        rule = struct.pack("=Qi", rights, fd)
        syscall(ADD_RULE, f"landlock_add_rule {path}", ruleset, RULE_PATH_BENEATH, rule, 0)
    finally:
        os.close(fd)


def restrict(ruleset: int) -> None:
    """Puts the rules on this process for good; it must have no_new_privs."""
    syscall(RESTRICT_SELF, "landlock_restrict_self", ruleset, 0)


# Name: (x86-64, aarch64); None where the architecture does not have it.
DENIED: dict[str, tuple[int | None, int | None]] = {
    # Other processes' memory and descriptors.
    "ptrace": (101, 117),
    "process_vm_readv": (310, 270),
    "process_vm_writev": (311, 271),
    "process_madvise": (440, 440),
    "kcmp": (312, 272),
    "pidfd_getfd": (438, 438),
    # Namespaces and mounts.
    "unshare": (272, 97),
    "setns": (308, 268),
    "chroot": (161, 51),
    "pivot_root": (155, 41),
    "mount": (165, 40),
    "umount2": (166, 39),
    "open_tree": (428, 428),
    "move_mount": (429, 429),
    "fsopen": (430, 430),
    "fsconfig": (431, 431),
    "fsmount": (432, 432),
    "fspick": (433, 433),
    "mount_setattr": (442, 442),
    "statmount": (457, 457),
    "listmount": (458, 458),
    "open_tree_attr": (467, 467),
    "open_by_handle_at": (304, 265),
    "name_to_handle_at": (303, 264),
    "fanotify_init": (300, 262),
    "fanotify_mark": (301, 263),
    "quotactl": (179, 60),
    "quotactl_fd": (443, 443),
    # Watching, and locking away, files that the machine and other sandboxes use, too. (Locks by `fcntl` stay: whoever
    # may only read a file cannot lock it for himself.) And the machine has few watches for each user.
    "inotify_init": (253, None),
    "inotify_init1": (294, 26),
    "flock": (73, 32),
    # The kernel itself.
    "bpf": (321, 280),
    "perf_event_open": (298, 241),
    "userfaultfd": (323, 282),
    "io_uring_setup": (425, 425),
    "io_uring_enter": (426, 426),
    "io_uring_register": (427, 427),
    "keyctl": (250, 219),
    "add_key": (248, 217),
    "request_key": (249, 218),
    "init_module": (175, 105),
    "finit_module": (313, 273),
    "delete_module": (176, 106),
    "kexec_load": (246, 104),
    "kexec_file_load": (320, 294),
    "reboot": (169, 142),
    "syslog": (103, 116),
    "acct": (163, 89),
    "swapon": (167, 224),
    "swapoff": (168, 225),
    "personality": (135, 92),
    "lookup_dcookie": (212, 18),
    "vhangup": (153, 58),
    "nfsservctl": (180, 42),
    "iopl": (172, None),
    "ioperm": (173, None),
    "modify_ldt": (154, None),
    "uselib": (134, None),
    "ustat": (136, None),
    "sysfs": (139, None),
    "_sysctl": (156, None),
    # Clocks and names of the machine.
    "settimeofday": (164, 170),
    "clock_settime": (227, 112),
    "adjtimex": (159, 171),
    "clock_adjtime": (305, 266),
    "sethostname": (170, 161),
    "setdomainname": (171, 162),
    # Memory that outlives a process, or that no limit counts.
    "shmget": (29, 194),
    "semget": (64, 190),
    "msgget": (68, 186),
    "mq_open": (240, 180),
    "memfd_secret": (447, 447),
    "mbind": (237, 235),
    "set_mempolicy": (238, 237),
    "set_mempolicy_home_node": (450, 450),
    "migrate_pages": (256, 238),
    "move_pages": (279, 239),
}
MEMFD_CREATE = (319, 279)
CLONE, CLONE3 = (56, 220), (435, 435)
SOCKET, SOCKETPAIR = (41, 198), (53, 199)
IOCTL = (16, 29)
OF_PROCESSES: dict[str, tuple[int, int]] = {
    "prlimit64": (302, 261),
    "sched_setparam": (142, 118),
    "sched_setscheduler": (144, 119),
    "sched_setattr": (314, 274),
    "sched_setaffinity": (203, 122),
}
"""Calls whose first argument is a process. One of the same user may set the limits, the niceness and the processors of
any other, so of the runner, from which every later execution has them: only its own (0) are its business."""
OF_MANY: dict[str, tuple[int, int]] = {"setpriority": (141, 140), "ioprio_set": (251, 30)}
"""Calls whose first argument is a kind (process, group or user) and whose second one of that kind."""
KIND_PROCESS = {"setpriority": 0, "ioprio_set": 1}
FCNTL, WATCHING_COMMANDS = (72, 25), (1024, 1026)  # F_SETLEASE, F_NOTIFY

AUDIT_ARCHITECTURES = {"x86_64": (0, 0xC000003E), "aarch64": (1, 0xC00000B7)}
NEW_NAMESPACES = 0x7E020000 | 0x00000080  # CLONE_NEW{NS,CGROUP,UTS,IPC,USER,PID,NET,TIME}
X32_BIT = 0x40000000
FORGING_IOCTLS = (0x5412, 0x541C)  # TIOCSTI, TIOCLINUX: keystrokes for whoever holds the terminal

LOAD, JUMP_EQUAL, JUMP_GREATER_EQUAL, JUMP_ANY_BIT, RETURN = 0x20, 0x15, 0x35, 0x45, 0x06
ALLOW, KILL_PROCESS, FAIL_WITH = 0x7FFF0000, 0x80000000, 0x00050000
OFFSET_NUMBER, OFFSET_ARCHITECTURE, OFFSET_ARGUMENTS = 0, 4, 16
SECCOMP_MODE_FILTER = 2


def build_filter(machine: str, *, deny_memfd: bool = False) -> bytes:
    """The BPF program for a machine as `os.uname` names it. Raises ValueError for one that has no table here."""
    if machine not in AUDIT_ARCHITECTURES:
        raise ValueError(f"no seccomp filter for {machine}; there are {', '.join(AUDIT_ARCHITECTURES)}")
    column, audit = AUDIT_ARCHITECTURES[machine]
    program: list[tuple[int, int, int, int]] = []

    def emit(code: int, value: int, *, if_true: int = 0, if_false: int = 0) -> None:
        program.append((code, if_true, if_false, value))

    emit(LOAD, OFFSET_ARCHITECTURE)
    emit(JUMP_EQUAL, audit, if_true=1)
    emit(RETURN, KILL_PROCESS)
    emit(LOAD, OFFSET_NUMBER)
    if machine == "x86_64":
        emit(JUMP_GREATER_EQUAL, X32_BIT, if_false=1)
        emit(RETURN, KILL_PROCESS)
    denied = [numbers[column] for numbers in DENIED.values()] + ([MEMFD_CREATE[column]] if deny_memfd else [])
    for number in denied:
        if number is not None:
            emit(JUMP_EQUAL, number, if_false=1)
            emit(RETURN, FAIL_WITH | errno.EPERM)
    # Its flags are behind a pointer, where a filter cannot look; the C library falls back to clone.
    emit(JUMP_EQUAL, CLONE3[column], if_false=1)
    emit(RETURN, FAIL_WITH | errno.ENOSYS)
    emit(JUMP_EQUAL, CLONE[column], if_false=4)
    emit(LOAD, OFFSET_ARGUMENTS)
    emit(JUMP_ANY_BIT, NEW_NAMESPACES & ~0xFF, if_false=1)  # the low byte is the signal of the child's end
    emit(RETURN, FAIL_WITH | errno.EPERM)
    emit(RETURN, ALLOW)
    for call in (SOCKET, SOCKETPAIR):
        emit(JUMP_EQUAL, call[column], if_false=4)
        emit(LOAD, OFFSET_ARGUMENTS)
        emit(JUMP_EQUAL, 1, if_true=1)  # AF_UNIX
        emit(RETURN, FAIL_WITH | errno.EACCES)
        emit(RETURN, ALLOW)
    for numbers in OF_PROCESSES.values():
        emit(JUMP_EQUAL, numbers[column], if_false=4)
        emit(LOAD, OFFSET_ARGUMENTS)
        emit(JUMP_EQUAL, 0, if_true=1)
        emit(RETURN, FAIL_WITH | errno.EPERM)
        emit(RETURN, ALLOW)
    for name, numbers in OF_MANY.items():
        emit(JUMP_EQUAL, numbers[column], if_false=6)
        emit(LOAD, OFFSET_ARGUMENTS)
        emit(JUMP_EQUAL, KIND_PROCESS[name], if_false=2)
        emit(LOAD, OFFSET_ARGUMENTS + 8)
        emit(JUMP_EQUAL, 0, if_true=1)
        emit(RETURN, FAIL_WITH | errno.EPERM)
        emit(RETURN, ALLOW)
    for call, commands in ((FCNTL, WATCHING_COMMANDS), (IOCTL, FORGING_IOCTLS)):
        emit(JUMP_EQUAL, call[column], if_false=2 + 2 * len(commands))
        emit(LOAD, OFFSET_ARGUMENTS + 8)
        for command in commands:
            emit(JUMP_EQUAL, command, if_false=1)
            emit(RETURN, FAIL_WITH | errno.EPERM)
        emit(RETURN, ALLOW)
    emit(RETURN, ALLOW)
    return b"".join(struct.pack("=HBBI", *instruction) for instruction in program)


class _Program(ctypes.Structure):
    _fields_ = (("length", ctypes.c_ushort), ("instructions", ctypes.c_void_p))


class Filter:
    """A filter in memory, ready to be put on a process."""

    def __init__(self, *, deny_memfd: bool = False) -> None:
        code = build_filter(os.uname().machine, deny_memfd=deny_memfd)
        self._code = ctypes.create_string_buffer(code, len(code))
        self._program = _Program(len(code) // 8, ctypes.addressof(self._code))

    def apply(self) -> None:
        """Puts the filter on this process and its children for good; it must have no_new_privs."""
        check(LIBC.prctl(PR_SET_SECCOMP, SECCOMP_MODE_FILTER, ctypes.byref(self._program), 0, 0), "seccomp")
