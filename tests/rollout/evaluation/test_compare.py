"""Two evaluations are compared on what both measured, task by task, and what was left out is said."""

from __future__ import annotations

import math
from dataclasses import asdict, replace
from itertools import product

import numpy as np
import pytest
from hypothesis import given, settings

from polyturn.rollout.evaluation.compare import Verdict, compare
from polyturn.rollout.evaluation.paired import MAX_ENUMERATED, effect_of, holm, sign_flip_p_value
from polyturn.rollout.evaluation.records import Evaluation
from polyturn.rollout.evaluation.report import report_of
from tests.rollout.evaluation.evaluations import entry_of, episode, evaluation_of, evaluations


def binary(*scores: int) -> list[list[float | None]]:
    return [[float(score)] for score in scores]


def test_mcnemar_mid_p_by_hand() -> None:
    """Nine tasks gained and two lost: the binomial tail beyond 9 of 11, and half of 9 itself, on both sides."""
    a, b = binary(*[0] * 9, *[1] * 2, *[1] * 10), binary(*[1] * 9, *[0] * 2, *[1] * 10)
    compared = compare(evaluation_of(entry_of(a)), evaluation_of(entry_of(b)))
    tail = [math.comb(11, count) / 2**11 for count in range(12)]
    assert compared.overall.p_value == pytest.approx(2 * (tail[10] + tail[11] + tail[9] / 2))
    assert (compared.overall.verdict, compared.overall.num_tasks) == (Verdict.BETTER, 21)
    assert compared.overall.effect == pytest.approx(7 / 21)
    entry = compared.entries[0]
    assert [task.task_id for task in entry.gained] == [f"task-{number}" for number in range(9)]
    assert [(task.task_id, task.a, task.b) for task in entry.lost] == [
        ("task-9", 1.0, 0.0),
        ("task-10", 1.0, 0.0),
    ]
    assert compare(evaluation_of(entry_of(b)), evaluation_of(entry_of(a))).overall.verdict is Verdict.WORSE


@pytest.mark.parametrize("number", [3, 7, MAX_ENUMERATED])
def test_the_test_is_what_all_signs_say(number: int) -> None:
    differences = np.random.default_rng(number).choice([-0.5, -0.25, 0.0, 0.25, 0.75], size=number)
    sums = np.abs(np.array(list(product([-1.0, 1.0], repeat=number))) @ np.abs(differences))
    measured = abs(differences.sum())
    expected = np.mean(sums > measured + 1e-9) + np.mean(np.abs(sums - measured) < 1e-9) / 2
    assert sign_flip_p_value(differences) == pytest.approx(expected)


def test_drawn_signs_say_what_all_of_them_say() -> None:
    """Twenty gained and ten lost, beyond what is enumerated; the binomial tail is exact."""
    differences = np.array([1.0] * 20 + [-1.0] * 10)
    tail = [math.comb(30, count) / 2**30 for count in range(31)]
    assert sign_flip_p_value(differences) == pytest.approx(2 * (sum(tail[21:]) + tail[20] / 2), abs=0.005)
    assert sign_flip_p_value(differences) == sign_flip_p_value(differences[::-1].copy())
    assert 0 < sign_flip_p_value(np.ones(500)) < 1e-4
    assert sign_flip_p_value(np.zeros(9)) == 1.0


def test_tasks_that_were_not_measured_in_both_are_counted_by_why() -> None:
    a = entry_of([[1.0], [None], [0.0], [1.0], [None]])
    b = entry_of([[0.0], [1.0], [None], [1.0], [None]])
    changed = replace(b.episodes[3], task_digest="other")
    b = replace(b, episodes=(*b.episodes[:3], changed, b.episodes[4], episode(task=9)), num_tasks=6)
    compared = compare(evaluation_of(a), evaluation_of(b))
    left_out = compared.entries[0].left_out
    assert (left_out.only_in_a, left_out.only_in_b) == (1, 2)
    assert (left_out.unscored_in_a, left_out.unscored_in_b) == (2, 1)
    assert compared.overall.num_tasks == 1 and compared.overall.verdict is Verdict.NONE, "most is missing"
    assert any("1 tasks have one id in both" in warning for warning in compared.warnings)
    assert sum("are needed" in warning for warning in compared.warnings) == 2


def test_nothing_shared_is_refused_with_why() -> None:
    entry = entry_of([[1.0]])
    with pytest.raises(ValueError, match="A has 'math', B has 'search'"):
        compare(evaluation_of(entry), evaluation_of(entry_of([[1.0]], "search")))
    with pytest.raises(ValueError, match="none of them has a score in both"):
        compare(evaluation_of(entry), evaluation_of(entry_of([[None]])))
    with pytest.raises(ValueError, match="the tasks themselves are others"):
        other = replace(entry, episodes=(replace(entry.episodes[0], task_digest="other"),))
        compare(evaluation_of(entry), evaluation_of(other))
    with pytest.raises(ValueError, match="no task in them"):
        compare(evaluation_of(entry), evaluation_of(replace(entry, episodes=(episode(task=7),))))


def test_what_was_not_measured_alike_is_told() -> None:
    a = replace(entry_of([[1.0, 0.0]]), sampling={"temperature": 1.0, "top_p": 1.0}, scorer="exact")
    b = replace(
        entry_of([[1.0]]), sampling={"temperature": 0.0, "top_p": 1.0}, scorer="judge", success_score=0.5
    )
    compared = compare(evaluation_of(a), evaluation_of(b, entry_of([[1.0]], "more"), suite="other"))
    assert compared.warnings == (
        "suites differ: A played 'suite', B 'other'",
        "math: scorer differs: 'exact' in A, 'judge' in B",
        "math: success score differs: 1.0 in A, 0.5 in B",
        "math: samples of each task differs: 2 in A, 1 in B",
        "math: sampling.temperature differs: 1.0 in A, 0.0 in B",
    )
    assert compared.entries_left_out == {"more": "only in B"}
    assert compare(evaluation_of(a), evaluation_of(a)).warnings == ()


def test_over_several_entries_a_find_by_chance_is_no_find() -> None:
    """Holm: six gained of six is p = 2^-6 alone, and of three entries three times that; over all it is counted once."""
    won, same = (binary(*[0] * 6), binary(*[1] * 6)), (binary(*[0, 1] * 3), binary(*[0, 1] * 3))
    names = ("math", "search", "code")
    a, b = (
        evaluation_of(*(entry_of((won if name == "math" else same)[side], name) for name in names))
        for side in (0, 1)
    )
    compared = compare(a, b)
    first = compared.entries[0].result
    assert first is not None
    assert (first.p_value, first.p_adjusted) == (2**-6, 3 * 2**-6)
    assert first.verdict is Verdict.BETTER
    assert compared.overall.p_value == 2**-6 and compared.overall.effect == pytest.approx(1 / 3)
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])


def test_the_interval_leaves_doubt_where_nothing_differs() -> None:
    alike = compare(
        evaluation_of(entry_of(binary(*[1] * 20))), evaluation_of(entry_of(binary(*[1] * 20)))
    ).overall
    assert alike.low is not None and alike.high is not None and alike.minimal_detectable_effect is not None
    assert alike.low == -alike.high and 0.05 < alike.high < 0.2, (
        "20 tasks cannot rule out a difference of 5 %"
    )
    one = compare(evaluation_of(entry_of([[1.0]])), evaluation_of(entry_of([[0.0]]))).overall
    assert (one.low, one.high, one.verdict) == (-1.0, 1.0, Verdict.UNDECIDED)
    unbounded = compare(
        evaluation_of(entry_of([[5.0], [5.0]])), evaluation_of(entry_of([[5.0], [5.0]]))
    ).overall
    assert (unbounded.low, unbounded.minimal_detectable_effect) == (None, None)
    wide = effect_of(np.array([10.0, -10.0, 20.0]), scale=40.0)
    narrow = effect_of(np.array([0.25, -0.25, 0.5]), scale=1.0)
    assert wide.error == pytest.approx(40 * narrow.error), "the unit of scores says nothing"


@settings(max_examples=25, deadline=None)
@given(a=evaluations(), b=evaluations())
def test_whatever_is_compared(a: Evaluation, b: Evaluation) -> None:
    try:
        compared, mirrored = compare(a, b), compare(b, a)
    except ValueError:
        return
    for result in [
        compared.overall,
        *(entry.result for entry in compared.entries if entry.result is not None),
    ]:
        assert all(math.isfinite(value) for value in asdict(result).values() if isinstance(value, float))
        assert 0 < result.p_value <= result.p_adjusted <= 1
        assert result.effect == pytest.approx(result.b - result.a)
        if result.low is not None and result.high is not None:
            assert result.low - 1e-9 <= result.effect <= result.high + 1e-9
    assert mirrored.overall.effect == pytest.approx(-compared.overall.effect)
    assert mirrored.overall.p_value == pytest.approx(compared.overall.p_value)
    assert [entry.gained for entry in compared.entries] == [
        tuple(replace(task, a=task.b, b=task.a) for task in entry.lost)
        for entry in sorted(
            mirrored.entries, key=lambda entry: [e.name for e in compared.entries].index(entry.name)
        )
    ] or any(e.success_score != o.success_score for e in a.entries for o in b.entries)


def test_of_a_single_task_no_difference_that_scores_allow_is_called_detectable() -> None:
    compared = compare(evaluation_of(entry_of(binary(1))), evaluation_of(entry_of(binary(0))))
    assert compared.overall.minimal_detectable_effect is None and compared.overall.low == -1.0


def test_a_task_that_a_split_has_twice_counts_twice_in_a_comparison_as_in_a_report() -> None:
    """Tasks 0 and 2 are the same; B was not played on the first of them."""

    def with_twin(scores: list[list[float | None]]) -> Evaluation:
        entry = entry_of(scores)
        twins = [replace(each, task_digest="0" * 16) for each in entry.episodes if each.task_index != 1]
        return evaluation_of(replace(entry, episodes=(*twins, entry.episodes[1])))

    a, b = with_twin(binary(1, 0, 0)), with_twin(binary(1, 1, 1))
    whole = compare(a, b).overall
    assert (whole.num_tasks, whole.a, whole.b) == (3, pytest.approx(1 / 3), 1.0)
    for evaluation, of_compared in ((a, whole.a), (b, whole.b)):
        score = report_of(evaluation).overall.score
        assert score is not None and score.mean == pytest.approx(of_compared)
    [entry] = b.entries
    part = replace(entry, episodes=tuple(each for each in entry.episodes if each.task_index))
    compared = compare(a, evaluation_of(part))
    assert compared.overall.num_tasks == 2 and compared.entries[0].left_out.only_in_a == 1
