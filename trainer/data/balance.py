"""How samples are shared out: a step over its updates, an update over the data-parallel ranks, a rank's share over
micro-batches; by cost, and with samples that share prefixes together where these are computed once.
"""

from __future__ import annotations

import heapq
import itertools
from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np

from polyturn.configs.schema.trainer import BalanceConfig, SharedPrefix
from polyturn.trainer.data.prefix_tree import MIN_SHARED, Tokens, prefix_order
from polyturn.trainer.data.samples import TrainSample, Update, count_samples

Cluster = tuple[list[TrainSample], int]
"""Samples that share prefixes with each other, and at most how many tokens their tree has."""
Partition = list[list[int]]
"""The indices of each bin's items."""


def balance(lengths: Sequence[int], num_bins: int, config: BalanceConfig) -> Partition:
    """Split sequences of these lengths into bins of like cost; their numbers may differ.

    Every bin gets one or more, unless there are fewer sequences than bins: then as many bins as lack one are empty. The
    result depends on the lengths and their order only.
    """
    costs = [sequence_cost(length, config.attention_tokens) for length in lengths]
    if not costs:
        return [[] for _ in range(num_bins)]
    return _fill_empty(METHODS[config.method](costs, num_bins), costs)


def sequence_cost(length: int, attention_tokens: int | None) -> float:
    """L (1 + L / A): linear layers cost L, causal attention grows with its square and is their equal at length A."""
    return float(length) if attention_tokens is None else length * (1 + length / attention_tokens)


def greedy(costs: Sequence[float], num_bins: int) -> Partition:
    """The costliest first, each to the lightest bin: at most 4/3 - 1/(3 k) of the best makespan (Graham 1969)."""
    bins: Partition = [[] for _ in range(num_bins)]
    lightest = [(0.0, number) for number in range(num_bins)]
    for index in _costliest_first(costs):
        load, number = heapq.heappop(lightest)
        bins[number].append(index)
        heapq.heappush(lightest, (load + costs[index], number))
    return bins


def karmarkar_karp(costs: Sequence[float], num_bins: int) -> Partition:
    """The largest differencing method (Karmarkar and Karp 1982), for any number of bins.

    Each item begins as a split of its own. The two most uneven splits are joined again and again, the heaviest bin of
    one with the lightest of the other, until one split is left.
    """
    splits = []
    for order, index in enumerate(_costliest_first(costs)):
        loads = [0.0] * (num_bins - 1) + [costs[index]]
        bins: Partition = [[] for _ in range(num_bins - 1)] + [[index]]
        splits.append((-costs[index], order, loads, bins))
    heapq.heapify(splits)
    for order in range(len(costs), 2 * len(costs) - 1):
        _, _, loads, bins = heapq.heappop(splits)
        _, _, other_loads, other_bins = heapq.heappop(splits)
        joined = sorted(
            ((loads[i] + other_loads[-1 - i], bins[i] + other_bins[-1 - i]) for i in range(num_bins)),
            key=lambda part: part[0],
        )
        loads, bins = [load for load, _ in joined], [indices for _, indices in joined]
        heapq.heappush(splits, (loads[0] - loads[-1], order, loads, bins))
    return splits[0][3]


METHODS: dict[str, Callable[[Sequence[float], int], Partition]] = {
    "greedy": greedy,
    "karmarkar_karp": karmarkar_karp,
}


def _costliest_first(costs: Sequence[float]) -> list[int]:
    return sorted(range(len(costs)), key=lambda index: -costs[index])


def _fill_empty(bins: Partition, costs: Sequence[float]) -> Partition:
    """Give each empty bin the cheapest item of the bin with the most: no bin becomes heavier than the heaviest was."""
    for number in range(len(bins)):
        crowded = max(bins, key=len)
        if not bins[number] and len(crowded) > 1:
            cheapest = min(crowded, key=lambda index: costs[index])
            crowded.remove(cheapest)
            bins[number].append(cheapest)
    return bins


def split_over_ranks(
    samples: Sequence[TrainSample],
    num_ranks: int,
    config: BalanceConfig | None = None,
    *,
    shared_prefix: SharedPrefix = "off",
) -> list[list[TrainSample]]:
    """Give every sample to one data-parallel rank, so that the ranks have work for like times.

    With fewer samples than ranks some ranks get none: they take part with micro-batches of padding.
    """
    if shared_prefix != "off":
        return _split_by_prefix(samples, num_ranks, config)
    shares = balance([len(sample) for sample in samples], num_ranks, config or BalanceConfig())
    return [[samples[index] for index in share] for share in shares]


def pack(samples: Sequence[TrainSample], max_tokens: int) -> list[list[TrainSample]]:
    """Gather samples into micro-batches of at most `max_tokens` tokens, by first fit, the longest first.

    A sample that is longer than that makes a micro-batch of its own: nothing is truncated.
    """
    return _first_fit([([sample], len(sample)) for sample in samples], max_tokens)


def pack_by_prefix(samples: Sequence[TrainSample], max_tokens: int) -> list[list[TrainSample]]:
    """As `pack`, but samples with a common prefix stay together, and the limit is on the tokens of their tree."""
    return _first_fit(_prefix_clusters(samples, max_tokens), max_tokens)


def _first_fit(clusters: Sequence[Cluster], max_tokens: int) -> list[list[TrainSample]]:
    packs: list[list[TrainSample]] = []
    free: list[int] = []
    for samples, num_tokens in sorted(clusters, key=lambda cluster: -cluster[1]):
        fit = next((i for i, left in enumerate(free) if left >= num_tokens), None)
        if fit is None:
            packs.append(list(samples))
            free.append(max_tokens - num_tokens)
        else:
            packs[fit].extend(samples)
            free[fit] -= num_tokens
    return packs


def split_packs(packs: Sequence[Sequence[TrainSample]], num_packs: int) -> list[list[TrainSample]]:
    """The same samples in `num_packs` micro-batches: halves the fullest until there are enough, then adds empty ones.

    Ranks whose packing came out shorter use it to make as many micro-batches as the others.
    """
    assert num_packs >= len(packs), f"{len(packs)} micro-batches cannot become {num_packs}"
    result = [list(samples) for samples in packs]
    while len(result) < num_packs:
        fullest = max(
            range(len(result)), key=lambda i: (len(result[i]) > 1, sum(map(len, result[i]))), default=-1
        )
        if fullest < 0 or len(result[fullest]) <= 1:
            result.append([])
        else:
            whole = result[fullest]
            result[fullest] = whole[::2]
            result.append(whole[1::2])
    return result


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


def _prefix_clusters(samples: Sequence[TrainSample], max_tokens: int) -> list[Cluster]:
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
            clusters.append((members, num_tokens))
            members, num_tokens = [], 0
        num_tokens += len(sample) - (certain if members else 0)
        members.append(sample)
    if members:
        clusters.append((members, num_tokens))
    return clusters


def _split_by_prefix(
    samples: Sequence[TrainSample], num_ranks: int, config: BalanceConfig | None = None
) -> list[list[TrainSample]]:
    """Samples with a common prefix stay together as far as the balance allows.

    Clusters are cut into ever smaller parts, down to single samples; what counts is the most loaded rank.
    """
    by_tokens = BalanceConfig(method=(config or BalanceConfig()).method)
    total = sum(len(sample) for sample in samples)
    best: tuple[int, list[list[TrainSample]]] | None = None
    for limit in (total, total // num_ranks, total // (2 * num_ranks), total // (4 * num_ranks), 0):
        clusters = _prefix_clusters(samples, limit)
        if len(clusters) < num_ranks and limit > 0:
            continue
        costs = [num_tokens for _, num_tokens in clusters]
        shares = balance(costs, num_ranks, by_tokens)
        load = max(sum(costs[i] for i in share) for share in shares)
        if best is None or load < best[0]:
            best = load, [[sample for i in share for sample in clusters[i][0]] for share in shares]
    assert best is not None
    return best[1]


def cut_into_updates(samples: Sequence[TrainSample], num_updates: int) -> list[Update]:
    """Cut a step into updates of whole sequences: all segments of an episode are in one.

    Denominators are taken here, from the whole update, before anything is split. With few samples some updates have
    none: they are skipped.
    """
    by_sequence: dict[str, list[TrainSample]] = {}
    for sample in samples:
        by_sequence.setdefault(sample.sequence_id, []).append(sample)
    sequences = list(by_sequence.values())
    bounds = [len(sequences) * index // num_updates for index in range(num_updates + 1)]
    updates = []
    for low, high in itertools.pairwise(bounds):
        update = tuple(sample for sequence in sequences[low:high] for sample in sequence)
        updates.append(Update(samples=update, counts=count_samples(update)))
    return updates


def share_out(
    updates: Sequence[Update],
    num_ranks: int,
    config: BalanceConfig | None = None,
    *,
    shared_prefix: SharedPrefix = "off",
) -> list[list[Update]]:
    """For each data-parallel rank its share of each update, which keeps the denominators of the whole one."""
    by_update = [
        [
            replace(update, samples=tuple(share))
            for share in split_over_ranks(update.samples, num_ranks, config, shared_prefix=shared_prefix)
        ]
        for update in updates
    ]
    return [list(shares) for shares in zip(*by_update, strict=True)]
