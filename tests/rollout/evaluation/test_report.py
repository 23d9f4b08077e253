"""A report says what was scored and what was not, whatever the evaluation."""

from __future__ import annotations

import math
import random
from dataclasses import asdict, replace
from typing import Any

import orjson
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from polyturn.rollout.evaluation.records import Evaluation, Failure
from polyturn.rollout.evaluation.report import Report, report_of
from tests.rollout.evaluation.evaluations import entry_of, episode, evaluation_of, evaluations


def test_figures_by_hand() -> None:
    """Task 0 succeeds twice, task 1 once; task 2 has one score, task 3 none."""
    entry = entry_of([[1.0, 1.0], [1.0, 0.0], [0.0, None], [None, None]])
    figures = report_of(evaluation_of(entry)).entries[0].figures
    coverage = figures.coverage
    assert (coverage.num_asked, coverage.num_scored, coverage.num_infrastructure, coverage.num_missing) == (
        8,
        5,
        3,
        0,
    )
    assert (coverage.share, coverage.num_tasks, coverage.num_scored_tasks) == (5 / 8, 4, 3)
    assert figures.score is not None
    assert (figures.score.mean, figures.score.num_tasks, figures.score.coverage) == (0.5, 3, 5 / 8)
    assert figures.verdict is None, "an eighth too little was scored"
    assert figures.bounds == (3 / 8, 6 / 8)
    at = {at_k.k: at_k.estimate for at_k in figures.pass_at}
    assert {k: (e.mean, e.num_tasks, e.coverage) for k, e in at.items()} == {
        1: (0.5, 3, 0.75),
        2: (1.0, 2, 0.5),
    }
    assert [(at_k.k, at_k.estimate.mean) for at_k in figures.pass_all] == [(1, 0.5), (2, 0.5)]
    assert [(at_k.k, at_k.estimate.mean) for at_k in figures.majority] == [(1, 0.5), (2, 0.75)]
    assert figures.errors == {"the search server is gone": 3}
    assert figures.spending is not None
    assert (figures.spending.policy_s.total, figures.spending.turns.mean, figures.spending.queue_s.p99) == (
        5,
        2,
        0.25,
    )


def test_a_failure_is_never_a_score_of_zero() -> None:
    whole = report_of(evaluation_of(entry_of([[1.0]] * 19 + [[None]])))
    assert whole.overall.score is not None and whole.overall.score.mean == 1.0
    assert whole.overall.coverage.share == whole.coverage_floor == 0.95
    assert whole.overall.verdict == 1.0, "the floor itself is enough"
    assert report_of(evaluation_of(entry_of([[1.0]] * 18 + [[None]] * 2))).overall.verdict is None
    scorer = replace(
        entry_of([[1.0], [1.0]]), episodes=(episode(), episode(task=1, score=None, failure=Failure.SCORER))
    )
    coverage = report_of(evaluation_of(scorer)).overall.coverage
    assert (coverage.num_scorer, coverage.num_infrastructure, coverage.num_missing) == (1, 0, 0)


def test_entries_count_the_same_and_tasks_do_where_it_says_pooled() -> None:
    report = report_of(evaluation_of(entry_of([[1.0]] * 30), entry_of([[0.0]] * 10, "search")))
    assert report.overall.score is not None and report.pooled is not None
    assert (report.overall.score.mean, report.pooled.mean) == (0.5, 0.75)
    assert report.overall.score.method == "combined"
    assert report.overall.verdict == 0.5
    half = report_of(evaluation_of(entry_of([[1.0]] * 30), entry_of([[None]], "search")))
    assert half.overall.score is not None
    assert (half.overall.score.mean, half.overall.verdict) == (1.0, None), (
        "an entry without a score is not left out quietly"
    )


def test_costs_are_those_of_failed_episodes_too() -> None:
    entry = replace(
        entry_of([[1.0], [0.0], [None]]),
        episodes=tuple(episode(task=t, score=s, cost=2.0) for t, s in enumerate([1.0, 0.0, None])),
    )
    cost = report_of(evaluation_of(entry)).overall.cost
    assert cost is not None
    assert (cost.total, cost.num_priced, cost.per_episode, cost.per_success) == (6.0, 3, 2.0, 6.0)
    assert report_of(evaluation_of(entry_of([[1.0]]))).overall.cost is None


def test_the_mean_of_metrics_whose_sum_is_no_number() -> None:
    entry = replace(
        entry_of([[1.0], [0.0]]),
        episodes=tuple(episode(task=task, metrics={"odd": 1.7e308}) for task in range(2)),
    )
    assert report_of(evaluation_of(entry)).overall.metrics == {"odd": 1.7e308}


def numbers(value: Any) -> list[float]:
    if isinstance(value, dict):
        return [number for item in value.values() for number in numbers(item)]
    if isinstance(value, (list, tuple)):
        return [number for item in value for number in numbers(item)]
    return [float(value)] if isinstance(value, (int, float)) else []


def estimates(value: Any) -> list[dict[str, Any]]:
    if isinstance(value, dict):
        found = [value] if {"mean", "low", "method"} <= value.keys() else []
        return found + [estimate for item in value.values() for estimate in estimates(item)]
    return (
        [estimate for item in value for estimate in estimates(item)]
        if isinstance(value, (list, tuple))
        else []
    )


@settings(max_examples=30, deadline=None)
@given(evaluation=evaluations(), seed=st.integers(0, 9))
def test_whatever_was_evaluated(evaluation: Evaluation, seed: int) -> None:
    report = report_of(evaluation)
    plain = asdict(report)
    assert all(math.isfinite(number) for number in numbers(plain))
    assert orjson.loads(orjson.dumps(report)) == orjson.loads(orjson.dumps(plain))
    for estimate in estimates(plain):
        assert 0 < estimate["coverage"] <= 1 and estimate["num_tasks"] >= 1
        if estimate["low"] is not None:
            assert (
                estimate["low"] <= estimate["mean"] + 1e-12 and estimate["mean"] <= estimate["high"] + 1e-12
            )
    check_totals(evaluation, report)
    shuffled = random.Random(seed)
    mixed = evaluation_of(
        *(
            replace(entry, episodes=tuple(shuffled.sample(entry.episodes, len(entry.episodes))))
            for entry in evaluation.entries
        )
    )
    again = asdict(report_of(mixed))
    assert numbers(again) == pytest.approx(numbers(plain), abs=1e-9), "the order of episodes says nothing"


def check_totals(evaluation: Evaluation, report: Report) -> None:
    for entry, figures in zip(evaluation.entries, [entry.figures for entry in report.entries], strict=True):
        coverage = figures.coverage
        parts = (coverage.num_scored, coverage.num_infrastructure, coverage.num_scorer, coverage.num_missing)
        assert min(parts) >= 0 and sum(parts) == coverage.num_asked == entry.num_asked
        assert coverage.share == coverage.num_scored / coverage.num_asked
        assert (figures.score is None) == (coverage.num_scored == 0)
        assert sum(figures.truncated.values()) <= coverage.num_scored
        if figures.score is not None and figures.bounds is not None and figures.coverage.share == 1:
            assert figures.bounds == pytest.approx((figures.score.mean, figures.score.mean))
    whole = report.overall.coverage
    assert whole.num_scored == sum(entry.figures.coverage.num_scored for entry in report.entries)
    assert whole.num_asked == sum(entry.figures.coverage.num_asked for entry in report.entries)
