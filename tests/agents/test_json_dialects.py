"""Calls without marks of their own: JSON that is bare or in code fences, and Python's form."""

import pytest

from polyturn.agents.dialects import JSONDialect, PythonDialect

CALL = '{"name": "search", "arguments": {"query": "x"}}'
X = ("search", {"query": "x"})


def read(text, dialect=None, **how):
    message = (dialect or JSONDialect()).parse(text, **how)
    return (
        message.content,
        message.reasoning,
        [c.error or (c.name, dict(c.arguments)) for c in message.tool_calls],
    )


@pytest.mark.parametrize(
    ("text", "content", "num_calls"),
    [
        (CALL, "", 1),
        (f"First.\n{CALL}", "First.", 1),
        (f"First.\n{CALL}\nThen.", "First.\n\nThen.", 1),
        (f"```json\n{CALL}\n```", "", 1),
        (f"Look:\n```\n{CALL}\n```\nDone.", "Look:\n\nDone.", 1),
        (f"```json\n{CALL}\n```\n```json\n{CALL}\n```", "", 2),
        (f"[{CALL}, {CALL}]", "", 2),
        (f"{CALL}; {CALL}", "", 2),
        (f"{CALL}\n{CALL}\n{CALL}", "", 3),
        (f"<|python_tag|>{CALL}", "", 1),
        (f"[TOOL_CALLS] [{CALL}]", "", 1),
        ('{"type": "function", "name": "search", "parameters": {"query": "x"}}', "", 1),
        ('{"function": "search", "parameters": {"query": "x"}}', "", 1),
        ('{"type": "function", "function": {"name": "search", "arguments": {"query": "x"}}}', "", 1),
        ("{'name': 'search', 'parameters': {'query': 'x'}}", "", 1),
        ('```json\n{"name": "search", "arguments": {"query": "x"}\n```', "", 1),
        (CALL.replace("{", "{\n  "), "", 1),
    ],
)
def test_calls_and_the_text_around_them(text, content, num_calls):
    assert read(text) == (content, None, [X] * num_calls)


@pytest.mark.parametrize(
    "text",
    [
        "Ashford.",
        '{"name": "Ada", "age": 36}',
        '{"answer": "Ashford"}',
        '[{"name": "Ada"}, {"name": "Bo"}]',
        '```json\n{"name": "Ada"}\n```',
        f"```python\n{CALL}\n```",
        '{"name": "Ada", "age": 36',
        "[1, 2, 3]",
        "{",
    ],
)
def test_other_json_and_code_are_content(text):
    assert read(text) == (text, None, [])


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ('{"name": "search", "arguments": {"query": "x"', "not valid JSON"),
        ('{"name": "search", "arguments": {"query": "say "x""}}', "not valid JSON"),
        ('{"name": "search", "arguments": "x"}', "'arguments' must be an object"),
        (
            '{"name": "s", "arguments": {"q": 1}, "parameters": {"q": 2}}',
            "'arguments' and 'parameters' differ",
        ),
        (f"Sure: {CALL}", "a call must begin its line"),
    ],
)
def test_a_call_that_cannot_be_read_says_why(text, words):
    _, _, (told,) = read(text)
    assert words in told
    assert told.endswith('Write {"name": ..., "arguments": {...}} on a line of its own.')


@pytest.mark.parametrize("dialect", [JSONDialect(), PythonDialect()])
def test_thoughts_stand_apart_and_call_nothing(dialect):
    call = CALL if isinstance(dialect, JSONDialect) else '[search(query="x")]'
    marked = call.replace("x", "what is </think>?")
    assert read(f"<think>perhaps {call}</think>{call}", dialect) == ("", f"perhaps {call}", [X])
    assert read(f"perhaps\n{call}</think>{call}", dialect, in_thought=True)[1:] == (f"perhaps\n{call}", [X])
    assert read(f"<think>perhaps\n{call}", dialect) == ("", f"perhaps\n{call}", [])
    assert read(f"hm</think>{call}", dialect) == ("", "hm", [X])
    assert read(marked, dialect) == ("", None, [("search", {"query": "what is </think>?"})])
    assert read(f"<think>a</think>\n<thinking>b</thinking>{call}", dialect) == ("", "a\nb", [X])


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ('[search(query="x")]', ["search"]),
        (
            'I look.\n[search(query="x"), get_page(url=\'y\', k=3, deep=True, tags=["a"], none=None)]',
            ["search", "get_page"],
        ),
        ('<|python_start|>[search(query="x")]<|python_end|>', ["search"]),
        ("[a.b()]", ["a.b"]),
        ("[1, 2]", []),
        ("It is [search] (sic).", []),
    ],
)
def test_python_calls(text, expected):
    assert [call.name for call in PythonDialect().parse(text).tool_calls] == expected
    assert all(call.error is None for call in PythonDialect().parse(text).tool_calls)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ('[search(query="x"', "not valid Python"),
        ('[search("x")]', "arguments need their names"),
        ("[search(query=open('x'))]", "'query' is no literal"),
        ("[search(query={1, 2})]", "'query' is nothing that JSON has"),
        ("[search(query=1e999)]", "'query' is nothing that JSON has"),
        ("[search(**{})]", "arguments need their names"),
        ("[search(query='x'), 3]", "is no call"),
        ("[search()] and more", "no list of calls"),
        ("[search(q=" + "(" * 10_000 + ")]", "not valid Python"),
    ],
)
def test_python_that_is_no_call_is_explained(text, words):
    told = [call.error for call in PythonDialect().parse(text).tool_calls if call.error]
    assert len(told) == 1 and words in told[0], told
