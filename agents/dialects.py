"""How a model writes its answers: dialects that turn its text into thoughts, tool calls and what it says."""

from __future__ import annotations

import difflib
import functools
import json
import math
import re
from collections.abc import Callable
from typing import Any, Protocol

from polyturn.envs.messages import AssistantMessage
from polyturn.envs.search.styles import TAGS, Tags, parse_turn
from polyturn.tools.thoughts import ANY_CLOSING, ANY_OPENING, THOUGHT_MARKS
from polyturn.tools.types import ToolCall

_OPEN, _CLOSE = "<tool_call>", "</tool_call>"
_EXAMPLE = '{"name": ..., "arguments": {...}}'
_MARKS = re.compile(
    f"(?P<call>{_OPEN})|(?P<opening>{ANY_OPENING.pattern})|(?P<closing>{ANY_CLOSING.pattern})"
)
_DECODER = json.JSONDecoder()
_MAX_CALL_CHARS = 65_536
"""So far the end of a call is sought whose texts hold the mark of its end."""


class Dialect(Protocol):
    """Reads the text of a turn."""

    def parse(self, text: str, *, in_thought: bool = False) -> AssistantMessage:
        """The message that `text` is. Never raises: a call that cannot be read carries its error.

        Args:
            in_thought: Whether the prompt has opened a thought already, which the text goes on with.
        """
        ...


class HermesDialect:
    """`<tool_call>{"name": ..., "arguments": {...}}</tool_call>`, any number of times, as Hermes and Qwen write them.

    What stands between `<think>` and `</think>` is the reasoning, and the rest of the text around the calls is the
    content. A thought that is never closed is all reasoning. No thought calls anything, and marks of thoughts within a
    call are a part of it; a `</think>` without a beginning ends a thought that began with the turn, unless a call has
    come before it.
    """

    def parse(self, text: str, *, in_thought: bool = False) -> AssistantMessage:
        thoughts: list[str] = []
        contents: list[str] = []
        calls: list[ToolCall] = []
        position = _end_of_thought(text, 0, ANY_CLOSING, thoughts) if in_thought else 0
        while (mark := _MARKS.search(text, position)) is not None:
            contents.append(text[position : mark.start()])
            if mark["call"]:
                call, position = _call_at(text, mark.end(), f"call_{len(calls)}")
                calls.append(call)
            elif mark["opening"]:
                closing = re.compile(re.escape(THOUGHT_MARKS[mark[0]]))
                position = _end_of_thought(text, mark.end(), closing, thoughts)
            else:
                position = mark.end()
                if calls:
                    contents.append(mark[0])
                else:
                    thoughts.append("".join(contents))
                    contents.clear()
        contents.append(text[position:])
        return AssistantMessage(
            content="".join(contents).strip(),
            reasoning="\n".join(filter(None, map(str.strip, thoughts))) if thoughts else None,
            tool_calls=tuple(calls),
            raw_text=text,
        )


class TagDialect:
    """Actions in tags, such as Search-R1's `<search>query</search>`: the first of a turn counts.

    What an environment answers belongs to the same assistant turn: such a dialect needs a `ContinuationRenderer`.
    """

    def __init__(self, tags: Tags) -> None:
        self.tags = tags

    def parse(self, text: str, *, in_thought: bool = False) -> AssistantMessage:
        """As `Dialect.parse`; thoughts are in tags of the style, and stay in the content."""
        del in_thought
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


def _end_of_thought(text: str, start: int, closing: re.Pattern[str], thoughts: list[str]) -> int:
    """Where the thought that begins at `start` is over; it joins `thoughts`. Without an end it takes all the rest.

    A mark within a whole call that is thought of is a part of that call.
    """
    position = start
    while (end := closing.search(text, position)) is not None:
        opened = text.rfind(_OPEN, position, end.start())
        position = -1 if opened < 0 else _end_of_call(text, opened + len(_OPEN))
        if position < end.start():
            break
    thoughts.append(text[start : end.start() if end else len(text)])
    return end.end() if end else len(text)


def _end_of_call(text: str, start: int) -> int:
    """Where `</tool_call>` stands behind the JSON that begins at `start`; -1 without both, or too far to look."""
    window = text[start : start + _MAX_CALL_CHARS]
    inside = window.lstrip()
    try:
        _, length = _DECODER.raw_decode(inside)
    except (ValueError, RecursionError):
        return -1
    behind = inside[length:].lstrip()
    return start + len(window) - len(behind) if behind.startswith(_CLOSE) else -1


def _call_at(text: str, start: int, call_id: str) -> tuple[ToolCall, int]:
    """The call whose inside begins at `start`, and where it is over. Its own texts may hold the mark of its end."""
    end = text.find(_CLOSE, start)
    if end < 0:
        return _unreadable(call_id, f"{_OPEN} was not closed by {_CLOSE}"), len(text)
    if (text.count('"', start, end) - text.count('\\"', start, end)) % 2:
        end = max(end, _end_of_call(text, start))
    return _read_call(call_id, text[start:end]), end + len(_CLOSE)


def _read_call(call_id: str, text: str) -> ToolCall:
    try:
        call = _READER.decode(text)
        if not text.isascii() or "\\u" in text or text.count("{") + text.count("[") > _FEW_LEVELS:
            # Half of a surrogate pair can be parsed, but not written down again.
            _WRITER.encode(call).encode()
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


def _finite(text: str) -> float:
    """As `float`. 1e999 can be parsed, but not written down again."""
    value = float(text)
    if math.isinf(value):
        raise ValueError(f"{text} is too large for a number")
    return value


_READER = json.JSONDecoder(parse_constant=_refuse_constant, parse_float=_finite)
_WRITER = json.JSONEncoder(ensure_ascii=False, allow_nan=False)
_FEW_LEVELS = 32
