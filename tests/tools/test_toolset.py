"""Calls are validated in words that help; a tool's own failure is told apart from the model's mistake."""

import json

import pytest

from polyturn.tools.tool import tool
from polyturn.tools.toolset import Toolset
from polyturn.tools.types import ToolCall, ToolError


@tool
def search(query: str, top_k: int = 3) -> list[str]:
    """Search."""
    return [query] * top_k


@tool
def divide(a: float, b: float) -> float:
    """Divide."""
    if b == 0:
        raise ToolError("b must not be 0")
    return a / b


@tool
def broken(kind: str = "x") -> str:
    """Fail."""
    raise ConnectionError("backend is gone")


@tool
async def wait(seconds: float) -> str:
    """Wait."""
    if seconds < 0:
        raise ToolError("not that long ago")
    return "done"


TOOLS = Toolset([search, divide, broken, wait])


def call(name, **arguments):
    return TOOLS.call(ToolCall(id="c1", name=name, arguments=arguments))


def test_results_are_text():
    result = call("search", query="ä", top_k=2)
    assert (result.ok, result.call_id, result.name) == (True, "c1", "search")
    assert json.loads(result.content) == ["ä", "ä"]
    assert "ä" in result.content
    assert call("divide", a=1, b=2).content == "0.5"


@pytest.mark.parametrize(
    ("name", "arguments", "words"),
    [
        ("serch", {}, ["no tool 'serch'", "did you mean 'search'", "search, divide, broken, wait"]),
        ("search", {}, ["missing argument 'query' (string)"]),
        (
            "search",
            {"qeury": "x"},
            ["unknown argument 'qeury' (did you mean 'query'?)", "missing argument 'query'"],
        ),
        ("search", {"query": "x", "top_k": "3"}, ["'top_k' must be integer, not \"3\""]),
        ("search", {"query": "x", "top_k": 3.0}, ["'top_k' must be integer, not 3.0"]),
        ("search", {"query": "x", "top_k": True}, ["'top_k' must be integer, not true"]),
        ("divide", {}, ["missing arguments 'a' (number), 'b' (number)"]),
    ],
)
def test_mistakes_are_told_in_words_that_help(name, arguments, words):
    result = call(name, **arguments)
    assert not result.ok
    for word in words:
        assert word in result.content


def test_choices_and_nested_values_are_named():
    toolset = Toolset([_typed()])
    result = toolset.call(ToolCall(id="c", name="typed", arguments={"unit": "K", "values": [1, "2"]}))
    assert '\'unit\' must be one of "C", "F", not "K"' in result.content
    assert "'values[1]' must be integer, not \"2\"" in result.content


def _typed():
    from typing import Literal

    @tool
    def typed(unit: Literal["C", "F"], values: list[int]) -> str:
        """Typed."""
        return unit

    return typed


def test_a_call_that_could_not_be_read_is_answered_with_its_error():
    result = TOOLS.call(ToolCall(id="c", name="search", error="not valid JSON"))
    assert (result.ok, result.content) == (False, "not valid JSON")


def test_a_tool_error_is_a_result_and_any_other_exception_is_not():
    assert call("divide", a=1, b=0).content == "b must not be 0"
    assert not call("divide", a=1, b=0).ok
    with pytest.raises(ConnectionError, match="backend is gone"):
        call("broken")


async def test_async_tools_are_awaited():
    assert (await TOOLS.call_async(ToolCall(id="c", name="wait", arguments={"seconds": 0}))).content == "done"
    assert not (await TOOLS.call_async(ToolCall(id="c", name="wait", arguments={"seconds": -1}))).ok
    assert (await TOOLS.call_async(ToolCall(id="c", name="search", arguments={"query": "x"}))).ok
    with pytest.raises(RuntimeError, match="await call_async"):
        call("wait", seconds=0)


def test_two_tools_cannot_share_a_name():
    with pytest.raises(ValueError, match="two tools are called 'search'"):
        Toolset([search, search])
