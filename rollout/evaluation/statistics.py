"""Intervals for the mean score of tasks that are a sample of all tasks like them.

A task's value is the mean of its scores, and the mean of an evaluation is that of its tasks' values: samples of one
task are not independent, tasks are. `docs/evaluation_statistics.md` has what these intervals cover, by simulation,
beside others.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import NormalDist, fmean
from typing import Literal

import numpy as np
import numpy.typing as npt

CONFIDENCE = 0.95
UPPER = 0.5 + CONFIDENCE / 2
Z = NormalDist().inv_cdf(UPPER)
Z_ONE_SIDED = NormalDist().inv_cdf(CONFIDENCE)
SKEW_TASKS = 2.0
"""Imagined tasks that were all or nothing, by which the dispersion of few successes, or few failures, is corrected."""
SMALLEST = 1e-12
"""A variance below this is rounding."""

Array = npt.NDArray[np.float64]


def finite_mean(values: Sequence[float]) -> float:
    """The mean of one or more finite numbers, which is one, too, where no float holds their sum."""
    try:
        return fmean(values)
    except OverflowError:
        return math.fsum(value / len(values) for value in values)


@dataclass(frozen=True, kw_only=True, slots=True)
class Interval:
    """A mean with its 95 % interval."""

    mean: float
    low: float | None
    """None, as `high`, where there is no interval."""
    high: float | None
    method: Literal["wilson", "student", "combined", "none"]
    """`wilson`: for scores from 0 to 1. `student`: for others. `combined`: of several. `none`: other scores of one
    task, or that are all the same, say nothing of how far tasks lie apart."""


def interval(scores: Sequence[Sequence[float]]) -> Interval:
    """The interval for the mean over tasks, each an inner list of scores, in any order. Needs one task at least."""
    values = np.sort(np.array([fmean(task) for task in scores], dtype=np.float64))
    mean = math.fsum(values) / len(values)
    if all(0 <= score <= 1 for task in scores for score in task):
        low, high = (float(bound) for bound in wilson_interval(values))
        return Interval(mean=mean, low=min(low, mean), high=max(high, mean), method="wilson")
    if len(values) < 2 or np.ptp(values) < SMALLEST:
        return Interval(mean=mean, low=None, high=None, method="none")
    half = student_quantile(len(values) - 1) * float(values.std(ddof=1)) / math.sqrt(len(values))
    return Interval(mean=mean, low=mean - half, high=mean + half, method="student")


def wilson_interval(values: Array) -> tuple[Array, Array]:
    """Wilson's interval for the mean of values of tasks from 0 to 1, over as many tasks as their spread is worth.

    `values` has the tasks in its last axis; those before it are as many evaluations. For tasks that are all or nothing
    it is Wilson's interval of their number (Wilson 1927; Brown, Cai, DasGupta 2001, equation 4). Values between lie
    closer together, by the dispersion

        phi = sum (v - m)^2 / (C m (1 - m)),

    so that C tasks are worth C / phi; of this the effective sample size of surveys is made (Korn and Graubard 1998;
    Franco, Little, Louis, Slud 2019). As phi is itself estimated, two things are corrected, each measured in
    docs/evaluation_statistics.md:
    - from few tasks, by Student's t: z^2 is replaced by t^2 with C - 1 degrees of freedom to the extent 1 - phi, as of
      tasks that are all or nothing the spread is known;
    - from few tasks that success, or failure, comes from, since rare large ones may not have been seen. Success comes
      from K1 = (sum v)^2 / sum v^2 of the tasks (Kish 1965), failure from K0 of them, alike of 1 - v. phi has the
      weight of 4 / (1 / K1 + 1 / K0) tasks, and beside them 2 (1 - 2m)^2 (1 - K / C) are imagined that were all or
      nothing, K being the smaller of the two: none where all tasks have their part in it.
    Where nothing is spread phi is 1.
    Near 0 and 1 Wilson's limit on the inner side covers as little as 83 %. There it gives way to the limit for rare
    events, to the extent 1 - 2m (Brown, Cai, DasGupta 2001, section 4.1.1, who do so for the smallest counts).
    """
    num_tasks = values.shape[-1]
    mean = values.mean(axis=-1)
    variance = mean * (1 - mean)
    spread = ((values - mean[..., None]) ** 2).mean(axis=-1)
    is_spread = spread > SMALLEST
    phi = np.where(is_spread, np.clip(spread / np.where(is_spread, variance, 1.0), 0.0, 1.0), 1.0)
    successes, failures = _contributing(values), _contributing(1 - values)
    both = successes + failures
    weight = 4 * successes * failures / np.where(both > 0, both, 1.0)
    unseen = 1 - np.minimum(successes, failures) / num_tasks
    skew = np.where(is_spread, SKEW_TASKS * (1 - 2 * mean) ** 2 * unseen, 1.0)
    dispersion = (weight * phi + skew) / (weight + skew)
    quantile = Z**2 + (1 - phi) * (student_quantile(num_tasks - 1) ** 2 - Z**2 if num_tasks > 1 else 0.0)
    num_effective = num_tasks / dispersion * Z**2 / quantile
    low, high = _wilson(mean, num_effective)
    rare_low = _rare(num_effective * mean) / num_effective
    rare_high = 1 - _rare(num_effective * (1 - mean)) / num_effective
    low = low - np.clip(1 - 2 * mean, 0.0, 1.0) * np.maximum(low - rare_low, 0.0)
    high = high + np.clip(2 * mean - 1, 0.0, 1.0) * np.maximum(rare_high - high, 0.0)
    return np.clip(np.where(mean > 0, low, 0.0), 0.0, mean), np.clip(np.where(mean < 1, high, 1.0), mean, 1.0)


def mean_interval(parts: Sequence[Interval]) -> Interval:
    """The interval for the mean of independent means, such as of the entries of a suite, which count the same.

    MOVER, the method of variance estimates recovery (Zou and Donner 2008, equations 1 and 2): the distances from each
    mean to its limit are added as standard errors are,

        L = mean(m) - sqrt(sum (m_i - l_i)^2) / k

    and so for U, so that limits may lie unevenly about a mean. Without an interval where a part has none.
    """
    mean = math.fsum(part.mean for part in parts) / len(parts)
    if len(parts) == 1:
        return parts[0]
    below, above = 0.0, 0.0
    for part in parts:
        if part.low is None or part.high is None:
            return Interval(mean=mean, low=None, high=None, method="none")
        below += (part.mean - part.low) ** 2
        above += (part.high - part.mean) ** 2
    return Interval(
        mean=mean,
        low=mean - math.sqrt(below) / len(parts),
        high=mean + math.sqrt(above) / len(parts),
        method="combined",
    )


def student_quantile(degrees: int, level: float = UPPER) -> float:
    """A quantile of Student's t, by default the 97.5 % one.

    Exact for one and two degrees of freedom; else the Cornish-Fisher expansion of Abramowitz and Stegun, 26.7.5.
    """
    assert degrees >= 1
    if degrees == 1:
        return math.tan(math.pi * (level - 0.5))
    if degrees == 2:
        return (2 * level - 1) * math.sqrt(2 / (4 * level * (1 - level)))
    z = NormalDist().inv_cdf(level)
    g1 = (z**3 + z) / 4
    g2 = (5 * z**5 + 16 * z**3 + 3 * z) / 96
    g3 = (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384
    g4 = (79 * z**9 + 776 * z**7 + 1482 * z**5 - 1920 * z**3 - 945 * z) / 92160
    return z + g1 / degrees + g2 / degrees**2 + g3 / degrees**3 + g4 / degrees**4


def _wilson(mean: Array, num_trials: Array) -> tuple[Array, Array]:
    scale = 1 + Z**2 / num_trials
    centre = (mean + Z**2 / (2 * num_trials)) / scale
    half = Z * np.sqrt(mean * (1 - mean) / num_trials + Z**2 / (4 * num_trials**2)) / scale
    return centre - half, centre + half


def _contributing(values: Array) -> Array:
    """From how many tasks the sum over the last axis comes: all of them where they are alike, 0 of zeros."""
    total, squares = values.sum(axis=-1), (values**2).sum(axis=-1)
    return np.where(squares > SMALLEST, total**2 / np.maximum(squares, SMALLEST), 0.0)


def _rare(count: Array) -> Array:
    """The one-sided lower 95 % limit of the rate behind a rare count: Byar's approximation (Breslow and Day 1987)."""
    count = np.maximum(count, SMALLEST)
    root = 1 - 1 / (9 * count) - Z_ONE_SIDED / (3 * np.sqrt(count))
    return count * np.maximum(root, 0.0) ** 3
