"""The trainer's state to the host's memory and back, as where engines share its GPU: bytes, what is left, seconds."""

from __future__ import annotations

import time
from typing import Any

import torch

from benchmarks.gpu_check.models import engine_of, make_samples, sized, update
from benchmarks.gpu_check.parts import Device, Failure
from polyturn.trainer.megatron.engine import Engine
from polyturn.trainer.megatron.offload import OffloadedState

LENGTH = {"cuda": 2048, "cpu": 64}
NUM_TURNS = 3
"""The first gets the pinned memory, which takes long; the last is the one that is timed."""
LEFT = 0.02
"""Of the state's bytes, at most so many may be on the device while it is away."""


def run(device: Device) -> dict[str, Any]:
    hf_config = sized(device)
    samples = make_samples(hf_config["vocab_size"], [LENGTH[device]] * 2)
    dtype = "bfloat16" if device == "cuda" else "float32"
    with engine_of(hf_config, device=device, dtype=dtype, max_tokens=2 * LENGTH[device]) as engine:
        state, figures = OffloadedState([engine]), dict[str, Any]()
        for _ in range(NUM_TURNS):
            update(engine, samples, learning_rate=1e-4)
            before = [tensor.cpu().clone() for tensor in _kept(engine)]
            figures = _turn(engine, state, device)
            if not all(map(torch.equal, before, (tensor.cpu() for tensor in _kept(engine)))):
                raise Failure("the state came back as another one", **figures)
        # What came back can be trained on.
        update(engine, samples, learning_rate=1e-4)
    if figures["left"] > LEFT:
        raise Failure("the device has not got its memory back", **figures)
    return figures


def _turn(engine: Engine, state: OffloadedState, device: Device) -> dict[str, Any]:
    whole = _on_device(engine, device)
    started = time.perf_counter()
    num_bytes = state.offload("training") + state.offload("weights")
    offloaded = time.perf_counter()
    left = _on_device(engine, device)
    reloading = time.perf_counter()
    state.reload()
    seconds = time.perf_counter() - reloading
    return {
        "bytes": num_bytes,
        "left": left / whole,
        "offload_gigabytes_per_s": num_bytes / (offloaded - started) / 1e9,
        "reload_gigabytes_per_s": num_bytes / seconds / 1e9,
    }


def _kept(engine: Engine) -> list[torch.Tensor]:
    """Weights and moments."""
    tensors = [param.detach() for chunk in engine.chunks for param in chunk.parameters()]
    for optimizer in engine.optimizers:
        for found in optimizer.optimizer.state.values():
            tensors += [value for value in found.values() if isinstance(value, torch.Tensor)]
    return tensors


def _on_device(engine: Engine, device: Device) -> int:
    """Bytes of all that is allocated; on a CPU, where nobody counts, of the state itself."""
    if device == "cuda":
        return torch.cuda.memory_allocated()
    return sum(tensor.untyped_storage().nbytes() for tensor in _kept(engine))
