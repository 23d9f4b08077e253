"""Calls that are written as JSON without marks of their own: bare, or in a code fence."""

from __future__ import annotations

import re
from collections.abc import Sequence

from polyturn.agents.dialects.calls import CallReader, decode_at, is_call
from polyturn.agents.dialects.thoughts import leading_thoughts
from polyturn.envs.messages import AssistantMessage
from polyturn.tools.types import ToolCall, ToolSpec

_EXAMPLE = '{"name": ..., "arguments": {...}} on a line of its own'
_OBJECT = r"""(?:\[\s{0,9})?\{{1,2}\s{0,9}["'](?:type|id|name|function|arguments|parameters)["']\s{0,9}:"""
"""How a call begins, perhaps in a list: with one of its keys."""
_OBJECT_HERE = re.compile(_OBJECT)
_PLACE = re.compile(
    rf"^[ \t]*(?:```(?P<fence>[\w-]*)[ \t]*$|(?:<\|python_tag\|>|\[TOOL_CALLS\])?\s{{0,9}}(?P<object>{_OBJECT}))",
    re.MULTILINE,
)
"""A line that opens a code fence, or that a call begins."""
_FENCE_END = re.compile(r"^[ \t]*```[ \t]*$", re.MULTILINE)
_EMPTY_FENCE = re.compile(r"^[ \t]*```[\w-]*\s*```[ \t]*$", re.MULTILINE)
_LANGUAGES = ("", "json", "tool_call", "tool_calls")
_BETWEEN = re.compile(r"\s*[;,]?\s*")
_ARGUMENTS = re.compile(r"""["'](?:arguments|parameters)["']\s*:""")


class JSONDialect:
    """`{"name": ..., "arguments": {...}}` without marks around it, as Llama 3.1 and many small models write calls.

    An object or a list of objects is a call where it begins a line, in a code fence or without one, and has both of the
    keys that make a call: `name` or `function`, and `arguments` or `parameters`. Any other JSON is content, such as an
    answer that is to be JSON, and so is code in another language. Several calls stand one behind another, with `;` or
    `,` or nothing between them. Thoughts at the beginning are the reasoning.
    """

    def __init__(self, *, recovers: bool = True) -> None:
        """
        Args:
            recovers: Whether a malformed call is taken for what it plainly means, else the model is told of it.
        """
        self._reader = CallReader(example=_EXAMPLE, recovers=recovers, any_spelling=True)

    def parse(
        self, text: str, *, in_thought: bool = False, tools: Sequence[ToolSpec] = ()
    ) -> AssistantMessage:
        """As `Dialect.parse`."""
        del tools
        objects = (found.start() for found in _PLACE.finditer(text) if found["object"]) if "{" in text else ()
        first = next(iter(objects), -1)
        reasoning, position = leading_thoughts(text, in_thought=in_thought, first_call=first)
        rest, position = text[position:], 0
        if first < 0 and "{" not in rest:
            return AssistantMessage(content=rest.strip(), reasoning=reasoning, raw_text=text)
        contents: list[str] = []
        calls: list[ToolCall] = []
        is_within = False
        while (place := _PLACE.search(rest, position)) is not None:
            contents.append(rest[position : place.start()])
            is_within = is_within or _is_within(contents[-1])
            if place["object"] is None:
                position = place.end()
                if place["fence"].lower() not in _LANGUAGES:
                    # Code, which may show a call and is none.
                    end = _FENCE_END.search(rest, position)
                    position = end.end() if end else len(rest)
                contents.append(rest[place.start() : position])
                continue
            found, position = self._read_at(rest, place.start("object"), len(calls))
            calls += found
            if not found:
                contents.append(rest[place.start() : position])
        contents.append(rest[position:])
        content = "".join(contents)
        if calls:
            content = _EMPTY_FENCE.sub("", content)
        elif is_within or _is_within(contents[-1]):
            calls.append(self._reader.unreadable(0, "a call must begin its line"))
        return AssistantMessage(
            content=content.strip(), reasoning=reasoning, tool_calls=tuple(calls), raw_text=text
        )

    def _read_at(self, text: str, start: int, number: int) -> tuple[list[ToolCall], int]:
        """The calls in a row that begin at `start`, and where they are over; none where other JSON stands there."""
        calls: list[ToolCall] = []
        position = start
        while True:
            try:
                value, end = decode_at(text, position)
            except (ValueError, RecursionError):
                found, position = self._read_broken(text, position, number + len(calls))
                return calls + found, position
            if not is_call(value):
                return calls, position if calls else end
            calls += self._reader.calls_of([value], number + len(calls))
            between = _BETWEEN.match(text, end)
            assert between is not None, "nothing matches, too"
            if _OBJECT_HERE.match(text, between.end()) is None:
                return calls, end
            position = between.end()

    def _read_broken(self, text: str, start: int, number: int) -> tuple[list[ToolCall], int]:
        """As `_read_at`, of what is no JSON. It goes to the end of its code fence or of the text."""
        fence = _FENCE_END.search(text, start)
        end = fence.start() if fence else len(text)
        if _ARGUMENTS.search(text, start, end) is None:
            return [], end
        return self._reader.read(text[start:end], number, is_closed=fence is not None), end


def _is_within(content: str) -> bool:
    """Whether a line holds a call that does not begin it."""
    for line in content.splitlines():
        found = _OBJECT_HERE.search(line)
        if found is not None and _ARGUMENTS.search(line, found.start()) is not None:
            return True
    return False
