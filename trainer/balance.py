"""Fair shares: items of known cost given to bins, so that the fullest bin is as light as it can be."""

from __future__ import annotations

import heapq
from collections.abc import Callable, Sequence

from polyturn.configs.schema.trainer import BalanceConfig

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
