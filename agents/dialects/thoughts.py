"""Thoughts before what a turn says and calls."""

from __future__ import annotations

import re

from polyturn.tools.thoughts import ANY_CLOSING, ANY_OPENING, THOUGHT_MARKS

_SPACE = re.compile(r"\s*")


def leading_thoughts(text: str, *, in_thought: bool, first_call: int) -> tuple[str | None, int]:
    """The thoughts that a text begins with, None where it does not think, and where the text behind them begins.

    A thought that is never closed is all of the rest. A mark that closes what nothing opened ends a thought that began
    before the text, unless a call has come before it.

    Args:
        in_thought: Whether the prompt has opened a thought already, which the text goes on with.
        first_call: Where the first mark of a call is; -1 where there is none.
    """
    thoughts: list[str] = []
    position = 0
    if in_thought or (
        _opening(text, 0) is None
        and (closing := ANY_CLOSING.search(text)) is not None
        and (first_call < 0 or closing.start() < first_call)
        and ANY_OPENING.search(text, 0, closing.start()) is None
    ):
        position = _take(text, 0, ANY_CLOSING, thoughts)
    while (opening := _opening(text, position)) is not None:
        position = _take(text, opening.end(), re.compile(re.escape(THOUGHT_MARKS[opening[0]])), thoughts)
    return ("\n".join(filter(None, map(str.strip, thoughts))) if thoughts else None), position


def _opening(text: str, position: int) -> re.Match[str] | None:
    """The mark that opens a thought there, behind white space."""
    space = _SPACE.match(text, position)
    assert space is not None, "no white space matches, too"
    return ANY_OPENING.match(text, space.end())


def _take(text: str, start: int, closing: re.Pattern[str], thoughts: list[str]) -> int:
    """Where the thought that begins at `start` is over; it joins `thoughts`."""
    end = closing.search(text, start)
    thoughts.append(text[start : end.start() if end else len(text)])
    return end.end() if end else len(text)
