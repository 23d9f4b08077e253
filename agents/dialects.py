"""Dialects: how a model writes its actions in its text."""

from __future__ import annotations

import difflib
import functools
import json
from collections.abc import Callable
from typing import Any, Protocol

from polyturn.envs.messages import AssistantMessage
from polyturn.envs.search.styles import TAGS, Tags
from polyturn.envs.search.tags import parse_turn
from polyturn.tools.types import ToolCall

_OPEN, _CLOSE = "<tool_call>", "</tool_call>"
_THOUGHT_END = "</think>"
_EXAMPLE = '{"name": ..., "arguments": {...}}'


class Dialect(Protocol):
    """Reads the text of a turn."""

    def parse(self, text: str) -> AssistantMessage:
        """The message that `text` is. Never raises: a call that cannot be read carries its error."""
        ...


class HermesDialect:
    """`<tool_call>{"name": ..., "arguments": {...}}</tool_call>`, any number of times, as Hermes and Qwen write them.

    The text around the calls is the content. Nothing before `</think>` is taken for a call.
    """

    def parse(self, text: str) -> AssistantMessage:
        thought, end, rest = text.rpartition(_THOUGHT_END)
        contents = [thought + end]
        calls: list[ToolCall] = []
        while True:
            before, opened, behind = rest.partition(_OPEN)
            contents.append(before)
            if not opened:
                break
            inside, closed, rest = behind.partition(_CLOSE)
            calls.append(_read_call(f"call_{len(calls)}", inside, closed=bool(closed)))
        return AssistantMessage(content="".join(contents).strip(), tool_calls=tuple(calls), raw_text=text)


class TagDialect:
    """Actions in tags, such as Search-R1's `<search>query</search>`: the first of a turn counts.

    What an environment answers belongs to the same assistant turn: such a dialect needs a `ContinuationRenderer`.
    """

    def __init__(self, tags: Tags) -> None:
        self.tags = tags

    def parse(self, text: str) -> AssistantMessage:
        return parse_turn(text, self.tags)


_DIALECTS: dict[str, Callable[[], Dialect]] = {
    "hermes": HermesDialect,
    **{name: functools.partial(TagDialect, tags) for name, tags in TAGS.items()},
}


def make_dialect(name: str) -> Dialect:
    """The dialect of that name.

    Raises:
        ValueError: there is none.
    """
    if name not in _DIALECTS:
        raise ValueError(f"unknown dialect {name!r}; the dialects are {', '.join(_DIALECTS)}")
    return _DIALECTS[name]()


def _read_call(call_id: str, text: str, *, closed: bool) -> ToolCall:
    if not closed:
        return _unreadable(call_id, f"{_OPEN} was not closed by {_CLOSE}")
    try:
        call = json.loads(text, parse_constant=_refuse_constant)
        # Half of a surrogate pair and 1e999 can be parsed, but not written down again.
        json.dumps(call, ensure_ascii=False, allow_nan=False).encode()
    except json.JSONDecodeError as error:
        return _unreadable(
            call_id, f"not valid JSON: {error.msg} at line {error.lineno} column {error.colno}"
        )
    except (ValueError, RecursionError) as error:
        return _unreadable(call_id, f"not valid JSON: {error}")
    if not isinstance(call, dict):
        return _unreadable(call_id, f"a {_type_name(call)} in place of an object")
    name, arguments = call.get("name"), call.get("arguments")
    if not isinstance(name, str):
        return _unreadable(call_id, _missing(call, "name", "a string"))
    if not isinstance(arguments, dict):
        return _unreadable(call_id, _missing(call, "arguments", "an object"), name=name)
    return ToolCall(id=call_id, name=name, arguments=arguments)


def _unreadable(call_id: str, reason: str, *, name: str = "") -> ToolCall:
    error = f"The tool call could not be read: {reason}. Write {_OPEN}{_EXAMPLE}{_CLOSE}."
    return ToolCall(id=call_id, name=name, error=error)


def _missing(call: dict[str, Any], key: str, kind: str) -> str:
    if key in call:
        return f"'{key}' must be {kind}, not a {_type_name(call[key])}"
    near = difflib.get_close_matches(key, call, n=1, cutoff=0.5)
    return f"'{key}' is missing" + (f"; you wrote {near[0]!r}" if near else "")


def _type_name(value: Any) -> str:
    names = {str: "string", bool: "boolean", int: "number", float: "number", list: "list", dict: "object"}
    return names.get(type(value), "null")


def _refuse_constant(text: str) -> None:
    raise ValueError(f"{text} is no JSON value")
