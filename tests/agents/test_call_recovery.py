"""What a malformed call plainly means is read, and what could mean two things is explained, never guessed."""

import ast
import json
import sys

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from polyturn.agents.dialects import HermesDialect, JSONDialect, PythonDialect
from polyturn.agents.dialects.calls import CallReader
from polyturn.agents.dialects.repair import repaired

READER = CallReader(example="it right", recovers=True)
STRICT = CallReader(example="it right", recovers=False)


def read(text, reader=READER, **how):
    """Name and arguments of each call, or the error."""
    return [call.error or (call.name, dict(call.arguments)) for call in reader.read(text, 0, **how)]


X = ("search", {"query": "x"})
PLAIN = {
    "a comma too many": '{"name": "search", "arguments": {"query": "x",},}',
    "single quotes": "{'name': 'search', 'arguments': {'query': 'x'}}",
    "a last brace is missing": '{"name": "search", "arguments": {"query": "x"}',
    "two last braces are missing": '{"name": "search", "arguments": {"query": "x"',
    "a brace too many": '{"name": "search", "arguments": {"query": "x"}}}',
    "doubled braces": '{{"name": "search", "arguments": {"query": "x"}}}',
    "a doubled first brace": '{{"name": "search", "arguments": {"query": "x"}}',
    "arguments as text": '{"name": "search", "arguments": "{\\"query\\": \\"x\\"}"}',
    "parameters": '{"name": "search", "parameters": {"query": "x"}}',
    "function": '{"type": "function", "function": "search", "parameters": {"query": "x"}}',
    "the form of OpenAI": '{"type": "function", "function": {"name": "search", "arguments": {"query": "x"}}}',
    "both names of one": '{"name": "search", "function": "search", "parameters": {"query": "x"}}',
    "a code fence": '```json\n{"name": "search", "arguments": {"query": "x"}}\n```',
    "a list of one": '[{"name": "search", "arguments": {"query": "x"}}]',
}


@pytest.mark.parametrize("slip", PLAIN)
def test_what_is_plain_is_read(slip):
    assert read(PLAIN[slip]) == [X]
    assert [call.is_recovered for call in READER.read(PLAIN[slip], 0)] == [True]
    (told,) = read(PLAIN[slip], STRICT)
    assert "could not be read" in told


@pytest.mark.parametrize(
    ("text", "arguments"),
    [
        (
            "{'name': 's', 'arguments': {'a': True, 'b': None, 'c': False}}",
            {"a": True, "b": None, "c": False},
        ),
        ("{'name': 's', 'arguments': {'q': 'say \"hi\"'}}", {"q": 'say "hi"'}),
        ("{'name': 's', 'arguments': {'q': \"it's\"}}", {"q": "it's"}),
        ('{"name": "s", "arguments": {"q": "it\\\'s"}}', {"q": "it's"}),
        ("{'name': 's', 'arguments': {'q': 'it\\'s'}}", {"q": "it's"}),
        ('{"name": "s", "arguments": {"code": "a\n\tb"}}', {"code": "a\n\tb"}),
        ('{"name": "s", "arguments": {"cmd": "mkdir -p test/{a,b"}}}', {"cmd": "mkdir -p test/{a,b"}),
        ('{"name": "s", "arguments": {"a": [1, 2.5, -3e2,],}', {"a": [1, 2.5, -300.0]}),
    ],
)
def test_texts_numbers_and_words_keep_their_values(text, arguments):
    assert read(text) == [("s", arguments)]


@pytest.mark.parametrize(
    ("text", "recovered"),
    [
        ('<tool_call>{"name": "s", "arguments": {}}</tool_call>', [False]),
        ('<tool_call>{"name": "s", "arguments": {}}', [True]),
        ('{"name": "s", "arguments": {}}</tool_call>', [True]),
        (
            '<tool_call>{"name": "s", "arguments": {},}</tool_call><tool_call>{"name": "t"}</tool_call>',
            [True, False],
        ),
        (
            '<tool_call>{"name": "s", "arguments": {}}\n{"name": "t", "arguments": {}}</tool_call>',
            [True, True],
        ),
    ],
)
def test_calls_that_were_recovered_say_so(text, recovered):
    calls = HermesDialect().parse(text).tool_calls
    assert [call.is_recovered for call in calls] == recovered
    assert not any(call.is_recovered for call in HermesDialect(recovers=False).parse(text).tool_calls)


def test_several_calls_in_one_pair_of_marks():
    one, two = ('{"name": "search", "arguments": {"query": "' + q + '"}}' for q in "xy")
    for between in ("\n", ",", ", "):
        assert read(one + between + two) == [X, ("search", {"query": "y"})]
    assert read(f"[{one}, {two}]") == [X, ("search", {"query": "y"})]


UNCLEAR = {
    "a quote within a text": '{"name": "s", "arguments": {"q": "say "hi" now"}}',
    "an apostrophe within a text": "{'name': 's', 'arguments': {'q': 'don't', 'r': 'can't'}}",
    "two texts side by side": "{'name': 's', 'arguments': {'q': 'a' 'b'}}",
    "a backslash that JSON does not have": '{"name": "s", "arguments": {"q": "\\d+"}}',
    "a backslash that only Python has": "{'name': 's', 'arguments': {'q': '\\x41'}}",
    "one key twice": "{'name': 's', 'arguments': {'q': 'a', 'q': 'b'}}",
    "brackets of two kinds": '{"name": "s", "arguments": {"q": [1, 2}}',
    "brackets too many within": '{"name": "s", "arguments": {"q": 1}}, "r": 2}',
    "two numbers": '{"name": "s", "arguments": {"q": 1 2}}',
    "two commas": '{"name": "s", "arguments": {"q": [1,,2]}}',
    "nothing behind a colon": '{"name": "s", "arguments": {"q": ',
    "nothing behind a comma": '{"name": "s", "arguments": {"q": 1, ',
    "nothing behind a brace": '{"name": "s", "arguments": {',
    "a text without an end": '{"name": "s", "arguments": {"q": "x',
    "keys without quotes": "{name: 's', arguments: {q: 'x'}}",
    "typographic quotes": "{“name”: “s”, “arguments”: {}}",
    "a comment": '{"name": "s", /* why */ "arguments": {}}',
    "words before it": 'I call {"name": "s", "arguments": {}}',
    "words behind it": '{"name": "s", "arguments": {}} and so on',
    "no number": '{"name": "s", "arguments": {"q": Infinity,}}',
    "arguments and parameters": '{"name": "s", "arguments": {"q": 1}, "parameters": {"q": 2}}',
    "name and function": '{"name": "s", "function": "t", "parameters": {}}',
    "arguments that are words": '{"name": "s", "arguments": "the query x"}',
    "arguments that are a list": '{"name": "s", "arguments": ["x"]}',
    "no arguments": '{"name": "s"}',
    "no name": '{"arguments": {"q": "x"}}',
    "the brace of a name left out": '{"arguments": {"q": "x", "name": "s"}',
    "an empty list": "[]",
    "a list with something else": '[{"name": "s", "arguments": {}}, 3]',
    "half of a surrogate pair": "{'name': 's', 'arguments': {'q': '\\ud800'}}",
}


@pytest.mark.parametrize("case", UNCLEAR)
def test_what_is_not_plain_is_explained(case):
    told = read(UNCLEAR[case])
    assert len(told) == 1 and isinstance(told[0], str), told
    assert told[0].endswith("Write it right.")


def test_what_was_cut_off_is_never_completed():
    cut = '{"name": "search", "arguments": {"query": "x"}'
    assert read(cut) == [X]
    assert "not valid JSON" in read(cut, is_closed=False)[0]
    (call,) = HermesDialect().parse(f"<tool_call>{cut}").tool_calls
    assert "was not closed" in call.error


values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=6,
)
arguments = st.dictionaries(st.text(), values, max_size=3)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(st.text(min_size=1), arguments, st.booleans(), st.sampled_from([None, 1, "\t"]))
def test_a_well_formed_call_is_never_changed(name, given_arguments, ascii_only, indent):
    text = json.dumps({"name": name, "arguments": given_arguments}, ensure_ascii=ascii_only, indent=indent)
    assert read(text) == read(text, STRICT) == [(name, json.loads(text)["arguments"])]
    for dialect, written in ((HermesDialect(), f"<tool_call>{text}</tool_call>"), (JSONDialect(), text)):
        (call,) = dialect.parse(written).tool_calls
        assert (call.name, call.arguments, call.error) == (name, json.loads(text)["arguments"], None)


@settings(max_examples=80, deadline=None, derandomize=True)
@given(arguments)
def test_python_is_read_as_python_means_it_or_not_at_all(given_arguments):
    written = f"{{'name': 's', 'arguments': {given_arguments!r}}}"
    (found,) = read(written)
    assert isinstance(found, str) or found == ("s", ast.literal_eval(written)["arguments"])


slips = st.sampled_from(
    ["{", "}", "[", "]", ",", ":", '"', "'", "\\", " ", "True", "null", "1", '"a"', "'b'", "é"]
)


@settings(max_examples=200, deadline=None, derandomize=True)
@given(st.lists(slips, max_size=12).map("".join), st.booleans())
def test_a_repair_only_adds_and_drops_what_the_rules_name(text, may_close):
    """Texts and numbers come out in the order in which they went in; none is made or lost."""
    for mended in repaired(text, may_close=may_close) or ():
        told = mended.count('"a"') + mended.count('"b"') + mended.count("1")
        assert told <= text.count("a") + text.count("b") + text.count("1")
        assert set(mended) <= {*text, *"{}[]", *'"true null false'}


FRAGMENTS = st.sampled_from(
    [
        *("<tool_call>", "</tool_call>", "<think>", "</think>", "```json\n", "```", "\n", "<|python_tag|>"),
        *(
            '{"name": "a", "arguments": ',
            "{'name': 'a', 'parameters': ",
            "{}",
            "}",
            "[",
            "]",
            '"',
            "'",
            "\\u",
        ),
        *(
            "\ud800",
            "1" * 5000,
            "1e999",
            "NaN",
            ",",
            ":",
            "[search(query=",
            ")]",
            "lambda: 0",
            "\x00",
            "call",
        ),
    ]
)
DIALECTS = {
    "hermes": HermesDialect(),
    "strict hermes": HermesDialect(recovers=False),
    "json": JSONDialect(),
    "pythonic": PythonDialect(),
}


@pytest.mark.parametrize("name", DIALECTS)
@settings(max_examples=120, deadline=None, derandomize=True)
@given(st.lists(FRAGMENTS | st.text(max_size=5) | st.characters(), max_size=14).map("".join), st.booleans())
def test_any_text_has_a_message_that_can_be_written_down(name, text, in_thought):
    message = DIALECTS[name].parse(text, in_thought=in_thought)
    assert message.raw_text == text
    for call in message.tool_calls:
        assert (call.error is None) or call.arguments == {}
        assert isinstance(call.name, str)
    json.dumps(message.to_message(), ensure_ascii=False, allow_nan=False).encode()
    assert [call.id for call in message.tool_calls] == [f"call_{n}" for n in range(len(message.tool_calls))]


PUMPS = [
    "<tool_call>",
    "</tool_call>",
    '<tool_call>{"name": "a", "arguments": {}}',
    '{"name": "a", "arguments": {}}</tool_call>',
    '{"name": "a", "arguments": {"a": "\n',
    '{"name": "a", "arguments": {}}\n',
    "<think></think>",
    "<think>",
    "</think>",
    "```json\n",
    "```python\n",
    "[",
    "{",
    "{'a': ",
    "'",
    "\\'",
    "\n",
    "[a(b=[",
    "[a(b=1, c=2), ",
    "a().",
]


@pytest.mark.parametrize("name", DIALECTS)
def test_the_work_grows_no_faster_than_the_text(name):
    """Counted in lines of Python; what one line costs is looked at in tests/envs/rewards/test_linear_time.py."""
    for pump in PUMPS:
        for before in ("", "<tool_call>", '{"name": "a", "arguments": {"q": '):
            short, long = (
                num_lines(DIALECTS[name], before + pump * (size // len(pump))) for size in (600, 2400)
            )
            assert long <= 4.5 * short + 60, (pump, before, short, long)


def num_lines(dialect, text):
    count = 0

    def trace(frame, event, argument):
        nonlocal count
        count += event == "line"
        return trace

    outer = sys.gettrace()
    sys.settrace(trace)
    try:
        dialect.parse(text)
    finally:
        sys.settrace(outer)
    return count
