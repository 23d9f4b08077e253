"""The memory of published GPUs, for plans of runs on machines that are not at hand."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

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
