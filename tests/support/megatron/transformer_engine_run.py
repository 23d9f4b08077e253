"""One model on one GPU, with Transformer Engine's layers and with torch's: run as a program, prints one JSON object.

A program of its own, because a process that was made to run Megatron-core on a CPU cannot be a CUDA rank any more.
"""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from polyturn.trainer.data.samples import TrainSample
from tests.support.megatron.policies import make_policy
from tests.support.samples import make_sample

LENGTHS = [5, 40, 17, 3, 33, 17, 61]
RUNS = {"transformer_engine": ("bfloat16", True), "torch": ("bfloat16", False), "exact": ("float32", False)}
"""Name -> dtype, and whether Transformer Engine may be used. Its packed attention takes no float32."""


def make_samples(vocab_size: int) -> list[TrainSample]:
    rng = np.random.default_rng(0)
    return [
        make_sample(
            rng.integers(0, vocab_size, length),
            name=f"sample-{i}",
            behavior_logprobs=np.full(length, -5, dtype=np.float32),
            advantages=np.full(length, rng.normal(), dtype=np.float32),
        )
        for i, length in enumerate(LENGTHS)
    ]


def run(path: Path, *, dtype: str, allow_engine: bool) -> dict[str, Any]:
    """Score, update once, and score again."""
    from polyturn.configs.schema.trainer import OptimizerConfig
    from polyturn.trainer.algorithms.objective import Objective
    from polyturn.trainer.data.samples import count_samples
    from polyturn.trainer.megatron import layers

    found = layers.HAVE_TE
    layers.HAVE_TE = found and allow_engine
    samples = make_samples(json.loads((path / "config.json").read_text())["vocab_size"])
    policy = make_policy(
        path, dtype=dtype, device="cuda", optimizer=OptimizerConfig(learning_rate=1e-3, epsilon=1e-3)
    )
    try:
        before = policy.logprobs(samples)
        scored = [
            replace(sample, proximal_logprobs=column) for sample, column in zip(samples, before, strict=True)
        ]
        metrics = policy.train(scored, objective=Objective(), global_counts=count_samples(samples))
        after = policy.logprobs(samples)
        chunks = policy._engine.chunks
        return {
            "layers": type(chunks[0].decoder.layers[0].self_attention.linear_proj).__module__,
            "parameters": [name for chunk in chunks for name, _ in chunk.named_parameters()],
            "before": np.concatenate(before).tolist(),
            "after": np.concatenate(after).tolist(),
            "grad_norm": metrics["grad_norm"],
        }
    finally:
        policy.close()
        layers.HAVE_TE = found


if __name__ == "__main__":
    results = {
        name: run(Path(sys.argv[1]), dtype=dtype, allow_engine=allow_engine)
        for name, (dtype, allow_engine) in RUNS.items()
    }
    print(json.dumps(results))
