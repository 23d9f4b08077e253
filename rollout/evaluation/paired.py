"""How far two policies are apart on the same tasks: the test, the interval and what could have been found."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from polyturn.rollout.evaluation.statistics import SMALLEST, student_quantile

POWER = 0.8
MAX_ENUMERATED = 16
"""Up to so many tasks that differ the test goes through all their signs, beyond it draws some."""
NUM_DRAWS = 20_000
ROWS_AT_ONCE = 2_000
SAME = 1e-9
"""Two sums whose difference is so small a part of all differences are tied."""

Array = npt.NDArray[np.float64]


def sign_flip_p_value(differences: Array, *, num_draws: int = NUM_DRAWS) -> float:
    """The two-sided mid-p-value that differences of tasks, each with its weight, have no direction.

    Were the two policies alike, each task's difference could as well have had the other sign. p is the share of all
    choices of signs whose sum lies further from 0 than what was measured, and half of those that lie as far
    (Fisher 1935, section 21; Lancaster 1961 for the half). For scores of 0 and 1, one sample of each task, it is
    McNemar's mid-p test (Fagerland, Lydersen, Laake 2013). With many tasks signs are drawn, always the same ones.
    """
    sizes = np.sort(np.abs(differences[np.abs(differences) > SMALLEST]))
    if not len(sizes):
        return 1.0
    measured, tie = abs(math.fsum(differences)), SAME * math.fsum(sizes)
    if len(sizes) <= MAX_ENUMERATED:
        sums = np.zeros(1)
        for size in sizes:
            sums = np.concatenate([sums - size, sums + size])
        return float(np.mean(_beyond(np.abs(sums) - measured, tie)))
    rng, total = np.random.default_rng(0), 0.5
    for start in range(0, num_draws, ROWS_AT_ONCE):
        num_rows = min(ROWS_AT_ONCE, num_draws - start)
        drawn = np.frombuffer(rng.bytes(num_rows * math.ceil(len(sizes) / 8)), dtype=np.uint8)
        signs = 2.0 * np.unpackbits(drawn.reshape(num_rows, -1), axis=1, count=len(sizes)) - 1
        total += float(_beyond(np.abs(signs @ sizes) - measured, tie).sum())
    return total / (num_draws + 1)


def _beyond(excess: Array, tie: float) -> Array:
    return np.where(excess > tie, 1.0, np.where(excess >= -tie, 0.5, 0.0))


@dataclass(frozen=True, kw_only=True, slots=True)
class Effect:
    """A mean difference and how exactly it is known."""

    mean: float
    error: float
    """The standard error; 0 where nothing is known of how far scores lie apart."""
    degrees: int
    """Of freedom of Student's t."""

    @property
    def interval(self) -> tuple[float, float] | None:
        """The 95 % interval."""
        if self.error == 0:
            return None
        half = student_quantile(self.degrees) * self.error
        return self.mean - half, self.mean + half

    @property
    def minimal_detectable(self) -> float | None:
        """The true difference that a two-sided test at 5 % finds with 80 % power, were the errors as here.

        (t(0.975) + t(0.8)) times the standard error (Bloom 1995).
        """
        if self.error == 0:
            return None
        return (student_quantile(self.degrees) + student_quantile(self.degrees, POWER)) * self.error


def effect_of(differences: Array, *, scale: float) -> Effect:
    """The mean of the differences of tasks; `scale` is the largest that a difference can be."""
    mean = math.fsum(differences) / len(differences)
    error = float(standard_error(np.sort(differences), scale=scale))
    return Effect(mean=mean, error=error, degrees=max(len(differences) - 1, 1))


def standard_error(differences: Array, *, scale: float = 1.0) -> Array:
    """Of the mean over the last axis, with half a task gained and half a task lost imagined beside those measured.

        se^2 = (sum (d - mean)^2 + delta) / (C (C + 1)),   delta = scale sqrt(sum d^4 / sum d^2)

    For differences of -1, 0 and 1 that is the interval of Bonett and Price 2012 with half of their two imagined tasks:
    without any, tasks that are all alike would leave no doubt. Where all differences are small the imagined ones are
    smaller, too.
    """
    num_tasks = differences.shape[-1]
    squares, fourths = (differences**2).sum(axis=-1), (differences**4).sum(axis=-1)
    is_apart = squares > SMALLEST
    largest = np.where(is_apart, np.sqrt(fourths / np.where(is_apart, squares, 1.0)), scale)
    mean = differences.mean(axis=-1)
    spread = np.maximum(squares - num_tasks * mean**2, 0.0) + scale * largest
    return np.sqrt(spread / (num_tasks * (num_tasks + 1)))


def mean_effect(effects: Sequence[Effect]) -> Effect:
    """The mean of independent effects, such as of the entries of a suite, by Welch and Satterthwaite."""
    variances = [effect.error**2 for effect in effects]
    mean = math.fsum(effect.mean for effect in effects) / len(effects)
    if not all(variances):
        return Effect(mean=mean, error=0.0, degrees=1)
    over = math.fsum(
        variance**2 / effect.degrees for variance, effect in zip(variances, effects, strict=True)
    )
    return Effect(
        mean=mean,
        error=math.sqrt(math.fsum(variances)) / len(effects),
        degrees=max(int(math.fsum(variances) ** 2 / over), 1),
    )


def holm(p_values: Sequence[float]) -> list[float]:
    """Adjusted so that the chance of any false finding among all is at most the level (Holm 1979), in their order."""
    order = sorted(range(len(p_values)), key=lambda place: p_values[place])
    adjusted, largest = [0.0] * len(p_values), 0.0
    for rank, place in enumerate(order):
        largest = max(largest, min(1.0, (len(p_values) - rank) * p_values[place]))
        adjusted[place] = largest
    return adjusted
