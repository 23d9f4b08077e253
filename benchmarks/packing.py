"""Packing and balance: how full micro-batches are, how even ranks are, and what padding would have cost.

Lengths are log-normal, cut at the longest, as multi-turn episodes' are. Packs are first fit, the longest first; padding
is to the longest of each micro-batch of a fixed number of samples, in their order and sorted by length.
"""

from __future__ import annotations

import argparse
import json
import random
import time
from collections.abc import Sequence

import numpy as np

from polyturn.configs.schema.trainer import BalanceConfig
from polyturn.trainer.data.balance import balance, pack
from polyturn.trainer.data.samples import TrainSample


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, epilog="example: packing.py --ranks 16")
    parser.add_argument("--samples", type=int, default=1024, help="samples of an update")
    parser.add_argument("--ranks", type=int, default=8, help="data-parallel ranks")
    parser.add_argument("--max-tokens", type=int, default=16384, help="tokens of a micro-batch")
    parser.add_argument("--longest", type=int, default=16384, help="tokens of the longest sample")
    parser.add_argument("--short", action="store_true", help="256 samples")
    return parser.parse_args()


def make_sample(length: int, name: str) -> TrainSample:
    return TrainSample(
        sample_id=name,
        group_id=name,
        sequence_id=name,
        token_ids=np.zeros(length, dtype=np.int64),
        sampled=np.arange(length) > 0,
        behavior_logprobs=np.zeros(length, dtype=np.float32),
        policy_versions=np.zeros(length, dtype=np.int32),
        turns=np.zeros(length, dtype=np.int32),
    )


def padded_tokens(lengths: Sequence[int], max_tokens: int) -> int:
    """Positions of padded micro-batches: each takes samples, in their order, while they fit at their longest."""
    total = longest = count = 0
    for length in lengths:
        if count and max(longest, length) * (count + 1) > max_tokens:
            total += longest * count
            longest = count = 0
        longest, count = max(longest, length), count + 1
    return total + longest * count


def main() -> None:
    arguments = parse_arguments()
    if arguments.short:
        arguments.samples = 256
    rng = random.Random(0)
    lengths = [
        max(min(int(rng.lognormvariate(8, 0.8)), arguments.longest), 64) for _ in range(arguments.samples)
    ]
    num_tokens = sum(lengths)
    started = time.process_time()
    packs = pack([make_sample(length, str(i)) for i, length in enumerate(lengths)], arguments.max_tokens)
    pack_seconds = time.process_time() - started
    efficiency = {
        "packs: tokens / room": num_tokens / (len(packs) * arguments.max_tokens),
        "packs: tokens / positions": 1.0,
        "padded, in order": num_tokens / padded_tokens(lengths, arguments.max_tokens),
        "padded, sorted": num_tokens / padded_tokens(sorted(lengths), arguments.max_tokens),
    }
    fewest = -(-num_tokens // arguments.max_tokens)
    print(
        f"{arguments.samples} samples, {num_tokens} tokens: {len(packs)} packs, at least {fewest} are needed"
    )
    for name, share in efficiency.items():
        print(f"{name:>28} {share:>7.1%}")
    shares: dict[str, dict[str, float]] = {}
    print(f"{'balance over ' + str(arguments.ranks) + ' ranks':>28} {'most / mean':>12} {'seconds':>8}")
    for method in ("in order", "greedy", "karmarkar_karp"):
        started = time.process_time()
        if method == "in order":
            bins = [list(range(rank, len(lengths), arguments.ranks)) for rank in range(arguments.ranks)]
        else:
            bins = balance(lengths, arguments.ranks, BalanceConfig.model_validate({"method": method}))
        seconds = time.process_time() - started
        loads = [sum(lengths[index] for index in share) for share in bins]
        shares[method] = {"most_over_mean": max(loads) * len(loads) / num_tokens, "seconds": seconds}
        print(f"{method:>28} {shares[method]['most_over_mean']:>12.5f} {seconds:>8.3f}")
    figures = {
        "benchmark": "packing",
        "num_packs": len(packs),
        "fewest_packs": fewest,
        "pack_seconds": pack_seconds,
        "efficiency": efficiency,
        "balance": shares,
    }
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
