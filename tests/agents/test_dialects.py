"""The Hermes dialect: every text has a message, and a call that cannot be read says why."""

import json
import re
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from polyturn.agents.dialects import HermesDialect, make_dialect
from polyturn.agents.dialects.registry import OWN
from polyturn.configs.dialects import DIALECTS
from polyturn.envs.messages import AssistantMessage
from polyturn.envs.search.styles import TAGS
from polyturn.tools.types import ToolCall

CALL = '<tool_call>\n{"name": "search", "arguments": {"query": "x"}}\n</tool_call>'


def parse(text):
    return HermesDialect(recovers=False).parse(text)


def test_calls_and_the_text_around_them():
    message = parse(f"First.\n{CALL}\nthen {CALL} last")
    assert message.content == "First.\n\nthen  last"
    assert [(call.id, call.name, call.arguments, call.error) for call in message.tool_calls] == [
        ("call_0", "search", {"query": "x"}, None),
        ("call_1", "search", {"query": "x"}, None),
    ]
    assert message.raw_text == f"First.\n{CALL}\nthen {CALL} last"


def test_text_without_a_call_is_content():
    message = parse("Ashford </tool_call> is it.\n")
    assert (message.content, message.tool_calls) == ("Ashford </tool_call> is it.", ())


def test_thoughts_call_nothing():
    message = parse(f"<think>perhaps {CALL}</think>{CALL}")
    assert len(message.tool_calls) == 1
    assert (message.reasoning, message.content) == (f"perhaps {CALL}", "")


MARKED_CALL = CALL.replace('"x"', '"what does </think> mean"')


@pytest.mark.parametrize(
    ("text", "in_thought", "reasoning", "content", "num_calls"),
    [
        ("<think>1+1 is 2</think>\n\n2", False, "1+1 is 2", "2", 0),
        ("1+1 is 2</think>\n\n2", True, "1+1 is 2", "2", 0),
        ("1+1 is 2</think>\n\n2", False, "1+1 is 2", "2", 0),
        ("2", True, "2", "", 0),
        ("<think></think>2", False, "", "2", 0),
        ("[THINK]hm[/THINK]2", False, "hm", "2", 0),
        (MARKED_CALL, False, None, "", 1),
        (f"{CALL} that ends in </think>, see", False, None, "that ends in </think>, see", 1),
        (f"<think>perhaps {CALL}", False, f"perhaps {CALL}", "", 0),
        (f"perhaps {CALL}", True, f"perhaps {CALL}", "", 0),
        (f"perhaps {MARKED_CALL}", True, f"perhaps {MARKED_CALL}", "", 0),
        (f"perhaps {CALL}</think>{CALL}", True, f"perhaps {CALL}", "", 1),
        (f"<think>a</think>{CALL}<think>b</think>c", False, "a\nb", "c", 1),
        ("<think>Outer <think>inner</think> goes on</think>c", False, "Outer <think>inner\ngoes on", "c", 0),
        ("<think>`</think>` ends a block</think>\n\nc", False, "`\n` ends a block", "c", 0),
        ("<|channel>thought\nhm\n<channel|>c", False, "hm", "c", 0),
        ("<thinking>hm</thinking>\n2", False, "hm", "2", 0),
        ("<thought>\nhm\n</thought>\n2", False, "hm", "2", 0),
        (f"<longcat_think>{CALL}</longcat_think>2", False, CALL, "2", 0),
        ("<|inner_prefix|>hm<|inner_suffix|>2", False, "hm", "2", 0),
    ],
)
def test_reasoning_stands_beside_the_content(text, in_thought, reasoning, content, num_calls):
    message = HermesDialect().parse(text, in_thought=in_thought)
    assert (message.reasoning, message.content, len(message.tool_calls)) == (reasoning, content, num_calls)
    assert all(call.error is None for call in message.tool_calls)
    assert message.to_message().get("reasoning") == reasoning


def test_a_call_may_hold_the_mark_of_its_own_end():
    (call,) = parse(CALL.replace('"x"', '"</tool_call> \\"quoted\\" <tool_call>"')).tool_calls
    assert call.arguments == {"query": '</tool_call> "quoted" <tool_call>'}


@pytest.mark.parametrize(
    ("inside", "words"),
    [
        ('{"name": "search", "arguments": {}', "not valid JSON: .* line 1 column"),
        ('{"name": "search"}', "'arguments' is missing"),
        ('{"name": "search", "argments": {}}', "'arguments' is missing; you wrote 'argments'"),
        ('{"name": "search", "arguments": "x"}', "'arguments' must be an object, not a string"),
        ('{"name": "search", "arguments": null}', "'arguments' must be an object, not a null"),
        ('{"arguments": {}}', "'name' is missing"),
        ('{"name": 3, "arguments": {}}', "'name' must be a string, not a number"),
        ("[1]", "a list in place of an object"),
        ("", "not valid JSON"),
        ('{"name": "s", "arguments": {"x": NaN}}', "NaN is no JSON value"),
        ('{"name": "s", "arguments": {"x": 1e999}}', "not valid JSON"),
        ('{"name": "s", "arguments": {"x": "\\ud800"}}', "not valid JSON"),
        ('{"name": "s", "arguments": {"x": ' + "[" * 100_000 + "}}", "not valid JSON"),
        ('{"name": "s", "arguments": {"x": ' + "1" * 10_000 + "}}", "not valid JSON"),
    ],
)
def test_a_call_that_cannot_be_read_says_why_and_how_to_write_it(inside, words):
    (call,) = parse(f"<tool_call>{inside}</tool_call>").tool_calls
    assert call.arguments == {}
    with pytest.raises(AssertionError, match=words):
        raise AssertionError(call.error)
    assert call.error.endswith('Write <tool_call>{"name": ..., "arguments": {...}}</tool_call>.')


def test_an_unclosed_call_is_one_that_cannot_be_read():
    message = parse('<tool_call>{"name": "search", "arguments": {}}')
    assert "was not closed" in message.tool_calls[0].error
    (call,) = parse(f"<tool_call>{{ {CALL}").tool_calls
    assert "not valid JSON" in call.error


fragments = st.sampled_from(
    [
        "<tool_call>",
        "</tool_call>",
        "<think>",
        "</think>",
        '{"name": "a", "arguments": ',
        "{}",
        "}",
        '"',
        "\\u",
        "[",
        "1e999",
    ]
)


@given(st.lists(fragments | st.text(max_size=5)).map("".join))
def test_any_text_has_a_message_that_can_be_written_down(text):
    message = parse(text)
    assert message.raw_text == text
    for call in message.tool_calls:
        assert (call.error is None) or call.arguments == {}
        assert isinstance(call.name, str)
    json.dumps(message.to_message(), ensure_ascii=False, allow_nan=False)


def test_dialects_by_name():
    assert isinstance(make_dialect("hermes"), HermesDialect)
    with pytest.raises(ValueError, match="unknown dialect 'verilog'; the dialects are hermes"):
        make_dialect("verilog")
    with pytest.raises(ValueError, match="unknown dialect 'hermess', did you mean 'hermes'"):
        make_dialect("hermess")


PAGE = Path(__file__).parents[2] / "docs" / "dialects.md"


def test_the_names_of_the_config_are_those_that_there_are_and_are_documented():
    assert {*DIALECTS} == {*OWN, *TAGS}
    text = PAGE.read_text(encoding="utf-8")
    for name in (*DIALECTS, "auto"):
        assert f"| `{name}`" in text or f", `{name}`" in text, name


def test_the_documented_dialect_works():
    text = PAGE.read_text(encoding="utf-8")
    block = re.search(r"```python\n(.*?)```", text, re.DOTALL)
    names = {"ToolCall": ToolCall, "AssistantMessage": AssistantMessage}
    exec(compile(block[1], "docs/dialects.md", "exec"), names)
    (call,) = names["Shouts"]().parse("I look.\nCALL search: Ida").tool_calls
    assert (call.id, call.name, call.arguments) == ("call_0", "search", {"query": "Ida"})


OWN_DIALECT = """
from polyturn.envs.messages import AssistantMessage

class Shouts:
    def parse(self, text, *, in_thought=False, tools=()):
        return AssistantMessage(content=text.upper(), raw_text=text)

class Silent:
    def parse(self, text):
        return AssistantMessage()
"""


def test_a_dialect_of_ones_own_is_named_by_its_file(tmp_path):
    (tmp_path / "own.py").write_text(OWN_DIALECT)
    assert make_dialect(f"{tmp_path}/own.py:Shouts").parse("hm").content == "HM"
    with pytest.raises(ValueError, match="cannot be called as a dialect"):
        make_dialect(f"{tmp_path}/own.py:Silent")
    with pytest.raises(ValueError, match="has no 'Shout', did you mean 'Shouts'"):
        make_dialect(f"{tmp_path}/own.py:Shout")
