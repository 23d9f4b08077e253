"""The memory of the machine at hand."""

from __future__ import annotations

from pathlib import Path

import psutil

CGROUP_LIMITS = (Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory/memory.limit_in_bytes"))


def host_memory(limits: tuple[Path, ...] = CGROUP_LIMITS) -> int:
    """Bytes that the processes of this machine, or of this container, may have together."""
    memory = int(psutil.virtual_memory().total)
    for path in limits:
        try:
            text = path.read_text(encoding="ascii").strip()
        except OSError:
            continue
        if text.isdecimal():
            memory = min(memory, int(text))
    return memory
