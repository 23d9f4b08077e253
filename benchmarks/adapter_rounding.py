"""How much of what LoRA's adapters learn is left in merged weights once these are rounded to the model's dtype: the
correlation between what adapters add and what the merged weights differ from the base, after some updates of a model on
random tokens with random advantages. One rank, one thread."""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path
from typing import Literal

import numpy as np

from polyturn.configs.models import resolve_model_path
from polyturn.configs.schema.trainer import LoraConfig, OptimizerConfig
from polyturn.trainer.algorithms.objective import Objective
from polyturn.trainer.base_model.supervised import one_rank
from polyturn.trainer.data.samples import TrainSample, count_samples
from polyturn.trainer.megatron.policy import MegatronPolicy


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, epilog="example: adapter_rounding.py SmolLM2-135M --rates 1e-6 1e-4"
    )
    parser.add_argument("model", help="a Hugging Face directory, or builtin:NAME")
    parser.add_argument("--rates", type=float, nargs="+", default=[1e-6, 1e-5, 1e-4], help="learning rates")
    parser.add_argument("--updates", type=int, default=4, help="updates at each of them")
    parser.add_argument("--short", action="store_true", help="one rate, 2 updates")
    return parser.parse_args()


def make_samples(num_tokens: int = 24, count: int = 4) -> list[TrainSample]:
    rng = np.random.default_rng(0)
    return [
        TrainSample(
            sample_id=str(number),
            group_id="g",
            sequence_id=str(number),
            token_ids=rng.integers(0, 100, num_tokens),
            sampled=np.arange(num_tokens) > 0,
            behavior_logprobs=np.zeros(num_tokens, dtype=np.float32),
            policy_versions=np.zeros(num_tokens, dtype=np.int32),
            turns=np.zeros(num_tokens, dtype=np.int32),
            advantages=np.full(num_tokens, (-1.0) ** number, dtype=np.float32),
        )
        for number in range(count)
    ]


def correlations(
    model: Path, dtype: Literal["float32", "bfloat16"], rate: float, num_updates: int
) -> list[float]:
    """After each update."""
    optimizer = OptimizerConfig(learning_rate=rate)
    policy = MegatronPolicy(one_rank(model, dtype=dtype, lora=LoraConfig(), optimizer=optimizer))
    samples, found = make_samples(), []
    try:
        for _ in range(num_updates):
            columns = policy.logprobs(samples)
            scored = [
                replace(sample, proximal_logprobs=column)
                for sample, column in zip(samples, columns, strict=True)
            ]
            policy.train(scored, objective=Objective(), global_counts=count_samples(samples))
            for _ in policy.named_hf_tensors():
                continue
            found.append(policy.adapter_correlation() or 0.0)
    finally:
        policy.close()
    return found


def main() -> None:
    arguments = parse_arguments()
    rates, updates = (arguments.rates[:1], 2) if arguments.short else (arguments.rates, arguments.updates)
    for dtype in ("bfloat16", "float32"):
        for rate in rates:
            found = correlations(resolve_model_path(arguments.model), dtype, rate, updates)
            print(f"{dtype:9} learning rate {rate:g}: {', '.join(f'{one:.4f}' for one in found)}")


if __name__ == "__main__":
    main()
