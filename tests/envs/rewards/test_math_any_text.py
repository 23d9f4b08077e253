"""The verifier on any text at all, as gold answer and as prediction: a verdict, and never an exception."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from polyturn.envs.rewards.math import MathVerifier, unpayable_reason
from polyturn.envs.rewards.math.decide import decide
from polyturn.envs.rewards.math.extract import extract, gold_answer
from polyturn.envs.rewards.math.verdict import Undecided, Unreadable

ATOMS = [
    *(
        "0",
        "1",
        "12",
        "0.5",
        ".5",
        "1,000",
        "1e5",
        "1e999",
        "x",
        "n",
        "e",
        "i",
        "AB",
        "or",
        "and",
        "not",
        "five",
        "the",
    ),
    *(
        r"\pi",
        r"\infty",
        r"\emptyset",
        r"\mathbb{Z}",
        r"\text{or}",
        r"\text{ cm}",
        r"\text{}",
        r"\text",
        r"\hbar",
        "cm",
    ),
    *(
        "3:00",
        "p.m.",
        "2nd",
        "1011_2",
        "50\\%",
        "$",
        "\\$",
        "km/h",
        "²",
        "½",
        "°",
        "元",
        "\ud800",
        "\x00",
        "\n",
        " ",
        "…",
    ),
]
JOINS = [
    *"+-*/^_,;:=<>|!'.&%{}()[] ",
    r"\{",
    r"\}",
    r"\\",
    r"\le ",
    r"\in ",
    r"\cup ",
    r"\pm ",
    r"\mid ",
    r"\to ",
    "...",
]
WRAPS = [
    *(
        "({})",
        "[{})",
        r"\{{{}\}}",
        r"\frac{{{}}}{{2}}",
        r"\sqrt{{{}}}",
        r"\sqrt[{}]{{3}}",
        r"\text{{{}}}",
        r"\boxed{{{}}}",
    ),
    *(
        r"\begin{{pmatrix}}{}\end{{pmatrix}}",
        r"\begin{{cases}}{}",
        r"\lfloor{}\rfloor",
        "|{}|",
        "${}$",
        "{{{}}}",
        "-{}",
    ),
    *(
        r"\sum_{{k=1}}^{{{}}}k",
        r"\log_{{{}}}2",
        r"\binom{{{}}}{{3}}",
        "{}!",
        r"\sin {}",
        r"\mathrm{{{}}}",
        r"\color{{{}}}",
    ),
    *(
        "The answer is {}.",
        "#### {}",
        "<answer>{}</answer>",
        "So the total is {}.",
        "{} is wrong",
        "<think>{}</think>{}",
    ),
]
answers = st.recursive(
    st.sampled_from(ATOMS),
    lambda inner: st.one_of(
        st.tuples(inner, st.sampled_from(JOINS), inner).map("".join),
        st.tuples(st.sampled_from(WRAPS), inner).map(
            lambda pair: pair[0].replace("{}", "{0}").format(pair[1])
        ),
    ),
    max_leaves=8,
)
texts = st.one_of(
    answers, st.text(max_size=30), st.lists(st.sampled_from([*ATOMS, *JOINS]), max_size=12).map("".join)
)


@settings(max_examples=1_500, deadline=None, derandomize=True)
@given(gold=texts, answer=texts)
def test_every_pair_of_texts_is_decided_or_left_to_a_worker(gold, answer):
    for deep in (False, True):
        for left, right in ((gold, answer), (gold, gold), (gold_answer(gold), answer)):
            try:
                correct, _ = decide(left, right, deep=deep)
                assert isinstance(correct, bool)
            except (Undecided, Unreadable):
                pass


@settings(max_examples=500, deadline=None, derandomize=True)
@given(text=texts)
def test_every_reply_has_an_answer_or_none(text):
    for reply in (
        text,
        f"The answer is {text}",
        f"So {text}",
        f"{text}\n\n**Answer**\n{text}",
        f"\\boxed{{{text}",
    ):
        for box_only in (False, True):
            assert isinstance(extract(reply, box_only=box_only), str | None)


@pytest.fixture(scope="module")
def verifier():
    with MathVerifier() as verifier:
        verifier.warm()
        yield verifier


@settings(max_examples=100, deadline=None, derandomize=True)
@given(gold=texts, answer=texts)
def test_a_verdict_on_any_text_is_decided(verifier, gold, answer):
    assert verifier.verify(gold, answer, mode="boxed").decided
    assert verifier.verify(gold, answer, mode="text").decided


@settings(max_examples=200, deadline=None, derandomize=True)
@given(
    label=st.one_of(texts, st.floats(), st.integers(), st.lists(texts, max_size=2), st.none(), st.booleans())
)
def test_any_label_can_be_paid_or_is_named(label):
    reason = unpayable_reason(label)
    assert reason is None or len(reason) > 10


@pytest.mark.parametrize(
    "answer",
    [
        "or",
        "and",
        r"\text{or}",
        r"\text{ and }",
        ",",
        "(,)",
        r"\{,\}",
        "[;]",
        "or or",
        "x=or",
        r"\ud800",
        "\ud800",
    ],
)
def test_words_between_nothing_are_a_wrong_answer(verifier, answer):
    for gold in ("5", "x", "A", r"\{1,2\}", "(1,2)"):
        verdict = verifier.verify(gold, f"\\boxed{{{answer}}}")
        assert (verdict.correct, verdict.decided) == (False, True)
        assert not verifier.verify(answer, gold, mode="boxed").correct
