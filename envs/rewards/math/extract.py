"""The answer in a reply: the last box after the thinking, `#### 42`, `<answer>`, "the answer is ...", or all of it.

Everything here takes time in proportion to the text, whatever it is: repeats are possessive or bounded, and what is
looked for in sentences is looked for in the end of the reply alone.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

MAX_PLAIN = 120
"""Characters of a reply that is nothing but an answer."""
MAX_TAIL = 16_000
"""Characters at the end of a reply in which a phrase such as "the answer is" is looked for."""
MAX_STATEMENT = 600
"""Characters of a last sentence."""

_THINKING_ENDS = re.compile(
    r"</think(?:ing)?>|\[/THINK\]|<\|channel\|>final<\|message\|>|</reasoning>", re.IGNORECASE
)
_THINKING_BEGINS = re.compile(r"<think(?:ing)?>|\[THINK\]|<reasoning>", re.IGNORECASE)
_DOUBLED = re.compile(r"(?<!\\)\\\\(?=(?:boxed|fbox)(?![A-Za-z]))")
_BRACES = re.compile(r"\\(?:boxed|fbox)(?![A-Za-z])\s*+|\\.|[{}]", re.DOTALL)
_BARE_BOX = re.compile(r"\\[A-Za-z]++|-?\d++(?:\.\d++)?|[A-Za-z]")
_GAP = r"[\s$,;.&*]*+(?:\\[()\[\]])*+[\s$,;&*]*+"
_BETWEEN = re.compile(
    rf"{_GAP}(?:and|or|\\text\s*+\{{\s*+(?:and|or)\s*+\}}|\\quad|\\\\)?{_GAP}(?:(?P<name>[A-Za-z](?:_\w|_\{{\w\}})?)\s*+=\s*+)?"
)
_LABEL_BETWEEN = re.compile(
    r"(?<![\s$.,;*])[ \t$.,;*]*+\n[\s*#-]*+(?:\(?[a-z0-9]{1,3}[.)]\s*+)?"
    r"(?:[A-Za-z][A-Za-z0-9() ]{0,30}[\s*]{0,4}[:=])?[\s*$]*+"
)
_HASHES = re.compile(r"####[ \t]*+([^\n]++)")
_OPENING_TAG, _CLOSING_TAG = "<answer>", "</answer>"
_STARS = r"\*{0,4}\s{0,8}"
_PHRASE = re.compile(
    r"(?:\b(?:(?:final\s{1,4})?(?:answer|result)|(?:correct|right|best)\s{1,4}(?:option|choice))"
    rf"{_STARS}(?:\([^()\n]{{0,40}}\)\s{{0,8}})?"
    r"(?:\*{0,4}\s{0,8}[:=]\*{0,4}|(?:of|to|for)\s[^.\n]{0,80}?\s(?:is|:)|is|was|equals)(?![A-Za-z])"
    r"|\b(?:choose|chose|pick|select)\s{1,4}(?:the\s{1,4})?(?:option|choice|answer)\b|(?<!\w)ans(?:wer)?\s{0,4}[:=]"
    r"|\u7b54\u6848?\s{0,4}(?:\u662f|\u4e3a|[:\uff1a]))\s{0,8}:?\*{0,4}",
    re.IGNORECASE,
)
_HEADING = re.compile(
    r"(?:^|\n)[ \t#*]{0,12}(?:the\s)?(?:final\s)?(?:answer|result|solution)[ \t]{0,4}"
    r":?\*{0,4}:?[ \t]{0,8}\n\s{0,16}([^\n]++)",
    re.IGNORECASE,
)
_LEAD = re.compile(
    r"[\s:*_]*+(?:(?:therefore|thus|simply|indeed|then|just|clearly|equal to|exactly|option|choice)\b[\s:*,]*+)*+",
    re.IGNORECASE,
)
_TAIL = re.compile(
    r"(?<![\s,])(?:,\s?(?:not|rather|instead)\s|,?\s++(?:because|since|which|when|where|as\s|so\s|but\s|I hope"
    r"|hence\s|thus\s|therefore\s"
    r"|given that|for\s|by\s))",
    re.IGNORECASE,
)
_CONSEQUENCE = re.compile(
    r"(?<![\s,]),?\s++(?:so|thus|hence|therefore)\s[^\n=]{0,80}=([^=\n]{1,80})$", re.IGNORECASE
)
_SENTENCE_END = re.compile(r"[.!?](?=\s{1,8}[A-Z*\"(]|\s{0,8}$)|\n[ \t]{0,8}\n|[\u3002\uff01\uff1f]")
_DENIED = re.compile(r"(?:not|unknown|unclear|hard to|neither|unsure)\b", re.IGNORECASE)
_DISPLAY = re.compile(
    r"\s{0,8}(\$\$[^$]{1,600}\$\$|\\\[.{1,600}?\\\]|\$[^$\n]{1,600}\$(?=[\s.]*+$))", re.DOTALL
)
# The last sentence.
_SENTENCES = re.compile(r"(?<=[.!?])\s++(?=[A-Z\\$*(])|(?<=[\u3002\uff01\uff1f])|\n")
_CHINESE = re.compile(r"[\u4e00-\u9fff]{2}")
_CHINESE_DOUBT = re.compile(r"[\u4e0d\u6216\u5417]")
_CONCLUDES = re.compile(
    r"(?:so|thus|therefore|hence|finally|in total|altogether|in conclusion|consequently)\b"
    r"|\u56e0\u6b64|\u6240\u4ee5|\u6545|\u7efc\u4e0a|\u5373",
    re.IGNORECASE,
)
_EQUALS = re.compile(r"=|\b(?:is|are|equals|was|were|be)\b")
_VERB = re.compile(
    r"=|\b(?:is|are|equals|gives?|gets?|have|has|had|costs?|makes?|made|earns?|earned|be|was|were|it's|spends?|spent|needs?"
    r"|takes?|took|pays?|paid|sells?|sold|buys?|bought|raised|saved|saves?|owes?|ate|eats?|weighs?|remains?|left|total)\b"
)
_QUANTITY = re.compile(
    r"-?\\?[$\u20ac\u00a3]?-?(?<![A-Za-z0-9_.])\d[\d,]*+(?:\.\d++)?(?:\s?/\s?\d++)?(?:\s?\\?%)?"
)
_OPEN = re.compile(
    r"\b(?:not|n't|cannot|unknown|unclear|unsure|sure|maybe|perhaps|might|guess|either|or|if|suppose|assume|let|first|next"
    r"|step|consider|problem|question|try|should|would|could|between|whether|wrong|incorrect|impossible)\b|n't\b|\?",
    re.IGNORECASE,
)
_CUT = re.compile(
    r"\s(?:and|when|if|because|since|so|that|which|who|after|before|by|for|from|to|at|in|on|with|as|while|during|out|into|can|will|than"
    r"|onto|until|without|of(?=\s\d))\s",
    re.IGNORECASE,
)
_BOLD = re.compile(r"(?<![^\s(:])\*\*(?=[^\s*])([^*\n]{1,200}+)(?<!\s)\*\*(?!\w)")
_HALF_BOLD = re.compile(r"\A([^*\s]{1,60}+)\*\*(?=\s)")
"""The stars before it were read with the words before the answer."""
_A = re.compile(r"\s{0,8}A\s?:\s{1,8}(.*)", re.DOTALL)


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
    return next(iter(readings(reply, box_only=box_only)), None)


def readings(reply: str, *, box_only: bool = False) -> tuple[str, ...]:
    """The answer that a reply commits to, first, and further ways to read the same commitment.

    These are the last boxes with labels between them as one list, for a gold answer that is one, and `18` for `A: 18`.
    """
    text = _after_thinking(reply)
    if text is None:
        return ()
    text = _DOUBLED.sub(r"\\", text)
    boxes = _last_boxes(text)
    if box_only:
        return tuple(box.text for box in boxes)
    marked = [found for found in (*boxes[:1], _last(_HASHES, text), _last_tag(text)) if found is not None]
    if marked:
        best = max(marked, key=lambda found: found.start)
        more = boxes[1:] if boxes and best is boxes[0] else ()
        return tuple(found.text.strip() for found in (best, *more) if found.text.strip())
    text = text[-MAX_TAIL:]
    stated = _phrase(text) or _under_heading(text) or _plain(text) or _conclusion(text)
    if stated and (marked_a := _A.fullmatch(stated)):
        return stated, marked_a[1]
    return (stated,) if stated else ()


def gold_answer(gold: str) -> str:
    """The answer in a gold solution: its last box, what follows its `####`, or all of it."""
    if "\\boxed" in gold or "\\fbox" in gold:
        boxes = _last_boxes(gold)
        return boxes[0].text if boxes else gold
    found = _last(_HASHES, gold) if "####" in gold else None
    return found.text.strip() if found else gold


def _after_thinking(reply: str) -> str | None:
    """What follows the thinking; None where the thinking never ends."""
    end = 0
    for found in _THINKING_ENDS.finditer(reply):
        end = found.end()
    return None if _THINKING_BEGINS.search(reply, end) else reply[end:]


def _last_boxes(text: str) -> tuple[Extracted, ...]:
    """The last balanced box with those of the same statement; then the same with labelled ones before it."""
    if "\\boxed" not in text and "\\fbox" not in text:
        return ()
    boxes = [box for box in _boxes(text) if text[box[2] : box[3]].strip()]
    if not boxes:
        return ()
    own = _run(text, boxes, _BETWEEN)
    labelled = _run(text, boxes, _BETWEEN, _LABEL_BETWEEN)
    return (own,) if own.text == labelled.text else (own, labelled)


def _run(text: str, boxes: list[tuple[int, int, int, int]], *patterns: re.Pattern[str]) -> Extracted:
    """The last box with all before it between which nothing stands but what one of the patterns matches."""
    parts = [boxes[-1]]
    for box in reversed(boxes[:-1]):
        gap = text[box[1] : parts[-1][0]]
        if len(gap) > 60 or not any(pattern.fullmatch(gap) for pattern in patterns):
            break
        parts.append(box)
    parts.reverse()
    contents = list(dict.fromkeys(text[start:end].strip() for _, _, start, end in parts))
    return Extracted(" , ".join(contents), parts[0][0])


def _boxes(text: str) -> list[tuple[int, int, int, int]]:
    """Start and end of the outermost balanced boxes, and of what is in them, in one pass."""
    boxes: list[tuple[int, int, int, int]] = []
    # A box's start and the start of its content; None: another brace.
    open_braces: list[tuple[int, int] | None] = []
    pending: int | None = None
    position = 0
    while found := _BRACES.search(text, position):
        position = found.end()
        token = found[0]
        if token.startswith(("\\boxed", "\\fbox")):
            pending = found.start()
            if position < len(text) and text[position] != "{":
                if bare := _BARE_BOX.match(text, position):
                    boxes.append((pending, bare.end(), bare.start(), bare.end()))
                pending = None
        elif token == "{":
            open_braces.append(None if pending is None else (pending, position))
            pending = None
        elif token == "}" and open_braces:
            box = open_braces.pop()
            if box is not None:
                while boxes and boxes[-1][0] > box[0]:  # boxes within this one
                    boxes.pop()
                boxes.append((box[0], position, box[1], found.start()))
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
    tail = _TAIL.search(statement)
    if tail is None:
        whole = _is_sentence(statement) or _CHINESE.search(statement)
        return (_conclusion(statement) if whole else None) or _tidied(statement)
    if consequence := _CONSEQUENCE.fullmatch(statement[tail.start() :].rstrip(" $.")):
        return _tidied(consequence[1])
    return _tidied(statement[: tail.start()])


def _under_heading(text: str) -> str | None:
    """The line below a heading such as **Final Answer**."""
    found = _last(_HEADING, text[-MAX_STATEMENT:])
    if found is None or len(found.text) > MAX_PLAIN:
        return None
    return _plain(found.text) or _conclusion(found.text)


def _plain(text: str) -> str | None:
    """The text itself where it is no more than an answer: one line of few words."""
    text = text.strip()
    if not text or len(text) > MAX_PLAIN or "\n" in text or "\\boxed" in text or "\\fbox" in text:
        return None
    words = re.findall(r"(?<![\\A-Za-z])[A-Za-z]{2,}+", text)
    if (
        len(words) > 3
        or (len(text) > 5 and _CHINESE.match(text))
        or re.search(r"[.?!]\s+\S", text)
        or _CONCLUDES.match(text)
    ):
        return None
    return text if not (words and _is_sentence(text)) else None


def _is_sentence(text: str) -> bool:
    """Whether words come before a verb: I believe it's 7."""
    verb = _VERB.search(text)
    return verb is not None and verb[0] != "=" and bool(re.search(r"[A-Za-z]{2}", text[: verb.start()]))


def _conclusion(text: str) -> str | None:
    """What the last sentence says that something is; where it does not say so, its only number."""
    tail = text[-MAX_STATEMENT:].rstrip().rstrip("*_ ")
    sentences = [part for part in _SENTENCES.split(tail) if part.strip(" *_#$.\\[]")]
    if not sentences:
        return None
    sentence = sentences[-1].strip(" *_")
    quantities = list(_QUANTITY.finditer(sentence))
    verbs = list(_VERB.finditer(sentence))
    words = re.findall(r"[A-Za-z]{2,}+", sentence)
    if _CHINESE.search(sentence) and not verbs:
        one = len(quantities) == 1 and not _CHINESE_DOUBT.search(sentence)
        return _tidied(sentence[quantities[0].start() :]) if one else None
    if _OPEN.search(sentence) or not (verbs or (len(words) > 2 and sentence[0].isupper())):
        return None
    states = [
        verb
        for verb in verbs
        if len(quantities) < 2 or _CONCLUDES.match(sentence) or _EQUALS.fullmatch(verb[0])
    ]
    if states and states[-1] is verbs[-1]:
        statement = sentence[states[-1].end() :]
        if re.match(r"[-+$\\(\[{*\s]*+(?:\d|(?<=\\)[a-zA-Z]|[a-z]\b(?!\s[a-z]))", statement):
            return _cut(statement)
    if len(quantities) != 1:
        return None
    return _cut(sentence[quantities[0].start() :])


def _cut(statement: str) -> str | None:
    """A statement up to where a clause goes on about something else."""
    found = _CUT.search(statement)
    return _tidied(statement[: found.start()] if found and found[0].strip() != "and" else statement)


def _tidied(statement: str) -> str | None:
    """Without what sets it in bold, and without half of a pair of dollar signs."""
    statement = (
        _HALF_BOLD.sub(r"\1", _BOLD.sub(r"\1", statement))
        .strip(" *:.\t\n\u3002")
        .removesuffix("\\)")
        .removesuffix("\\]")
        .strip(" *:.")
    )
    if statement.count("$") % 2 and statement.endswith("$"):
        statement = statement[:-1]
    return statement.strip(" *:.") or None
