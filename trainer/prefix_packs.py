"""Which samples share a micro-batch and a rank, where prefixes are to be computed once."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from polyturn.configs.schema.trainer import BalanceConfig, SharedPrefix
from polyturn.trainer.balance import balance
from polyturn.trainer.batch import TrainSample, split_over_ranks
from polyturn.trainer.prefix_tree import MIN_SHARED, Tokens, prefix_order

Split = Callable[[Sequence[TrainSample], int, BalanceConfig | None], list[list[TrainSample]]]


@dataclass(frozen=True, kw_only=True, slots=True)
class Cluster:
    """Samples that share prefixes with each other."""

    samples: tuple[TrainSample, ...]
    num_tokens: int
    """Of their tree, at most."""


def rank_split(shared_prefix: SharedPrefix) -> Split:
    """How samples are shared out over ranks."""
    return split_over_ranks if shared_prefix == "off" else split_by_prefix


def prefix_keys(samples: Sequence[TrainSample]) -> list[Tokens]:
    """For each sample a number per token, equal where the tokens may be computed once: the token ids.

    Where the experts of tokens are replayed, equal tokens that were sent to different ones are different.
    """
    if all(sample.routed_experts is None for sample in samples):
        return [sample.token_ids for sample in samples]
    (width,) = {sample.routed_experts.shape[1] for sample in samples if sample.routed_experts is not None}
    nowhere = np.full((1, width), -1, dtype=np.int16)
    rows = [
        np.broadcast_to(nowhere, (len(sample), width))
        if sample.routed_experts is None
        else sample.routed_experts
        for sample in samples
    ]
    routing = np.ascontiguousarray(np.concatenate(rows), dtype=np.int16)
    _, ways = np.unique(routing.view(np.dtype((np.void, 2 * width))).ravel(), return_inverse=True)
    tokens = np.concatenate([sample.token_ids for sample in samples])
    _, keys = np.unique(ways.astype(np.int64) * (int(tokens.max()) + 1) + tokens, return_inverse=True)
    return np.split(keys.astype(np.int64), np.cumsum([len(sample) for sample in samples])[:-1])


def prefix_clusters(samples: Sequence[TrainSample], max_tokens: int) -> list[Cluster]:
    """Gather samples with a common prefix, up to `max_tokens` tokens with the prefix counted once.

    A sample that is longer than that is a cluster of its own.
    """
    order, shared = prefix_order(prefix_keys(samples))
    clusters: list[Cluster] = []
    members: list[TrainSample] = []
    num_tokens = 0
    for index, common in zip(order, shared, strict=True):
        sample = samples[index]
        # A tree repeats runs that are too short for a node, so this many tokens are shared for certain.
        certain = max(common - MIN_SHARED + 1, 0)
        if members and (certain == 0 or num_tokens + len(sample) - certain > max_tokens):
            clusters.append(Cluster(samples=tuple(members), num_tokens=num_tokens))
            members, num_tokens = [], 0
        num_tokens += len(sample) - (certain if members else 0)
        members.append(sample)
    if members:
        clusters.append(Cluster(samples=tuple(members), num_tokens=num_tokens))
    return clusters


def pack_by_prefix(samples: Sequence[TrainSample], max_tokens: int) -> list[list[TrainSample]]:
    """As `pack`, but samples with a common prefix stay together, and the limit is on the tokens of their tree."""
    packs: list[list[TrainSample]] = []
    free: list[int] = []
    for cluster in sorted(prefix_clusters(samples, max_tokens), key=lambda each: -each.num_tokens):
        fit = next((i for i, room in enumerate(free) if room >= cluster.num_tokens), None)
        if fit is None:
            packs.append(list(cluster.samples))
            free.append(max_tokens - cluster.num_tokens)
        else:
            packs[fit].extend(cluster.samples)
            free[fit] -= cluster.num_tokens
    return packs


def split_by_prefix(
    samples: Sequence[TrainSample], num_ranks: int, config: BalanceConfig | None = None
) -> list[list[TrainSample]]:
    """As `split_over_ranks`, but samples with a common prefix stay together as far as the balance allows.

    Clusters are cut into ever smaller parts, down to single samples; what counts is the most loaded rank.
    """
    by_tokens = BalanceConfig(method=(config or BalanceConfig()).method)
    total = sum(len(sample) for sample in samples)
    best: tuple[int, list[list[TrainSample]]] | None = None
    for limit in (total, total // num_ranks, total // (2 * num_ranks), total // (4 * num_ranks), 0):
        clusters = prefix_clusters(samples, limit)
        if len(clusters) < num_ranks and limit > 0:
            continue
        costs = [cluster.num_tokens for cluster in clusters]
        shares = balance(costs, num_ranks, by_tokens)
        load = max(sum(costs[i] for i in share) for share in shares)
        if best is None or load < best[0]:
            best = load, [[sample for i in share for sample in clusters[i].samples] for share in shares]
    assert best is not None
    return best[1]
