"""Intervals hold the true score as often as they say, and the paired test finds no more than it says.

The simulation is that of `benchmarks/evaluation_statistics.py`, whose figures docs/evaluation_statistics.md has.
"""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from statistics import fmean
from types import ModuleType

import numpy as np
import pytest

from polyturn.rollout.evaluation.statistics import (
    Interval,
    interval,
    mean_interval,
    student_quantile,
    wilson_interval,
)

BENCHMARK = Path(__file__).resolve().parents[3] / "benchmarks" / "evaluation_statistics.py"


@pytest.fixture(scope="module")
def simulation() -> ModuleType:
    spec = importlib.util.spec_from_file_location("evaluation_statistics", BENCHMARK)
    assert spec is not None and spec.loader is not None
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_intervals_cover_what_they_say(simulation: ModuleType) -> None:
    """For 5 to 200 tasks, scores near 0 and 1, samples that are unequal, correlated, or no yes and no."""
    methods = {
        "ours": simulation.ours,
        "all samples": simulation.all_samples,
        "t": simulation.clustered_student,
    }
    cells = list(simulation.coverage_cells(400, methods=methods))
    ordinary = [cell for cell in cells if not cell.is_rare]
    assert {cell.num_tasks for cell in ordinary} == {10, 20, 50, 200}
    for cell in ordinary:
        assert 0.91 < cell.covered["ours"] < 0.99, cell
    for design in simulation.DESIGNS:
        for num_tasks in (10, 20, 50, 200):
            covered = [
                c.covered["ours"] for c in ordinary if (c.design, c.num_tasks) == (design.name, num_tasks)
            ]
            assert 0.925 < fmean(covered) < 0.975, (design.name, num_tasks)
    assert min(cell.covered["ours"] for cell in cells) > 0.92, (
        "of rare successes too much is covered, never too little"
    )
    assert min(cell.covered["t"] for cell in cells) < 0.2
    assert min(cell.covered["all samples"] for cell in ordinary) < 0.5


@pytest.mark.parametrize("num_tasks", [1, 2, 5, 200])
def test_all_or_nothing_leaves_doubt(num_tasks: int) -> None:
    """Of scores that are all 0 or all 1 the interval ends there, as Wilson's of so many tasks, whatever the samples."""
    upper = 1.959964**2 / (num_tasks + 1.959964**2)
    zero, one = interval([[0.0] * 8] * num_tasks), interval([[1.0] * 8] * num_tasks)
    assert (zero.low, zero.high) == pytest.approx((0.0, upper)) and zero.mean == 0
    assert (one.low, one.high) == pytest.approx((1 - upper, 1.0)) and one.mean == 1


def test_wilson_against_published_values() -> None:
    """Newcombe 1998 (Statistics in Medicine 17:857), table I, method 3; the outer limits, and the inner far from 0."""

    def of(successes: int, trials: int) -> tuple[float | None, float | None]:
        found = interval([[1.0]] * successes + [[0.0]] * (trials - successes))
        return found.low, found.high

    assert of(81, 263) == pytest.approx((0.2553, 0.3662), abs=3e-3)
    assert of(15, 148)[1] == pytest.approx(0.1605, abs=1e-4)
    assert of(0, 20) == pytest.approx((0.0, 0.1611), abs=1e-4)
    assert of(29, 29) == pytest.approx((0.8830, 1.0), abs=1e-4)


def test_scores_that_lie_near_0_and_1_and_are_neither_are_covered(simulation: ModuleType) -> None:
    """Of few that succeed little shows in the others: who takes their spread as it is covers as little as 16 %."""
    methods = {"ours": simulation.ours, "t": simulation.clustered_student}
    cells = list(simulation.coverage_cells(400, designs=simulation.SKEWED, methods=methods))
    for design in simulation.SKEWED:
        for num_tasks in simulation.NUM_TASKS:
            covered = [
                c.covered["ours"] for c in cells if (c.design, c.num_tasks) == (design.name, num_tasks)
            ]
            assert min(covered) > 0.83 and 0.91 < fmean(covered) < 0.985, (design.name, num_tasks)
    assert min(cell.covered["t"] for cell in cells) < 0.3


@pytest.mark.parametrize("num_tasks", [5, 10, 20, 50])
def test_where_few_succeed_no_interval_of_this_floor_covers_much_less(
    simulation: ModuleType, num_tasks: int
) -> None:
    """Counts of few tasks leave no coverage near 95 % to some true scores."""
    truth, covered = simulation.exact_coverage(num_tasks, (0.0, 0.05))
    bound = simulation.least_average(num_tasks, truth, covered.min())
    assert 0.95 < bound <= covered.mean() < bound + 0.01
    # One task, true scores under 5 %: 0 of 1 is held, or 1 is, too.
    few = np.array([0.01, 0.02])
    assert simulation.least_average(1, few, 0.9) == pytest.approx(0.985)
    assert simulation.least_average(1, few, 0.985) == pytest.approx((0.99 + 1.0) / 2)


def test_no_true_score_is_missed_by_far() -> None:
    """All counts of all-or-nothing tasks, exactly: Wilson's own interval covers some true scores 83 %."""
    for num_tasks, least in ((5, 0.90), (10, 0.915), (20, 0.925), (50, 0.93), (200, 0.93)):
        counts = np.arange(num_tasks + 1)
        low, high = wilson_interval((np.arange(num_tasks) < counts[:, None]).astype(float))
        truths = (np.arange(500) + 0.5) / 500
        log_ways = np.array(
            [
                sum(np.log(np.arange(1, num_tasks + 1)))
                - sum(np.log(np.arange(1, c + 1)))
                - sum(np.log(np.arange(1, num_tasks - c + 1)))
                for c in counts
            ]
        )
        chances = np.exp(
            log_ways[:, None]
            + counts[:, None] * np.log(truths)
            + (num_tasks - counts)[:, None] * np.log(1 - truths)
        )
        covered = (chances * ((low[:, None] <= truths) & (truths <= high[:, None]))).sum(axis=0)
        assert covered.min() > least and 0.95 < covered.mean() < 0.965, num_tasks


def test_student_quantiles_against_tables() -> None:
    table = {1: 12.7062, 2: 4.3027, 3: 3.1824, 4: 2.7764, 5: 2.5706, 10: 2.2281, 30: 2.0423, 99: 1.9842}
    for degrees, value in table.items():
        assert student_quantile(degrees) == pytest.approx(value, rel=3e-3)
    assert student_quantile(1, 0.8) == pytest.approx(1.3764, abs=1e-4)
    assert student_quantile(10, 0.8) == pytest.approx(0.8791, abs=1e-4)


def test_scores_beyond_0_and_1_have_the_interval_of_student() -> None:
    """By hand: the means 1 and 3 of two tasks, 12.7062 standard errors of 1."""
    found = interval([[0.0, 2.0], [3.0]])
    assert (found.mean, found.method) == (2.0, "student")
    assert (found.low, found.high) == pytest.approx((2 - 12.7062, 2 + 12.7062))
    for scores in ([[2.0]], [[2.0], [2.0]]):
        assert (interval(scores).low, interval(scores).method) == (None, "none"), (
            "nothing tells how far they lie apart"
        )


def test_of_several_entries_limits_add_up_as_errors_do() -> None:
    parts = [
        Interval(mean=0.5, low=0.2, high=0.9, method="wilson"),
        Interval(mean=0.9, low=0.5, high=1.0, method="wilson"),
    ]
    found = mean_interval(parts)
    assert (found.mean, found.low, found.high) == pytest.approx((0.7, 0.7 - 0.25, 0.7 + 0.17**0.5 / 2))
    assert mean_interval([*parts, Interval(mean=2.0, low=None, high=None, method="none")]).low is None
    rng, held = np.random.default_rng(0), []
    for _ in range(500):
        counts = [
            (rng.random((size, 1)) < truth).tolist() for size, truth in ((20, 0.3), (40, 0.5), (30, 0.7))
        ]
        whole = mean_interval([interval([[float(x)] for [x] in entry]) for entry in counts])
        assert whole.low is not None and whole.high is not None
        held.append(whole.low <= 0.5 <= whole.high)
    assert 0.93 < fmean(held) < 0.98


def test_the_paired_test_keeps_its_size(simulation: ModuleType) -> None:
    found = list(simulation.sizes(400, num_draws=400))
    assert max(rates["ours"] for _, _, rates in found) < 0.075
    enough = [
        rates["ours"]
        for design, num_tasks, rates in found
        if num_tasks == 200 or (num_tasks == 50 and "tenth" not in design)
    ]
    assert 0.04 < fmean(enough) < 0.06 and min(enough) > 0.025
    assert min(rates["unpaired"] for _, num_tasks, rates in found if num_tasks == 200) < 0.01, (
        "who does not pair finds less"
    )


def test_intervals_of_differences_cover_what_they_say(simulation: ModuleType) -> None:
    for design, num_tasks, held in simulation.difference_coverage(1_500):
        assert held["ours"] > 0.915, (design, num_tasks)
        if num_tasks == 200:
            assert held["ours"] < 0.98, (design, num_tasks)


def test_what_is_called_detectable_is_found_four_times_of_five(simulation: ModuleType) -> None:
    for num_tasks in (20, 50, 200):
        assert 0.72 < simulation.power_at_detectable(400, num_tasks, num_draws=400) < 0.88
