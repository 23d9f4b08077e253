"""pass@k, pass^k and majority@k are what enumeration says, and so without bias."""

from __future__ import annotations

from fractions import Fraction
from itertools import combinations
from statistics import fmean

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from polyturn.rollout.evaluation.estimators import (
    _chances,
    _drawn_chances,
    majority_at_k,
    pass_all_k,
    pass_at_k,
)

ANSWERS = st.lists(st.sampled_from([None, "a", "b", "c", "d"]), min_size=1, max_size=7)


@pytest.mark.parametrize("num_samples", range(1, 8))
def test_passing_is_what_all_subsets_say(num_samples: int) -> None:
    for num_successes in range(num_samples + 1):
        samples = [1] * num_successes + [0] * (num_samples - num_successes)
        for k in range(1, num_samples + 1):
            subsets = list(combinations(samples, k))
            assert pass_at_k(num_samples, num_successes, k) == pytest.approx(fmean(map(any, subsets)))
            assert pass_all_k(num_samples, num_successes, k) == pytest.approx(fmean(map(all, subsets)))


def test_passing_has_no_bias_where_the_usual_guess_has() -> None:
    """Eight samples of a task that succeeds in a tenth: over many such the mean is 1 - 0.9^4 and 0.1^2."""
    successes = np.random.default_rng(0).binomial(8, 0.1, size=20_000)
    assert fmean(pass_at_k(8, int(found), 4) for found in successes) == pytest.approx(1 - 0.9**4, abs=0.005)
    assert fmean(pass_all_k(8, int(found), 2) for found in successes) == pytest.approx(0.1**2, abs=0.001)
    assert fmean(1 - (1 - found / 8) ** 4 for found in successes) < 1 - 0.9**4 - 0.02


def by_enumeration(answers: list[str | None], scores: list[float], k: int) -> float:
    """Over every subset, and every answer that is tied in it."""
    score_of = {
        answer: fmean(s for a, s in zip(answers, scores, strict=True) if a == answer) for answer in answers
    }
    found = []
    for subset in combinations(answers, k):
        votes = {answer: subset.count(answer) for answer in subset if answer is not None}
        most = max(votes.values(), default=0)
        found.append(
            fmean(score_of[answer] for answer, count in votes.items() if count == most)
            if votes
            else score_of[None]
        )
    return fmean(found)


@settings(max_examples=80, deadline=None)
@given(answers=ANSWERS, data=st.data())
def test_majority_is_what_all_subsets_and_ties_say(answers: list[str | None], data: st.DataObject) -> None:
    scores = data.draw(st.lists(st.floats(0, 1), min_size=len(answers), max_size=len(answers)))
    for k in range(1, len(answers) + 1):
        expected = by_enumeration(answers, scores, k)
        assert majority_at_k(answers, scores, k) == pytest.approx(expected, abs=1e-12)
        order = data.draw(st.permutations(range(len(answers))))
        shuffled = majority_at_k([answers[i] for i in order], [scores[i] for i in order], k)
        assert shuffled == pytest.approx(expected, abs=1e-12)


def test_majority_by_hand() -> None:
    """a a b c, a right: of two, {a a} and half of each of four ties with a is right, of {b c} nothing."""
    answers, scores = ["a", "a", "b", "c"], [1.0, 1.0, 0.0, 0.0]
    assert majority_at_k(answers, scores, 2) == pytest.approx(float(Fraction(1 + 4 * Fraction(1, 2), 6)))
    assert majority_at_k(answers, scores, 4) == 1.0
    assert majority_at_k(["a", "b"], [1.0, 0.0], 2) == 0.5, "no order decides a tie"
    assert majority_at_k([None, None, "a"], [0.0, 0.0, 1.0], 3) == 1.0, "who does not answer has no vote"


def test_majority_of_more_samples_is_drawn() -> None:
    """Beside the exact one of 16 samples, where drawing has an error of a hundredth; all samples are never drawn."""
    counts = (1, 2, 4, 8)
    for k in (2, 4, 8):
        drawn, exact = _drawn_chances(counts, 1, k), _chances(counts, 1, k)
        assert drawn == pytest.approx(exact, abs=0.05)
    answers = [str(number % 23) for number in range(64)]
    chance = [
        majority_at_k(answers, [float(answer == which) for answer in answers], 32) for which in set(answers)
    ]
    assert sum(chance) == pytest.approx(1) and max(chance) < 0.1
    assert majority_at_k(answers, [float(answer == "0") for answer in answers], 64) == 1 / 18, (
        "18 answers came thrice"
    )
