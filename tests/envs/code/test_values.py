"""Whatever values cross between tests and solution, they arrive as they were; whatever else comes is refused."""

import contextlib
import json
from collections import deque
from datetime import date, datetime, time, timedelta

from hypothesis import example, given, settings
from hypothesis import strategies as st

from polyturn.envs.code.harness.values import DoesNotCross, Packer, same, take_over, unpack

ATOMS = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.integers(min_value=2**60, max_value=2**4000),
    st.floats(allow_nan=False),
    st.complex_numbers(allow_nan=False),
    st.text(st.characters(exclude_categories=())),
    st.binary(),
    st.fractions(),
    st.decimals(allow_nan=False),
    st.dates(min_value=date(1, 1, 1)),
    st.datetimes(),
    st.times(),
    st.timedeltas(),
)
HASHABLE = st.recursive(
    ATOMS, lambda inner: st.one_of(st.tuples(inner, inner), st.frozensets(inner, max_size=3))
)
VALUES = st.recursive(
    ATOMS,
    lambda inner: st.one_of(
        st.lists(inner, max_size=4),
        st.tuples(inner, inner),
        st.dictionaries(HASHABLE, inner, max_size=3),
        st.sets(HASHABLE, max_size=3),
        st.lists(inner, max_size=4).map(deque),
        st.binary().map(bytearray),
    ),
)
TAGS = st.sampled_from([*"ifcbasdtzrqojDFLIV?", "", "Tdate", "Ttime", "bad", "keys"])
JSON = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=5)),
    lambda inner: st.one_of(
        st.lists(inner, max_size=4),
        st.dictionaries(
            st.sampled_from([*"ifcbasdtzrqojDFLIV?", "", "Tdate", "Ttime", "bad", "keys"]), inner, max_size=2
        ),
    ),
)
KINDS = {date, datetime, time, timedelta, deque, bytearray}


@settings(deadline=None)
@given(VALUES)
def test_a_value_arrives_as_it_was(value):
    for lenient in (True, False):
        back = unpack(json.loads(json.dumps(Packer(lenient=lenient).pack(value))))
        assert back == value
        assert type(back) is type(value)


@settings(deadline=None)
@given(JSON)
@example({"q": []})
def test_whatever_else_comes_is_refused_by_one_of_a_few_exceptions(data):
    refusals = (ValueError, TypeError, KeyError, AttributeError, RecursionError, ArithmeticError)
    with contextlib.suppress(*refusals):
        value = unpack(data)
        same(value, data)
        with contextlib.suppress(DoesNotCross):
            Packer(lenient=False).pack([value])


@settings(deadline=None)
@given(JSON)
def test_a_label_is_the_same_as_itself_as_tuples_too(label):
    def as_tuples(value):
        if isinstance(value, list):
            return tuple(map(as_tuples, value))
        if isinstance(value, dict):
            return {key: as_tuples(item) for key, item in value.items()}
        return value

    label = json.loads(json.dumps(label).replace("NaN", "0"))
    assert same(label, label)
    assert same(as_tuples(label), label)
    assert not same([label], label)


@settings(deadline=None)
@given(st.lists(VALUES, max_size=3), st.lists(VALUES, max_size=3))
def test_what_is_changed_in_place_is_what_it_was_changed_to(given_, changed):
    take_over(given_, changed)
    assert given_ == changed
