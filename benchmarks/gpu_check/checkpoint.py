"""A checkpoint that a CPU rank wrote, loaded by a rank on this device: the same logprobs, and the same next update.

With torch's layers in float32, where nothing but the order of sums differs; and where Transformer Engine is installed,
with its layers in bfloat16 too, whose modules have states (`_extra_state`) that torch's have not.
"""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.gpu_check.models import engine_of, logprobs, make_samples, sized, update
from benchmarks.gpu_check.parts import Device, Failure
from polyturn.configs.schema.trainer import ParallelConfig
from polyturn.trainer.megatron import layers
from polyturn.trainer.megatron.checkpoints import Checkpoints

TOLERANCE = {"float32": 2e-3, "bfloat16": 0.15}
"""Of mean differences of logprobs, of which the largest are around -6: TF32 is off, bfloat16 rounds to 3 digits."""
LEARNING_RATE = 1e-3
LENGTHS = (40, 17, 61, 33)


def run(device: Device) -> dict[str, Any]:
    figures: dict[str, Any] = {}
    has_engine = device == "cuda" and importlib.util.find_spec("transformer_engine") is not None
    found = layers.HAVE_TE
    for name, dtype, with_engine in (("torch", "float32", False), ("transformer_engine", "bfloat16", True)):
        if with_engine and not has_engine:
            figures[name] = "transformer_engine is not installed"
            continue
        layers.HAVE_TE = found and with_engine
        try:
            with tempfile.TemporaryDirectory(prefix="gpu-check-") as folder:
                _write(Path(folder), dtype, device)
                figures[name] = _compare(Path(folder), dtype, device)
        finally:
            layers.HAVE_TE = found
        if max(figures[name].values()) > TOLERANCE[dtype]:
            raise Failure(f"with layers of {name}, what was loaded computes something else", **figures)
    return figures


def _write(folder: Path, dtype: str, device: Device) -> None:
    """By a process that sees no GPU: one that does is no CPU rank."""
    if device == "cpu":
        write(folder, dtype)
        return
    code = (
        "from pathlib import Path; from benchmarks.gpu_check.checkpoint import write; "
        f"write(Path({str(folder)!r}), {dtype!r})"
    )
    hidden = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    subprocess.run([sys.executable, "-c", code], env=hidden, check=True, stdout=subprocess.DEVNULL)


def write(folder: Path, dtype: str) -> None:
    """Train a step on the CPU, leave a checkpoint, and what its model says before and after the next step."""
    hf_config = sized("cpu", head_dim=32)
    samples = make_samples(hf_config["vocab_size"], LENGTHS)
    with engine_of(hf_config, device="cpu", dtype=dtype, max_tokens=512, seed=1) as engine:
        update(engine, samples, learning_rate=LEARNING_RATE)
        checkpoints = _checkpoints(engine, hf_config, dtype)
        checkpoints.begin(folder / "step", num_updates=1)
        checkpoints.finish()
        before = logprobs(engine, samples)
        update(engine, samples, learning_rate=LEARNING_RATE)
        np.savez(folder / "said.npz", before=before, after=logprobs(engine, samples))


def _compare(folder: Path, dtype: str, device: Device) -> dict[str, float]:
    hf_config = sized("cpu", head_dim=32)
    samples = make_samples(hf_config["vocab_size"], LENGTHS)
    said = np.load(folder / "said.npz")
    with engine_of(hf_config, device=device, dtype=dtype, max_tokens=512, seed=2) as engine:
        others = logprobs(engine, samples)
        _checkpoints(engine, hf_config, dtype).load(folder / "step")
        before = logprobs(engine, samples)
        update(engine, samples, learning_rate=LEARNING_RATE)
        after = logprobs(engine, samples)
    if np.abs(others - said["before"]).mean() < 1e-2:
        raise Failure("the model was the same before the checkpoint was loaded, so that this shows nothing")
    return {
        "before": float(np.abs(before - said["before"]).mean()),
        "after_update": float(np.abs(after - said["after"]).mean()),
    }


def _checkpoints(engine: Any, hf_config: dict[str, Any], dtype: str) -> Checkpoints:
    return Checkpoints({"policy": engine}, hf_config=hf_config, parallel=ParallelConfig(), dtype=dtype)
