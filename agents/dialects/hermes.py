"""Calls as Hermes and Qwen write them: JSON between tags."""

from __future__ import annotations

import re
from collections.abc import Sequence

from polyturn.agents.dialects.calls import CallReader, as_recovered, decode_at
from polyturn.envs.messages import AssistantMessage
from polyturn.tools.thoughts import ANY_CLOSING, ANY_OPENING, THOUGHT_MARKS
from polyturn.tools.types import ToolCall, ToolSpec

_OPEN, _CLOSE = "<tool_call>", "</tool_call>"
_EXAMPLE = f'{_OPEN}{{"name": ..., "arguments": {{...}}}}{_CLOSE}'
_MARKS = re.compile(
    f"(?P<call>{_OPEN})|(?P<end>{_CLOSE})|(?P<opening>{ANY_OPENING.pattern})|(?P<closing>{ANY_CLOSING.pattern})"
)
_FIRST = re.compile(
    "["
    + re.escape("".join(sorted({mark[0] for mark in (_OPEN, *THOUGHT_MARKS, *THOUGHT_MARKS.values())})))
    + "]"
)
"""What any mark begins with, which is found far more quickly."""
_SPACE = re.compile(r"\s*")
_MAX_CALL_CHARS = 65_536
"""So far the end of a call is sought whose texts hold the mark of its end."""


class HermesDialect:
    """`<tool_call>{"name": ..., "arguments": {...}}</tool_call>`, any number of times, as Hermes and Qwen write them.

    What stands between `<think>` and `</think>` is the reasoning, and the rest of the text around the calls is the
    content. A thought that is never closed is all reasoning. No thought calls anything, and marks of thoughts within a
    call are a part of it; a `</think>` without a beginning ends a thought that began with the turn, unless a call has
    come before it.
    """

    def __init__(self, *, recovers: bool = True) -> None:
        """
        Args:
            recovers: Whether a malformed call is taken for what it plainly means, else the model is told of it.
        """
        self._reader = CallReader(example=_EXAMPLE, recovers=recovers)

    def parse(
        self, text: str, *, in_thought: bool = False, tools: Sequence[ToolSpec] = ()
    ) -> AssistantMessage:
        """As `Dialect.parse`."""
        del tools
        if not in_thought and _FIRST.search(text) is None:
            return AssistantMessage(content=text.strip(), raw_text=text)
        thoughts: list[str] = []
        contents: list[str] = []
        calls: list[ToolCall] = []
        ends = _Ends(text)
        position = _end_of_thought(text, 0, ANY_CLOSING, thoughts) if in_thought else 0
        while (mark := _MARKS.search(text, position)) is not None:
            before = text[position : mark.start()]
            position = mark.end()
            if mark["call"]:
                contents.append(before)
                found, position = self._calls_at(text, position, len(calls), ends)
                calls += found
            elif mark["end"]:
                found, content = self._unopened(before, len(calls))
                calls += found
                contents.append(content)
            elif mark["opening"]:
                contents.append(before)
                closing = re.compile(re.escape(THOUGHT_MARKS[mark[0]]))
                position = _end_of_thought(text, position, closing, thoughts)
            elif calls:
                contents += [before, mark[0]]
            else:
                thoughts.append("".join((*contents, before)))
                contents.clear()
        contents.append(text[position:])
        return AssistantMessage(
            content="".join(contents).strip(),
            reasoning="\n".join(filter(None, map(str.strip, thoughts))) if thoughts else None,
            tool_calls=tuple(calls),
            raw_text=text,
        )

    def _calls_at(self, text: str, start: int, number: int, ends: _Ends) -> tuple[list[ToolCall], int]:
        """The calls whose inside begins at `start`, and where it is over. Their texts may hold the mark of its end."""
        end = ends.behind(start)
        if self._reader.recovers:
            again = text.find(_OPEN, start, len(text) if end < 0 else end)
            until = again if again >= 0 else len(text)
            if (again >= 0 or end < 0) and _is_whole(text, start, until):
                return as_recovered(self._reader.read(text[start:until], number)), until
        if end < 0:
            return [self._reader.unreadable(number, f"{_OPEN} was not closed by {_CLOSE}")], len(text)
        if (text.count('"', start, end) - text.count('\\"', start, end)) % 2:
            end = max(end, _end_of_call(text, start))
        return self._reader.read(text[start:end], number), end + len(_CLOSE)

    def _unopened(self, before: str, number: int) -> tuple[list[ToolCall], str]:
        """The calls, and the content, before a mark of an end that nothing opened."""
        if '"arguments"' not in before:
            return [], before + _CLOSE
        if self._reader.recovers and before.lstrip().startswith("{"):
            calls = self._reader.read(before, number)
            if all(call.error is None for call in calls):
                return as_recovered(calls), ""
        return [self._reader.unreadable(number, f"{_CLOSE} closes what no {_OPEN} opened")], before


class _Ends:
    """Finds the next mark of an end in a text, looking at every place once."""

    def __init__(self, text: str) -> None:
        self._text = text
        self._next = 0

    def behind(self, start: int) -> int:
        """Where the first one at or behind `start` is, which never goes back; -1 where there is none."""
        if 0 <= self._next < start:
            self._next = self._text.find(_CLOSE, start)
        return self._next


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
    end = _end_of_json(window)
    return start + end if end >= 0 and window.startswith(_CLOSE, end) else -1


def _is_whole(text: str, start: int, end: int) -> bool:
    """Whether one whole JSON value, and nothing else, stands there."""
    return _end_of_json(text[start:end]) == end - start


def _end_of_json(text: str) -> int:
    """Where a text goes on behind the JSON that it begins with, and the white space around it; -1 without JSON."""
    begin = _SPACE.match(text)
    assert begin is not None, "no white space matches, too"
    try:
        _, end = decode_at(text, begin.end())
    except (ValueError, RecursionError):
        return -1
    behind = _SPACE.match(text, end)
    assert behind is not None, "no white space matches, too"
    return behind.end()
