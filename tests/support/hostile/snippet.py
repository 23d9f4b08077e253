"""Hostile code, one snippet each, and what must hold after it has run. The tests run every snippet on every backend.

A snippet prints BREACH and what it got, whenever it gets something that it must not get; so a snippet on which
nothing is printed must still show, by how it ends or by what it `says`, that it did try. Words in capitals between
@ signs are filled in with the baits that the tests lay out on the host (see `Baits`).
"""

from __future__ import annotations

from dataclasses import dataclass, field

from polyturn.tools.sandbox import Limits, Status

SECRET_PATTERN = "canary-[0-9a-f]{32}"
"""What every secret on the host looks like: snippets search for it without holding it."""

SMALL = Limits(
    wall_s=5,
    cpu_s=5,
    memory_bytes=128 << 20,
    output_bytes=64 << 10,
    num_processes=16,
    file_bytes=8 << 20,
    disk_bytes=16 << 20,
    num_files=512,
    num_open_files=128,
)
"""The limits under which the snippets run: what they print is measured against these."""

SYSTEM_CALLS = """
import ctypes, errno, os
_libc = ctypes.CDLL(None, use_errno=True)
def call(number, *arguments):
    ctypes.set_errno(0)
    arguments = [ctypes.c_long(a) if isinstance(a, int) else a for a in arguments]
    result = _libc.syscall(ctypes.c_long(number), *arguments)
    return result, errno.errorcode.get(ctypes.get_errno(), "")
def must_fail(**calls):
    for name, (number, *arguments) in calls.items():
        result, error = call(number, *arguments)
        print(f"BREACH {name} gave {result}" if result >= 0 else f"{name}: {error}")
"""
"""`call(number, …)` and `must_fail(name=(number, …))`, with the numbers of x86-64."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Hostile:
    """One snippet."""

    name: str
    code: str
    ends: frozenset[Status] = frozenset({"ok"})
    """How it may end."""
    says: str = ""
    """What stdout must hold, whatever else happens."""
    exit_code: int | None = None
    """The exit code it must end with, where one is given."""
    timeout_s: float = 5.0
    """Short where the snippet runs into it on purpose."""
    plants: tuple[str, ...] = field(default=())
    """Files in the work folder that a host's `read_file` must refuse."""
    x86_64_only: bool = False

    @property
    def source(self) -> str:
        return self.code.lstrip("\n")


TIMES_OUT: frozenset[Status] = frozenset({"timeout"})
MEMORY_ENDS: frozenset[Status] = frozenset({"oom"})
FLOODS: frozenset[Status] = frozenset({"output_limit"})
WAIT_S = 1.0
"""The timeout of a snippet that runs into it."""
