"""Landlock: a process gives up file access, and signals to processes outside, for itself and its children.

Structures and access rights: https://docs.kernel.org/userspace-api/landlock.html
"""

from __future__ import annotations

import ctypes
import os
import struct
from collections.abc import Sequence

from .libc import LIBC, syscall

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
