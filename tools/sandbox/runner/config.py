"""What a runner is told once, before the first code."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

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
