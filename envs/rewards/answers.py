"""Which part of a message is its answer. The label is never looked at, so naming many answers does not help."""

from __future__ import annotations

import re
from typing import Literal

Where = Literal["all", "last_line", "boxed", "tag"]
"""`all` of the message, its `last_line` that is not blank, its `\\boxed{...}`, or its `<answer>...</answer>`."""

THINKING_ENDS = "</think>"
MAX_CHARS = 20_000
"""Longer answers are not read: nothing that is graded here is so long."""

_OPEN, _CLOSE = "<answer>", "</answer>"
_BRACES = re.compile(r"\\(?:boxed|fbox)\s*+\{|[{}]")
_REFUSAL = re.compile(
    r"^\W*(?:sorry[,.]?\s*)?(?:i\s+(?:really\s+|honestly\s+)?(?:do\s+not|don['\u2019]?t|can\s*not|can['\u2019]?t)\s+(?:know|tell|say|answer"
    r"|determine)|i['\u2019]?m\s+(?:not\s+sure|unsure)|i\s+am\s+(?:not\s+sure|unsure)|not\s+sure|no\s+idea|i\s+have\s+no\s+idea"
    r"|idk\b|unknown\b|n/?a\b|(?:it\s+)?cannot\s+be\s+determined)",
    re.IGNORECASE,
)


def find_answer(text: str, where: Where = "all") -> str | None:
    """The answer in a message, without its thinking; None where there is none, or where there are several.

    A message whose thinking does not end has no answer. Several boxes or tags that hold the same are one.
    """
    if THINKING_ENDS in text:
        text = text.rpartition(THINKING_ENDS)[2]
    elif "<think>" in text:
        return None
    text = text.strip()
    if not text or len(text) > MAX_CHARS:
        return None
    if where == "all":
        return text
    if where == "last_line":
        return text.splitlines()[-1].strip() or None
    found = _tags(text) if where == "tag" else _boxes(text)
    distinct = {" ".join(answer.split()) for answer in found}
    answer = distinct.pop() if len(distinct) == 1 else ""
    return answer or None


def place_answer(answer: str, where: Where = "all") -> str:
    """A message with an answer where `find_answer` looks for it."""
    if where == "boxed":
        return f"\\boxed{{{answer}}}"
    return f"<answer>{answer}</answer>" if where == "tag" else answer


def is_refusal(text: str) -> bool:
    """Whether an answer begins by saying that there is none: "I do not know", "unknown", "cannot be determined"."""
    return _REFUSAL.match(text[:200]) is not None


def _tags(text: str) -> list[str]:
    """What stands in the tags that are closed, in one pass."""
    found: list[str] = []
    end = 0
    while (start := text.find(_OPEN, end)) >= 0:
        close = text.find(_CLOSE, start)
        if close < 0:
            break
        found.append(text[start + len(_OPEN) : close])
        end = close + len(_CLOSE)
    return found


def _boxes(text: str) -> list[str]:
    """What stands in the outermost boxes whose braces are closed, in one pass."""
    spans: list[tuple[int, int]] = []
    # Where the content of a box begins; None: another brace.
    opened: list[int | None] = []
    for brace in _BRACES.finditer(text):
        if brace[0] != "}":
            opened.append(brace.end() if brace[0] != "{" else None)
        elif opened and (start := opened.pop()) is not None:
            while spans and spans[-1][0] > start:  # boxes within this one
                spans.pop()
            spans.append((start, brace.start()))
    return [text[start:end] for start, end in spans]
