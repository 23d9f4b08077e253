"""The C library, with errors as OSError."""

from __future__ import annotations

import ctypes
import os
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
