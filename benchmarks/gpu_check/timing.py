"""Seconds and bytes on either device."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TypeVar

import torch

from benchmarks.gpu_check.parts import Device

T = TypeVar("T")


def seconds_of(work: Callable[[], object], device: Device, *, repeats: int) -> float:
    """The fastest of some runs, each waited for."""
    fastest = float("inf")
    for _ in range(repeats):
        wait(device)
        started = time.perf_counter()
        work()
        wait(device)
        fastest = min(fastest, time.perf_counter() - started)
    return fastest


def peak_bytes(work: Callable[[], T], device: Device) -> tuple[int, T]:
    """What work allocates at most on a GPU, and what it gives; a CPU does not tell, and says 0."""
    if device == "cpu":
        return 0, work()
    wait(device)
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    result = work()
    wait(device)
    return torch.cuda.max_memory_allocated() - before, result


def wait(device: Device) -> None:
    if device == "cuda":
        torch.cuda.synchronize()
