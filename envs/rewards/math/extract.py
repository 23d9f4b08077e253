"""The answer in a reply: the last box after the thinking, `#### 42`, `<answer>`, "the answer is ...", or all of it."""

from __future__ import annotations

import re
from dataclasses import dataclass

MAX_PLAIN = 120
"""Characters of a reply that is nothing but an answer."""

_THINKING_ENDS = re.compile(
    r"</think(?:ing)?>|\[/THINK\]|<\|channel\|>final<\|message\|>|</reasoning>", re.IGNORECASE
)
_THINKING_BEGINS = re.compile(r"<think(?:ing)?>|\[THINK\]|<reasoning>", re.IGNORECASE)
_BRACES = re.compile(r"\\(?:boxed|fbox)(?![A-Za-z])\s*|\\.|[{}]", re.DOTALL)
_BARE_BOX = re.compile(r"\\[A-Za-z]+|-?\d+(?:\.\d+)?|[A-Za-z]")
_BETWEEN = re.compile(
    r"[\s$,;.&*]*(?:\\[()\[\]])*[\s$,;&*]*(?:and|or|\\text\s*\{\s*(?:and|or)\s*\}|\\quad|\\\\)?[\s$,;&*]*(?:\\[()\[\]])*[\s$,;&*]*"
)
_HASHES = re.compile(r"####[ \t]*([^\n]+)")
_OPENING_TAG, _CLOSING_TAG = "<answer>", "</answer>"
_PHRASE = re.compile(
    r"\b(?:(?:final\s+)?(?:answer|result)|(?:correct|right|best)\s+(?:option|choice))"
    r"\**\s*(?:\([^()\n]{0,40}\)\s*)?"
    r"(?:\**\s*[:=]\**|(?:of|to|for)\s[^.\n]{0,80}?\s(?:is|:)|is|was|equals)(?![A-Za-z])\s*:?\**",
    re.IGNORECASE,
)
_LEAD = re.compile(
    r"[\s:*_]*(?:(?:therefore|thus|simply|indeed|then|just|clearly|equal to|exactly|option|choice)\b[\s:*,]*)*",
    re.IGNORECASE,
)
_TAIL = re.compile(
    r",?\s+(?:because|since|which|when|where|as\s|so\s|but\s|I hope|given that|for\s|by\s).*$",
    re.DOTALL | re.IGNORECASE,
)
_SENTENCE_END = re.compile(r"[.!?](?=\s+[A-Z*\"(]|\s*$)|\n\s*\n")
_DENIED = re.compile(r"(?:not|unknown|unclear|hard to|neither|unsure)\b", re.IGNORECASE)
_CONCLUSION = re.compile(
    r"(?:^|[.!?\n]\s*)(?:so|thus|therefore|hence|finally|in total|altogether|in conclusion|consequently)\b"
    r"([^\n]*?)[.!]?\s*$",
    re.IGNORECASE,
)
_VERB = re.compile(
    r"(?:=|\b(?:is|are|equals|gives?|get|have|has|costs?|makes?|made|earns?|earned|be)\b)", re.IGNORECASE
)
_DISPLAY = re.compile(r"\s*(\$\$.+?\$\$|\\\[.+?\\\]|\$[^$\n]+\$(?=[\s.]*$))", re.DOTALL)


@dataclass(frozen=True, slots=True)
class Extracted:
    """An answer and where in the reply it begins."""

    text: str
    start: int


def extract(reply: str, *, box_only: bool = False) -> str | None:
    """The answer that a reply commits to; None where it commits to none.

    Boxes that follow one another with nothing but `and`, `or` or punctuation between are one answer with several parts.

    Args:
        reply: All that a model wrote.
        box_only: Whether only a box counts.
    """
    text = _after_thinking(reply)
    if text is None:
        return None
    box = _last_box(text)
    if box_only:
        return box.text if box else None
    marked = [found for found in (box, _last(_HASHES, text), _last_tag(text)) if found is not None]
    if marked:
        return max(marked, key=lambda found: found.start).text.strip() or None
    return _phrase(text) or _conclusion(text) or _plain(text)


def gold_answer(gold: str) -> str:
    """The answer in a gold solution: its last box, what follows its `####`, or all of it."""
    if "\\boxed" in gold or "\\fbox" in gold:
        box = _last_box(gold)
        return box.text if box else gold
    found = _last(_HASHES, gold) if "####" in gold else None
    return found.text.strip() if found else gold


def _after_thinking(reply: str) -> str | None:
    """What follows the thinking; None where the thinking never ends."""
    end = 0
    for found in _THINKING_ENDS.finditer(reply):
        end = found.end()
    return None if _THINKING_BEGINS.search(reply, end) else reply[end:]


def _last_box(text: str) -> Extracted | None:
    """The last balanced box, with those that belong to the same statement."""
    if "\\boxed" not in text and "\\fbox" not in text:
        return None
    boxes = _boxes(text)
    if not boxes:
        return None
    parts = [boxes[-1]]
    for box in reversed(boxes[:-1]):
        gap = text[box[1] : parts[0][0]]
        if len(gap) > 60 or not _BETWEEN.fullmatch(gap):
            break
        parts.insert(0, box)
    contents = list(dict.fromkeys(content.strip() for _, _, content in parts))
    return Extracted(" , ".join(contents), parts[0][0])


def _boxes(text: str) -> list[tuple[int, int, str]]:
    """Start, end and content of the outermost balanced boxes, in one pass."""
    boxes: list[tuple[int, int, str]] = []
    open_braces: list[
        tuple[int, int] | None
    ] = []  # a box's start and the start of its content; None: another brace
    pending: int | None = None
    position = 0
    while found := _BRACES.search(text, position):
        position = found.end()
        token = found[0]
        if token.startswith(("\\boxed", "\\fbox")):
            pending = found.start()
            if position < len(text) and text[position] != "{":
                if bare := _BARE_BOX.match(text, position):
                    boxes.append((pending, bare.end(), bare[0]))
                pending = None
        elif token == "{":
            open_braces.append(None if pending is None else (pending, position))
            pending = None
        elif token == "}" and open_braces:
            box = open_braces.pop()
            if box is not None:
                while boxes and boxes[-1][0] > box[0]:  # boxes within this one
                    boxes.pop()
                boxes.append((box[0], position, text[box[1] : found.start()]))
    return boxes


def _last(pattern: re.Pattern[str], text: str) -> Extracted | None:
    found = None
    for found in pattern.finditer(text):  # noqa: B007
        pass
    return Extracted(found[1], found.start()) if found else None


def _last_tag(text: str) -> Extracted | None:
    lower = text.lower()
    end = lower.rfind(_CLOSING_TAG)
    start = lower.rfind(_OPENING_TAG, 0, end) if end >= 0 else -1
    return Extracted(text[start + len(_OPENING_TAG) : end], start) if start >= 0 else None


def _phrase(text: str) -> str | None:
    """What follows the last "the answer is"."""
    start = None
    for found in _PHRASE.finditer(text):
        start = found.end()
    if start is None:
        return None
    rest = text[start:]
    lead = _LEAD.match(rest)
    rest = rest[lead.end() :] if lead else rest
    if _DENIED.match(rest):
        return None
    if display := _DISPLAY.match(rest):
        return display[1]
    end = _SENTENCE_END.search(rest)
    statement = (rest[: end.start()] if end else rest).split("\n")[0]
    return _TAIL.sub("", statement).strip(" *:.\t") or None


def _plain(text: str) -> str | None:
    """The text itself where it is no more than an answer: one line of few words."""
    text = text.strip()
    if not text or len(text) > MAX_PLAIN or "\n" in text or "\\boxed" in text or "\\fbox" in text:
        return None
    words = re.findall(r"(?<![\\A-Za-z])[A-Za-z]{2,}", text)
    return text if len(words) <= 3 and not re.search(r"[.?!]\s+\S", text) else None


def _conclusion(text: str) -> str | None:
    """What a last sentence that begins with "so" or "therefore" says that something is."""
    found = _CONCLUSION.search(text[-600:].rstrip())
    if found is None:
        return None
    verbs = list(_VERB.finditer(found[1]))
    if not verbs:
        return None
    statement = found[1][verbs[-1].end() :].strip(" *:.")
    return (
        statement if re.match(r"[-+$\\(\[]*\s*[\d\\]", statement) and not _DENIED.search(found[1]) else None
    )
