"""Transformer Engine's layers against torch's, of one model: in bfloat16, in which both round, neither may be further
from float32 than twice the other; and the seconds of an update."""

from __future__ import annotations

import importlib.util
from typing import Any

import numpy as np

from benchmarks.gpu_check.models import engine_of, logprobs, make_samples, sized, update
from benchmarks.gpu_check.parts import Device, Failure, Skip
from benchmarks.gpu_check.timing import seconds_of
from polyturn.trainer.megatron import layers

LENGTHS = {"cuda": (1000, 3000, 500, 3500), "cpu": (40, 17, 33)}
FACTOR, SLACK = 2.0, 2e-3


def run(device: Device) -> dict[str, Any]:
    hf_config = sized(device, head_dim=32)
    samples = make_samples(hf_config["vocab_size"], LENGTHS[device])
    has_engine = device == "cuda" and importlib.util.find_spec("transformer_engine") is not None
    kinds = {"exact": ("float32", False), "torch": ("bfloat16", False)}
    if has_engine:
        kinds["transformer_engine"] = ("bfloat16", True)
    found: dict[str, tuple[np.ndarray, np.ndarray, float]] = {}
    have = layers.HAVE_TE
    for name, (dtype, with_engine) in kinds.items():
        layers.HAVE_TE = have and with_engine
        try:
            with engine_of(
                hf_config, device=device, dtype=dtype, max_tokens=8192, learning_rate=1e-4, epsilon=1e-3
            ) as engine:
                before = logprobs(engine, samples)
                update(engine, samples, learning_rate=1e-4)
                after = logprobs(engine, samples)
                if name != "exact":
                    seconds = seconds_of(
                        lambda engine=engine: update(engine, samples, learning_rate=0.0), device, repeats=2
                    )
                found[name] = (before, after, seconds if name != "exact" else 0.0)
        finally:
            layers.HAVE_TE = have
    exact_before, exact_after, _ = found.pop("exact")
    figures: dict[str, Any] = {
        name: {
            "error_before": float(np.abs(before - exact_before).mean()),
            "error_after": float(np.abs(after - exact_after).mean()),
            "update_seconds": seconds,
        }
        for name, (before, after, seconds) in found.items()
    }
    if not has_engine:
        raise Skip("transformer_engine is not installed: torch's layers alone", **figures)
    for when in ("error_before", "error_after"):
        errors = [figures[name][when] for name in found]
        if max(errors) > FACTOR * min(errors) + SLACK:
            raise Failure(f"{when}: one kind of layers is further from float32 than the other", **figures)
    return figures
