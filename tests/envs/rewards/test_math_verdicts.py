"""The math verifier on pairs of every kind: what it accepts, what it refuses, and what it reads out of a reply."""

import json
import re
from collections import defaultdict
from importlib import resources
from pathlib import Path

import pytest

from polyturn.envs.rewards.math import MathVerifier, unpayable_reason
from polyturn.envs.rewards.math.decide import decide
from polyturn.envs.rewards.math.extract import extract
from polyturn.envs.rewards.math.verdict import Undecided

PAIRS = Path(__file__).resolve().parents[3] / "benchmarks" / "math_pairs.jsonl"


def read_pairs() -> dict[str, list[dict]]:
    """The shipped pairs by category."""
    pairs = defaultdict(list)
    for line in PAIRS.read_text().splitlines():
        row = json.loads(line)
        pairs[row["cat"]].append(row)
    return pairs


SHIPPED = read_pairs()


@pytest.fixture(scope="module")
def verifier():
    with MathVerifier() as verifier:
        verifier.warm()
        yield verifier


@pytest.mark.parametrize("category", sorted(set(SHIPPED) - {"bomb"}))
def test_the_shipped_pairs_get_the_expected_verdicts(verifier, category):
    wrong = [
        (pair["gold"], pair["pred"], verdict)
        for pair in SHIPPED[category]
        if (verdict := verifier.verify(pair["gold"], pair["pred"], mode=pair["mode"])).correct
        != pair["expect"]
    ]
    assert wrong == []


def test_both_verdicts_are_expected_in_every_category():
    one_sided = {"bomb", "inject", "undefined"}
    for category in set(SHIPPED) - one_sided:
        assert {pair["expect"] for pair in SHIPPED[category]} == {True, False}, category


@pytest.mark.parametrize(
    "answer",
    [
        "1/2",
        r"\frac{3}{7}",
        "x^2+1",
        r"2\sqrt{3}",
        r"\{1, 2\}",
        "(1, 2)",
        r"[0, \infty)",
        r"x \le 3",
        "y = 2x + 1",
        r"\begin{pmatrix}1&2\\3&4\end{pmatrix}",
        "3:4",
        r"5\text{ cm}",
        r"45^\circ",
        "50\\%",
        "1011_2",
        "Tuesday",
        r"\text{(C)}",
        r"3 + 4i",
        r"\pm 2",
    ],
)
def test_a_verdict_on_an_answer_and_itself_in_other_spelling_is_right_and_no_other_answer_is(
    verifier, answer
):
    for spelling in (
        answer,
        f" {answer} ",
        f"${answer}$",
        f"{{{answer}}}",
        f"{answer}.",
        f"\\boxed{{{answer}}}",
    ):
        assert verifier.verify(answer, spelling, mode="boxed").correct, spelling
    for other in (
        "",
        "0.123",
        r"\frac{17}{19}",
        "Wednesday",
        "I do not know",
        "nan",
        "inf",
        "1e999",
        answer + " + 1",
    ):
        assert not verifier.verify(answer, other, mode="boxed").correct, other


@pytest.mark.parametrize(
    ("gold", "answer", "reason"),
    [
        ("5", "5", "number"),
        ("x+1", "x + 1", "exact"),
        ("5", "", "no_answer"),
        ("3", "3, 4", "hedge"),
        ("B", "(B)", "choice"),
        ("yes", "no", "words"),
        (r"\sqrt{8}", r"2\sqrt{2}", "symbolic"),
        ("1", "9^{9^{9^{9}}}", "too_large"),
        ("1", "9^{9^{9}}", "number"),
        ("5", r"\frac{1}{0}", "undefined"),
        ("5", "((", "unreadable"),
        (r"\{1,2\}", "[1,2]", "structure"),
    ],
)
def test_a_verdict_says_how_it_came_about(verifier, gold, answer, reason):
    verdict = verifier.verify(gold, answer, mode="boxed")
    assert verdict.reason == reason
    assert verdict.decided
    assert verdict.seconds > 0


@pytest.mark.parametrize(
    ("reply", "answer"),
    [
        (r"\boxed{1} then \boxed{\frac{1}{2}}", r"\frac{1}{2}"),
        (r"<think>\boxed{1}</think> so \boxed{2}", "2"),
        (r"<think>\boxed{1}", None),
        (r"\boxed{5", None),
        (r"\boxed{3} or \boxed{4}", "3 , 4"),
        (r"\boxed{3} and again \boxed{3}", "3"),
        ("#### 1,080\n", "1,080"),
        ("The answer is 42, because 6*7=42.", "42"),
        ("The answer is not 5.", None),
        ("I tried 1, 2, 3, 4 and 5; I am not sure.", None),
        ("Thus x = 7.", "7"),
        ("7", "7"),
        ("", None),
    ],
)
def test_the_answer_in_a_reply(reply, answer):
    assert extract(reply) == answer


def test_where_only_a_box_counts_nothing_else_does():
    assert extract("The answer is 42.", box_only=True) is None
    assert extract("#### 41\n\\boxed{42}", box_only=True) == "42"


def test_a_gold_answer_may_be_a_whole_solution(verifier):
    assert verifier.verify("6*7 = <<6*7=42>>42\n#### 42", "\\boxed{42}").correct
    assert verifier.verify("We get $\\boxed{\\frac12}$.", "The answer is 0.5").correct


def test_an_unknown_mode_is_refused(verifier):
    with pytest.raises(ValueError, match="boxed, text, box_only"):
        verifier.verify("1", "1", mode="latex")


def test_rational_answers_need_no_worker():
    for gold, answer in (("1/3", r"\frac{2}{6}"), ("x^2-1", "(x-1)(x+1)"), ("[0,1]", "0<=x<=1"), ("1", "2")):
        decide(gold, answer, deep=False)
    with pytest.raises(Undecided):
        decide(r"\sqrt{8}", r"2\sqrt{2}", deep=False)


def test_irrational_values_that_differ_far_behind_the_point_are_told_apart(verifier):
    almost = r"\frac{\ln(640320^3+744)}{\sqrt{163}}"  # pi to 30 digits
    assert not verifier.verify(r"\pi", almost, mode="boxed").correct
    assert verifier.verify(r"\pi", r"\frac{\ln(e^{\pi})}{1}", mode="boxed").correct


def test_the_last_sentences_of_gsm8k_are_read_and_pay_no_other_number(verifier):
    path = resources.files("polyturn.envs.math") / "data" / "gsm8k_test.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    paid = 0
    for row in rows:
        solution, _, gold = row["answer"].partition("####")
        reply = re.sub("<<[^<>]*>>", "", solution)
        paid += verifier.verify(gold, reply).correct
        other = str(int(gold.replace(",", "")) + 1)
        assert not verifier.verify(other, reply).correct, reply
    assert paid > 0.7 * len(rows)


@pytest.mark.parametrize(
    ("gold", "reply", "correct"),
    [
        ("12", "First, 3*4 = 12.\n\nThe total is **$12**.", True),
        ("12", "**Final Answer**\n\n12", True),
        ("12", "He earns $12 per week.", True),
        ("12", "He earns $12 per week, and she earns $15.", False),
        ("12", "He might earn $12 per week.", False),
        ("12", "Does he earn $12 per week?", False),
        ("84", "They eat 7 dozen eggs.", True),
        ("7", "They eat 7 dozen eggs.", True),
        ("8", "They eat 7 dozen eggs.", False),
    ],
)
def test_a_last_sentence_that_states_one_number_is_an_answer(verifier, gold, reply, correct):
    assert verifier.verify(gold, reply).correct == correct


@pytest.mark.parametrize(
    ("gold", "answer", "right"),
    [
        (r"\arcsin(\sin x)", "x", False),
        (r"\tan^{-1}(\tan x)", "x", False),
        (r"\sqrt{1-\sin^2 x}", r"\cos x", False),
        (r"\tan x", r"\frac{\sin x}{\cos x}", True),
        (r"\sin^{-1}x+\cos^{-1}x", r"\frac{\pi}{2}", True),
        ("\u2460\u2462", "\u2460\u3001\u2462", True),
        ("\u2460\u2462", "(1)(3)", True),
        ("\u2460\u2462", "\u2460\u2461", False),
        ("\u2460\u2462", "13", False),
        ("\u4e0b\u53485\u65f630\u5206", "17:30", True),
        ("10:30", "10\u65f630\u5206", True),
        ("10:30", "10\u65f630\u5206\u949f", False),
        ("(A)(C)", "A, C", True),
        ("(A)(C)", "A", False),
        ("12", r"\textbf{(C) }12", True),
        ("13", r"\textbf{(C) }12", False),
        ("12", r"12 \checkmark", True),
        (r"\varnothing", "\u7a7a\u96c6", True),
        (r"13.6\text{ eV}", "13.6 electron volts", True),
    ],
)
def test_answers_as_they_are_written_elsewhere(verifier, gold, answer, right):
    assert verifier.verify(gold, answer, mode="boxed").correct is right


def test_a_missing_value_that_became_a_text_is_no_label():
    assert "missing value" in str(unpayable_reason("nan"))
    assert unpayable_reason("none") is None
