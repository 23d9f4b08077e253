"""Pairs of answers that are different by the way in which they are made: none is accepted."""

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from polyturn.envs.rewards.math import MathVerifier
from polyturn.envs.rewards.math.tokens import NO_COUNTED_THINGS

many = settings(max_examples=120, deadline=None, derandomize=True)
numbers = st.integers(2, 9_999)
# Units of one dimension each, no two of which are equal.
UNITS = {
    "length": ("m", "km", "cm", "mm", "nm", "miles", "feet", "inches"),
    "time": ("s", "minutes", "hours", "days", "ms"),
    "mass": ("kg", "g", "mg", "pounds"),
    "energy": ("J", "kJ", "MeV"),
    "force": ("N", "kN"),
    "current": ("A", "mA"),
    "area": ("m^2", "cm^2", "acres"),
    "speed": ("m/s", "km/h"),
    "money": ("dollars", "cents"),
    "things": ("apples",),
    "other things": ("oranges",),
}
units = st.sampled_from([(kind, unit) for kind, names in UNITS.items() for unit in names])


@pytest.fixture(scope="module")
def verifier():
    with MathVerifier() as verifier:
        verifier.warm()
        yield verifier


def accepted(verifier, gold, answer):
    """The pairs of spellings that are accepted in either direction."""
    pairs = [(gold, answer), (answer, gold), (f"\\text{{{gold}}}", answer), (gold, f"\\boxed{{{answer}}}")]
    return [pair for pair in pairs if verifier.verify(*pair, mode="boxed").correct]


@many
@given(number=numbers, first=units, second=units)
def test_one_number_of_two_units(verifier, number, first, second):
    assume(first != second)
    assert accepted(verifier, f"{number} {first[1]}", f"{number} {second[1]}") == []


@many
@given(first=numbers, second=numbers, unit=units)
def test_two_numbers_of_one_unit(verifier, first, second, unit):
    assume(first != second)
    assert accepted(verifier, f"{first} {unit[1]}", f"{second} {unit[1]}") == []
    assert accepted(verifier, f"{first} {unit[1]}", str(second)) == []


times = st.tuples(st.integers(1, 12), st.integers(0, 59), st.sampled_from(("", " AM", " PM")))


@many
@given(first=times, second=times)
def test_two_times_of_day(verifier, first, second):
    assume(first[:2] != second[:2] or {first[2], second[2]} == {" AM", " PM"})
    gold, answer = (f"{hour}:{minute:02}{half}" for hour, minute, half in (first, second))
    assert accepted(verifier, gold, answer) == []


@many
@given(
    number=numbers,
    word=st.sampled_from(sorted(NO_COUNTED_THINGS - {"or", "and"})),
    more=st.sampled_from(("", " apples", " it")),
)
def test_a_number_that_is_denied_doubted_or_changed(verifier, number, word, more):
    for answer in (
        f"{number} \\text{{ {word}{more}}}",
        f"\\text{{{word}}} {number}",
        f"\\text{{{number} {word}{more}}}",
    ):
        assert not verifier.verify(str(number), answer, mode="boxed").correct, answer


@many
@given(
    first=numbers,
    second=numbers,
    joiner=st.sampled_from((" or ", ", ", " or possibly ", " and ", "/or ", " maybe ")),
)
def test_several_numbers_for_one(verifier, first, second, joiner):
    assume(first != second)
    for answer in (
        f"{first}{joiner}{second}",
        f"\\text{{{first}{joiner}{second}}}",
        f"{second}{joiner}{first}",
    ):
        assert not verifier.verify(str(first), answer, mode="boxed").correct, answer


FUNCTIONS = (
    "{0}",
    "({0})^2+{0}",
    "2^{{{0}}}",
    "e^{{{0}}}",
    r"x\cdot 2^{{{0}}}",
    r"\frac{{1}}{{({0})^3+7}}",
    r"\sin({0})",
    "3^{{{0}}}+x",
)
CHANGES = (
    "|x|",
    r"\sqrt{x^2}",
    r"\lfloor x\rfloor",
    r"\lceil x\rceil",
    r"\max(x,0)",
    "-x",
    "(x+1)",
    r"x+\lfloor x\rfloor-x",
)


@many
@given(function=st.sampled_from(FUNCTIONS), change=st.sampled_from(CHANGES))
def test_a_function_of_something_else(verifier, function, change):
    assert accepted(verifier, function.format("x"), function.format(change)) == []


def as_set(items):
    return "\\{" + ",".join(items) + "\\}"


elements = st.recursive(
    st.integers(1, 6).map(str), lambda inner: st.lists(inner, min_size=1, max_size=2).map(as_set)
)


def value(text):
    """The set of sets that a text spells."""
    literal = text.replace("\\{", "frozenset([").replace("\\}", "])")
    return eval(literal, {"frozenset": frozenset})  # made above, of digits and brackets


@many
@given(first=elements, second=elements)
def test_sets_of_sets(verifier, first, second):
    left, right = value(first), value(second)
    # One value in braces is read as the value.
    assume(left != right and left != frozenset([right]) and right != frozenset([left]))
    assert accepted(verifier, as_set([first, "7"]), as_set([second, "7"])) == []


letters = st.sets(st.sampled_from("ABCDEF"), min_size=1).map(lambda found: "".join(sorted(found)))


@many
@given(first=letters, second=letters, joiner=st.sampled_from(("", ", ", " and ", "; ")))
def test_other_options(verifier, first, second, joiner):
    assume(first != second)
    assert accepted(verifier, joiner.join(first), joiner.join(second)) == []


@many
@given(
    name=st.sampled_from(("Team", "Plan", "Group", "point", "the point", "a set")),
    first=st.sampled_from(["", *"ABCXYZ", "1", "2", "#", "not"]),
    second=st.sampled_from(["", *"ABCXYZ", "1", "2", "#", "not"]),
)
def test_names_with_another_letter(verifier, name, first, second):
    assume(first != second)
    gold, answer = (f"\\text{{{name} {letter}}}".replace(" }", "}") for letter in (first, second))
    assert [
        pair for pair in ((gold, answer), (answer, gold)) if verifier.verify(*pair, mode="boxed").correct
    ] == []


@many
@given(
    periods=st.tuples(st.integers(1, 6), st.integers(1, 6)),
    starts=st.tuples(st.integers(0, 11), st.integers(0, 11)),
)
def test_families_with_another_member(verifier, periods, starts):
    assume(periods[0] != periods[1] or (starts[0] - starts[1]) % (12 * periods[0]))
    gold, answer = (
        rf"x = \frac{{{start}\pi}}{{12}} + {period}k\pi, k \in \mathbb{{Z}}"
        for start, period in zip(starts, periods, strict=True)
    )
    assert accepted(verifier, gold, answer) == []


@many
@given(
    number=numbers,
    factor=st.sampled_from(("thousand", "million", "hundred", "squared", "cubed", "tenths")),
)
def test_a_word_that_multiplies(verifier, number, factor):
    assert accepted(verifier, str(number), f"{number} {factor}") == []
