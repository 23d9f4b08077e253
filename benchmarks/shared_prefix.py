"""Training with shared prefixes computed once against each sample by itself: processor seconds of an update (one
thread), tokens, pairs of attention and floating-point operations, on the same samples, in one run on one rank."""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch

from polyturn.configs.models import resolve_model_path
from polyturn.configs.schema.trainer import SharedPrefix
from polyturn.trainer.algorithms.objective import Objective
from polyturn.trainer.base_model.supervised import one_rank
from polyturn.trainer.data.prefix_tree import Sharing
from polyturn.trainer.data.samples import TrainSample, count_samples
from polyturn.trainer.megatron.policy import MegatronPolicy

VOCABULARY = 200
"""Token ids are drawn below this."""


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, epilog="example: shared_prefix.py --prompt 1024 --answer 256 --group 8"
    )
    parser.add_argument(
        "--model", default="builtin:tiny-searcher", help="Hugging Face directory or builtin:NAME"
    )
    parser.add_argument("--prompt", type=int, default=768, help="tokens of a prompt")
    parser.add_argument("--answer", type=int, default=192, help="sampled tokens of a turn")
    parser.add_argument("--group", type=int, default=8, help="episodes of a prompt")
    parser.add_argument("--turns", type=int, default=6, help="turns of an episode with stripped thoughts")
    parser.add_argument("--repeats", type=int, default=5, help="updates that are measured, each way and case")
    parser.add_argument("--short", action="store_true", help="a third of the tokens, 2 repeats")
    return parser.parse_args()


def make_sample(number: int, token_ids: list[int], num_sampled: int, rng: np.random.Generator) -> TrainSample:
    """The last `num_sampled` tokens are trained on."""
    length = len(token_ids)
    sampled = np.arange(length) >= length - num_sampled
    return TrainSample(
        sample_id=str(number),
        group_id="g",
        sequence_id=str(number),
        token_ids=np.array(token_ids, dtype=np.int64),
        sampled=sampled,
        behavior_logprobs=np.full(length, -5.0, dtype=np.float32),
        policy_versions=np.zeros(length, dtype=np.int32),
        turns=np.zeros(length, dtype=np.int32),
        advantages=np.where(sampled, rng.normal(), 0.0).astype(np.float32),
    )


def one_prompt(arguments: argparse.Namespace, rng: np.random.Generator) -> list[TrainSample]:
    """A group of episodes that answer one prompt."""
    prompt = rng.integers(0, VOCABULARY, arguments.prompt).tolist()
    return [
        make_sample(i, prompt + rng.integers(0, VOCABULARY, arguments.answer).tolist(), arguments.answer, rng)
        for i in range(arguments.group)
    ]


def stripped_thoughts(arguments: argparse.Namespace, rng: np.random.Generator) -> list[TrainSample]:
    """An episode whose template drops the thoughts of earlier turns: every turn is a segment that branches off."""
    history = rng.integers(0, VOCABULARY, arguments.prompt // 2).tolist()
    samples = []
    for turn in range(arguments.turns):
        thought, answer, observation = (
            rng.integers(0, VOCABULARY, n).tolist()
            for n in (arguments.answer * 3 // 4, arguments.answer // 4, arguments.answer)
        )
        samples.append(make_sample(turn, history + thought + answer, len(thought + answer), rng))
        history = history + answer + observation
    return samples


def nothing_shared(arguments: argparse.Namespace, rng: np.random.Generator) -> list[TrainSample]:
    """Episodes that have nothing in common: what the tree costs where it brings nothing."""
    length = arguments.prompt // 2 + arguments.answer
    return [
        make_sample(i, rng.integers(0, VOCABULARY, length).tolist(), arguments.answer, rng)
        for i in range(arguments.group)
    ]


@dataclass(frozen=True, kw_only=True, slots=True)
class Measured:
    """Updates of one case, one way."""

    seconds: float
    """Of the processor, median of an update."""
    grad_norm: float
    sharing: Sharing
    """Of one update."""
    flops_saved: float


def measure(model: Path, samples: list[TrainSample], mode: SharedPrefix, *, repeats: int) -> Measured:
    """Updates at a learning rate of 0, so that each begins where the others did."""
    total = sum(len(sample) for sample in samples)
    policy = MegatronPolicy(one_rank(model, max_tokens_per_gpu=total, shared_prefix=mode))
    try:
        columns = policy.logprobs(samples)
        scored = [replace(s, proximal_logprobs=c) for s, c in zip(samples, columns, strict=True)]
        seconds, metrics = [], {}
        for _ in range(repeats + 1):
            policy.take_sharing()
            started = time.process_time()
            metrics = policy.train(
                scored, objective=Objective(), global_counts=count_samples(scored), learning_rate=0.0
            )
            seconds.append(time.process_time() - started)
        sharing, flops = policy.take_sharing()
    finally:
        policy.close()
    return Measured(
        seconds=statistics.median(seconds[1:]),
        grad_norm=metrics["grad_norm"],
        sharing=sharing,
        flops_saved=sharing.saved_fraction(token=flops.token, pair=flops.pair),
    )


CASES: dict[str, Callable[[argparse.Namespace, np.random.Generator], list[TrainSample]]] = {
    "one prompt": one_prompt,
    "stripped thoughts": stripped_thoughts,
    "nothing shared": nothing_shared,
}


def main() -> None:
    arguments = parse_arguments()
    if arguments.short:
        arguments.prompt, arguments.answer = arguments.prompt // 3, arguments.answer // 3
        arguments.repeats = 2
    torch.set_num_threads(1)
    model = resolve_model_path(arguments.model)
    rows = {}
    print(f"{'':20} {'tokens':>16} {'saved':>6} {'pairs':>6} {'flops':>6} {'seconds':>15} {'faster':>7}")
    for name, make in CASES.items():
        samples = make(arguments, np.random.default_rng(0))
        apart = measure(model, samples, "off", repeats=arguments.repeats)
        tree = measure(model, samples, "tree", repeats=arguments.repeats)
        sharing = tree.sharing
        row = {
            "separate_tokens": sharing.num_separate_tokens,
            "tree_tokens": sharing.num_tokens,
            "tokens_saved": sharing.saved_fraction(token=1.0),
            "attention_saved": sharing.saved_fraction(pair=1.0),
            "flops_saved": tree.flops_saved,
            "separate_seconds": apart.seconds,
            "tree_seconds": tree.seconds,
            "speedup": apart.seconds / tree.seconds,
            "gradient_norm_difference": abs(tree.grad_norm - apart.grad_norm) / apart.grad_norm,
        }
        rows[name] = row
        print(
            f"{name:20} {row['separate_tokens']:7} -> {row['tree_tokens']:5} {row['tokens_saved']:6.1%} "
            f"{row['attention_saved']:6.1%} {row['flops_saved']:6.1%} "
            f"{apart.seconds:6.3f} -> {tree.seconds:5.3f} {row['speedup']:6.2f}x"
        )
    print(json.dumps({"benchmark": "shared_prefix", "short": arguments.short, "cases": rows}))


if __name__ == "__main__":
    main()
