"""The memory of the machine at hand, and of published GPUs for plans of runs on machines that are not."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Literal

import psutil

GpuName = Literal[
    "A10",
    "A100-40GB",
    "A100-80GB",
    "B200",
    "H100",
    "H200",
    "L4",
    "L40S",
    "MI300X",
    "RTX4090",
    "T4",
    "V100-32GB",
]

GPU_GIB: Mapping[GpuName, int] = {
    "T4": 15,
    "L4": 22,
    "A10": 22,
    "RTX4090": 24,
    "V100-32GB": 32,
    "A100-40GB": 40,
    "L40S": 45,
    "A100-80GB": 80,
    "H100": 80,
    "H200": 140,
    "B200": 179,
    "MI300X": 192,
}
"""What a process finds free on an idle GPU, about; the smallest first."""


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
