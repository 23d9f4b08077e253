"""The memory of the machine at hand, and memory and speed of published GPUs for plans on machines that are not."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
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


@dataclass(frozen=True, kw_only=True, slots=True)
class GpuPeak:
    """What a vendor's data sheet says of one GPU: dense, in 16 bits, at boost clock."""

    tflops: float
    """BF16, or FP16 where there is no BF16; without sparsity."""
    terabytes_per_s: float
    """Of its memory."""


GPU_PEAKS: Mapping[GpuName, GpuPeak] = {
    "T4": GpuPeak(tflops=65, terabytes_per_s=0.32),
    "L4": GpuPeak(tflops=121, terabytes_per_s=0.3),
    "A10": GpuPeak(tflops=125, terabytes_per_s=0.6),
    "RTX4090": GpuPeak(tflops=165, terabytes_per_s=1.01),
    "V100-32GB": GpuPeak(tflops=125, terabytes_per_s=0.9),
    "A100-40GB": GpuPeak(tflops=312, terabytes_per_s=1.56),
    "L40S": GpuPeak(tflops=362, terabytes_per_s=0.86),
    "A100-80GB": GpuPeak(tflops=312, terabytes_per_s=2.04),
    "H100": GpuPeak(tflops=989, terabytes_per_s=3.35),
    "H200": GpuPeak(tflops=989, terabytes_per_s=4.8),
    "B200": GpuPeak(tflops=2250, terabytes_per_s=8.0),
    "MI300X": GpuPeak(tflops=1307, terabytes_per_s=5.3),
}
"""Of the SXM or OAM form where there are several. Nobody reaches them: what is planned with takes a share."""


SHARED_MEM_FRACTION = 0.7
"""Of a GPU that trainer and engine share by turns, what SGLang's weights and KV take in the engine's turn, unless
`sglang.mem_fraction_static` says. The trainer's context and communicators stay beside them, and what SGLang needs to
compute."""

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
