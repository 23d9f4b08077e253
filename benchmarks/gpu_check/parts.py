"""The parts of the check: each is a module with `run(device)`, which gives figures, and has a process and a time limit.

A part imports what it needs when it runs, so that one whose packages are not installed says so, and the others run.
"""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from typing import Any, Literal

Device = Literal["cuda", "cpu"]


class Skip(Exception):
    """Why a part cannot run here; what it found out all the same is in `figures`."""

    def __init__(self, reason: str, **figures: Any) -> None:
        super().__init__(reason)
        self.figures = figures


class Failure(Exception):
    """What does not hold; the figures that say so are in `figures`."""

    def __init__(self, reason: str, **figures: Any) -> None:
        super().__init__(reason)
        self.figures = figures


@dataclass(frozen=True, kw_only=True, slots=True)
class Part:
    """One question."""

    name: str
    """Its module in this package, too."""
    asks: str
    limit_s: int
    """Of its process, the imports among it."""

    def run(self, device: Device) -> dict[str, Any]:
        """Its figures. Raises `Skip` or `Failure`."""
        figures: dict[str, Any] = importlib.import_module(f"benchmarks.gpu_check.{self.name}").run(device)
        return figures


PARTS = (
    Part(name="logprob_head", asks="the fused head against log_softmax", limit_s=50),
    Part(name="tree_attention", asks="attention over a tree against its sequences", limit_s=50),
    Part(name="checkpoint", asks="a checkpoint written on the CPU, loaded here", limit_s=80),
    Part(name="transformer_layers", asks="Transformer Engine's layers against torch's", limit_s=70),
    Part(name="nccl_sync", asks="buckets of weights through NCCL, byte for byte", limit_s=40),
    Part(name="offload", asks="the trainer's state to the host's memory and back", limit_s=50),
    Part(name="mfu", asks="an update of a model in the shape of Qwen3-4B", limit_s=110),
)
TOTAL_S = 480
"""Of all of them together; the limits add up to it."""
