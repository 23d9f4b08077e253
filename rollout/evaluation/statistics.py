"""Intervals for the mean score of an evaluation."""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import NormalDist, fmean
from typing import Literal

CONFIDENCE = 0.95
Z = NormalDist().inv_cdf(0.5 + CONFIDENCE / 2)


def wilson_interval(num_successes: float, num_trials: int) -> tuple[float, float]:
    """Wilson's score interval for a proportion (Wilson 1927; Brown, Cai, DasGupta 2001, equation 4)."""
    share = num_successes / num_trials
    scale = 1 + Z**2 / num_trials
    centre = (share + Z**2 / (2 * num_trials)) / scale
    half = Z * math.sqrt(share * (1 - share) / num_trials + Z**2 / (4 * num_trials**2)) / scale
    # Clamped to the share itself: at 0 and 1 rounding could put it just outside.
    return min(max(0.0, centre - half), share), max(min(1.0, centre + half), share)


def clustered_interval(scores: Sequence[Sequence[float]]) -> tuple[float, float]:
    """An interval for the mean of all scores, where the scores of one task (an inner list) belong together.

    The cluster-robust standard error of Miller 2024 (arXiv 2411.00640, section 2.2),

        se = sqrt(sum over tasks c of (sum over i of (s_ci - mean))^2) / n

    with the small-sample factor sqrt(C / (C - 1)) and Student's t with C - 1 degrees of freedom for C tasks (Cameron
    and Miller 2015, section VI). Samples of one task are not independent: an interval that takes them for so is far too
    narrow. Needs two tasks at least.
    """
    num_tasks = len(scores)
    assert num_tasks >= 2, "an interval over tasks needs two of them"
    flat = [score for task in scores for score in task]
    mean = fmean(flat)
    residuals = (sum(score - mean for score in task) for task in scores)
    error = math.sqrt(sum(residual**2 for residual in residuals) * num_tasks / (num_tasks - 1)) / len(flat)
    half = student_quantile(num_tasks - 1) * error
    return mean - half, mean + half


def student_quantile(degrees: int) -> float:
    """The 97.5 % quantile of Student's t.

    Exact for one and two degrees of freedom; else the Cornish-Fisher expansion of Abramowitz and Stegun, 26.7.5.
    """
    upper = 0.5 + CONFIDENCE / 2
    if degrees == 1:
        return math.tan(math.pi * (upper - 0.5))
    if degrees == 2:
        return (2 * upper - 1) * math.sqrt(2 / (4 * upper * (1 - upper)))
    g1 = (Z**3 + Z) / 4
    g2 = (5 * Z**5 + 16 * Z**3 + 3 * Z) / 96
    g3 = (3 * Z**7 + 19 * Z**5 + 17 * Z**3 - 15 * Z) / 384
    g4 = (79 * Z**9 + 776 * Z**7 + 1482 * Z**5 - 1920 * Z**3 - 945 * Z) / 92160
    return Z + g1 / degrees + g2 / degrees**2 + g3 / degrees**3 + g4 / degrees**4


def interval(
    scores: Sequence[Sequence[float]],
) -> tuple[float, float, Literal["wilson", "clustered", "none"]]:
    """Wilson's interval for one binary score per task, else one clustered by task.

    Scores of 0 and 1 that are all the same have no spread to estimate an error from: there too Wilson's
    interval over the tasks, which are independent, holds.
    """
    flat = [score for task in scores for score in task]
    is_binary = all(score in (0.0, 1.0) for score in flat)
    if is_binary and (len(flat) == len(scores) or len(set(flat)) == 1 or len(scores) == 1):
        return *wilson_interval(fmean(flat) * len(scores), len(scores)), "wilson"
    if len(scores) == 1:
        mean = fmean(flat)
        return mean, mean, "none"
    low, high = clustered_interval(scores)
    if all(0.0 <= score <= 1.0 for score in flat):
        low, high = max(0.0, low), min(1.0, high)
    return low, high, "clustered"
