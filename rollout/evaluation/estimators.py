"""What k samples of one task are worth, estimated without bias from the n >= k that were scored."""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from functools import lru_cache
from math import comb
from statistics import fmean

import numpy as np

MAX_EXACT = 16
"""Samples of a task up to which majority@k goes through all subsets."""
NUM_DRAWS = 1_000


def pass_at_k(num_samples: int, num_successes: int, k: int) -> float:
    """The probability that at least one of k samples succeeds: 1 - C(n - c, k) / C(n, k).

    Chen et al. 2021 (arXiv 2107.03374, equation 1). Estimated instead as 1 - (1 - c/n)^k it would be biased.
    """
    assert 1 <= k <= num_samples and 0 <= num_successes <= num_samples
    return 1 - comb(num_samples - num_successes, k) / comb(num_samples, k)


def pass_all_k(num_samples: int, num_successes: int, k: int) -> float:
    """The probability that all k samples succeed, pass^k: C(c, k) / C(n, k).

    Yao et al. 2024 (tau-bench, arXiv 2406.12045, section 3).
    """
    assert 1 <= k <= num_samples and 0 <= num_successes <= num_samples
    return comb(num_successes, k) / comb(num_samples, k)


def majority_at_k(answers: Sequence[str | None], scores: Sequence[float], k: int) -> float:
    """The expected score of the answer that most of k samples give (Wang et al. 2022, arXiv 2203.11171).

    The expectation is over all C(n, k) subsets of the n samples and over the choice among answers that are tied, each
    of which is as likely: exact up to 16 samples and for k = n, else over 1,000 subsets that are drawn, the same in
    every call. A sample without an answer (None) has no vote; a subset without a vote scores what such samples score.
    An answer scores the mean of the samples that gave it.
    """
    assert len(answers) == len(scores) and 1 <= k <= len(answers)
    scores_of: dict[str | None, list[float]] = defaultdict(list)
    for answer, score in zip(answers, scores, strict=True):
        scores_of[answer].append(score)
    silent = scores_of.pop(None, [])
    given = sorted(scores_of.values(), key=len)
    chance_of = _chances(tuple(len(found) for found in given), len(silent), k)
    expected = math.fsum(chance_of[len(found)] * fmean(found) for found in given)
    if silent:
        expected += comb(len(silent), k) / comb(len(answers), k) * fmean(silent)
    # A mean of scores: rounding, or subsets that are drawn, could put it just outside of them.
    return min(max(expected, min(scores)), max(scores))


@lru_cache(maxsize=4096)
def _chances(counts: tuple[int, ...], num_silent: int, k: int) -> Mapping[int, float]:
    """The probability that an answer is chosen, by how often it was given; `counts` has that of each, ascending."""
    if k == sum(counts) + num_silent:
        return {count: (count == counts[-1]) / counts.count(counts[-1]) for count in counts}
    if sum(counts) + num_silent > MAX_EXACT:
        return _drawn_chances(counts, num_silent, k)
    num_subsets = comb(sum(counts) + num_silent, k)
    chances = {}
    for count in set(counts):
        others = list(counts)
        others.remove(count)
        favourable = math.fsum(
            comb(count, votes) * _beaten(others, num_silent, votes, k - votes)
            for votes in range(1, min(count, k) + 1)
        )
        chances[count] = favourable / num_subsets
    return chances


def _drawn_chances(counts: tuple[int, ...], num_silent: int, k: int) -> Mapping[int, float]:
    """The same over subsets that are drawn."""
    rng = np.random.default_rng(0)
    votes = rng.multivariate_hypergeometric([*counts, num_silent], k, size=NUM_DRAWS)[:, :-1]
    most = votes.max(axis=1, keepdims=True)
    won = (votes == most) & (most > 0)
    shares = (won / np.maximum(won.sum(axis=1, keepdims=True), 1)).mean(axis=0)
    return {count: float(shares[np.array(counts) == count].mean()) for count in set(counts)}


def _beaten(others: Sequence[int], num_silent: int, votes: int, num_left: int) -> float:
    """Ways to draw `num_left` of the others with none above `votes`; one with t others at `votes` is 1 / (t + 1)."""
    ways: Counter[tuple[int, int]] = Counter({(0, 0): 1})
    for count in others:
        longer: Counter[tuple[int, int]] = Counter()
        for (drawn, tied), number in ways.items():
            for more in range(min(count, votes, num_left - drawn) + 1):
                longer[drawn + more, tied + (more == votes)] += number * comb(count, more)
        ways = longer
    return sum(
        number * comb(num_silent, num_left - drawn) / (tied + 1) for (drawn, tied), number in ways.items()
    )
