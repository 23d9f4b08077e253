"""Which part of a message is its answer, which choice or number that states, and how alike two texts are.

Where the answer stands never depends on the label, so naming many answers does not help.
"""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Iterable
from decimal import Decimal
from fractions import Fraction
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


LETTERS = "ABCDEFGHIJ"

_LETTER = r"[*_(\[\"'`]{0,3}([A-J])[*_)\]\"'`]{0,3}"
# Spaces are few, so that no run of them is read again and again.
_S = r"\s{0,8}"
_ALSO = rf"(?:{_S}(?:,|/|\||&|\+|\bor\b|\band\b|(?=[(\[])){_S}(?:or\s{{1,8}}|and\s{{1,8}})?{_LETTER}(?![A-Za-z0-9]))*"
_DECLARED_CHOICE = re.compile(
    rf"(?:\banswer|\bchoice|\boption){_S}(?:is|:|=)?{_S}(?:\boption\s{{1,8}}|\bchoice\s{{1,8}})?{_LETTER}"
    rf"(?![A-Za-z0-9'])({_ALSO})",
    re.IGNORECASE,
)
_ALONE = re.compile(rf"{_LETTER}{_S}[.):]?({_ALSO}){_S}\.?")
_BEGINS = re.compile(r"[*_(\[]{0,3}([A-J])[*_]{0,2}[.):][*_]{0,2}\s++(\S.*)")
_FIRST = re.compile(rf"{_LETTER}(?![A-Za-z0-9'])")
_WRAPPED = re.compile(r"\\(?:boxed|fbox|text|textbf|mathrm)\s*+\{([^{}]*+)\}")
_SINGLE = re.compile(r"(?<![A-Za-z0-9])([A-J])(?![A-Za-z0-9'])")


def stated_choice(text: str) -> str | None:
    """The one letter that an answer names: `B`, `(B)`, `B. Paris`, "The answer is B"; None for none or several."""
    text = _WRAPPED.sub(r"\1", _WRAPPED.sub(r"\1", text))
    declared = [
        letter
        for match in _DECLARED_CHOICE.finditer(text)
        # The words are found in any case; the letter must be a capital, or "the answer is a" would be a choice.
        for letter in (match[1], *_SINGLE.findall(match[2] or ""))
        if letter.isupper()
    ]
    if not declared:
        lines = [line.strip() for line in text.strip().splitlines() if line.strip()]
        for line in lines[-1:] + lines[:1]:
            if alone := _ALONE.fullmatch(line):
                declared += [alone[1], *_SINGLE.findall(alone[2] or "")]
            elif begins := _BEGINS.fullmatch(line):
                rest = _FIRST.match(begins[2])
                declared += [begins[1], *([rest[1]] if rest and rest[1] != "I" else ())]
    return declared[0] if len(set(declared)) == 1 else None


MAX_DIGITS = 100
MAX_EXPONENT = 400

# Linear in the text: it begins with a digit or a sign before one, digits are taken whole, and spaces are few.
_NUMBER = re.compile(
    r"(?<![\w.^])(?<!\d\*\*)(?=[-+\u2212]?\$?\.?\d)(?P<sign>[-+\u2212]?)\$?"
    r"(?P<whole>\d{1,3}(?:,\d{3})+(?!\d)|\d++)?(?P<part>\.\d++)?(?P<exponent>[eE][-+]?\d++)?"
    r"(?:\s{0,4}/\s{0,4}(?P<below>\d++(?![\d.,]*+[./])))?(?:\s?\\?%)?"
    r"(?!\w|\.\d|\s{0,4}\^|\s{0,4}\*\*\s{0,4}[\d(-])"
)
_DECLARED_NUMBER = re.compile(r"####|\banswer\s{0,8}(?:is|:|=)", re.IGNORECASE)
_LEAD = re.compile(r"[*$(\s]*+")


def read_number(text: str) -> Fraction | None:
    """The number that a text is, all of it; None if it is none: `-1,234.5`, `2e3`, `3/4`, `$5`, `12 %` (12).

    Signs of currency and percent are read over.
    """
    text = text.strip().rstrip(".").strip("$ ").removesuffix("\\")
    found = _NUMBER.fullmatch(text) if len(text) <= 2 * MAX_DIGITS else None
    return _value(found) if found else None


def numbers_in(text: str) -> list[Fraction | None]:
    """All numbers of a text in order; None for one that is too large to be meant."""
    found = (match for match in _NUMBER.finditer(text) if match["whole"] or match["part"])
    return [_value(match) for match in found]


def stated_number(text: str) -> Fraction | None:
    """The one number that an answer states; None if there is none, or several that differ.

    What follows `####` or "answer is" counts where there is such, and otherwise the whole text.
    """
    declared = list(_DECLARED_NUMBER.finditer(text))
    if declared:
        values = []
        for words in declared:
            lead = _LEAD.match(text, words.end())
            match = _NUMBER.match(text, lead.end() if lead else words.end())
            values.append(_value(match) if match else None)
    else:
        values = numbers_in(text)
    return values[0] if len(set(values)) == 1 else None


def _value(match: re.Match[str]) -> Fraction | None:
    whole, part, exponent = match["whole"], match["part"], match["exponent"]
    if not (whole or part):
        return None
    digits = (whole or "0").replace(",", "") + (part or "")
    below = match["below"] or "1"
    power = int(exponent[1:]) if exponent and len(exponent) < 8 else (0 if not exponent else MAX_EXPONENT + 1)
    if len(digits) > MAX_DIGITS or len(below) > MAX_DIGITS or abs(power) > MAX_EXPONENT or int(below) == 0:
        return None
    value = Fraction(Decimal(digits)) * Fraction(10) ** power / int(below)
    # Such as 1e308 times 10: a float could not hold it.
    if value >= Fraction(10) ** 308:
        return None
    return -value if match["sign"] in ("-", "\u2212") else value


_ARTICLES = re.compile(r"\b(a|an|the)\b")
_PUNCTUATION = str.maketrans("", "", string.punctuation)
_YES_NO = frozenset(("yes", "no", "noanswer"))


def normalise_answer(text: str) -> str:
    """Lower case, without ASCII punctuation and English articles, white space squeezed (SQuAD, arXiv 1606.05250)."""
    return " ".join(_ARTICLES.sub(" ", text.lower().translate(_PUNCTUATION)).split())


def exact_match(answer: str, gold: str | Iterable[str]) -> float:
    """1.0 if the normalised answer equals any gold answer, else 0.0.

    A gold answer of which nothing is left, such as "A" or "+", is compared as it stands. An empty answer never matches.
    """
    return float(any(_same(answer, text) for text in _golds(gold)))


def f1(answer: str, gold: str | Iterable[str]) -> float:
    """The best F1 over gold answers between the bags of normalised words (SQuAD, arXiv 1606.05250), from 0 to 1.

    As in HotpotQA (arXiv 1809.09600), yes and no must match exactly. A refusal has no words in common with an answer.
    """
    return max((_f1(answer, text) for text in _golds(gold)), default=0.0)


def contains(answer: str, gold: str | Iterable[str], *, max_words: int = 64) -> float:
    """1.0 if any gold answer stands in the answer as whole words, both normalised.

    0.0 for a refusal, and for an answer of more than `max_words` words: it could hold every guess there is.
    """
    words = f" {normalise_answer(answer)} "
    if is_refusal(answer) or len(words.split()) > max_words:
        return 0.0
    golds = (normalise_answer(text) for text in _golds(gold))
    return float(any(text and f" {text} " in words for text in golds))


def _golds(gold: str | Iterable[str]) -> tuple[str, ...]:
    return (gold,) if isinstance(gold, str) else tuple(gold)


def _same(answer: str, gold: str) -> bool:
    wanted = normalise_answer(gold)
    if wanted:
        return normalise_answer(answer) == wanted
    return bool(gold.strip()) and answer.strip().lower() == gold.strip().lower()


def _f1(answer: str, gold: str) -> float:
    if _same(answer, gold):
        return 1.0
    given, wanted = normalise_answer(answer), normalise_answer(gold)
    if is_refusal(answer) or given in _YES_NO or wanted in _YES_NO:
        return 0.0
    given_words, wanted_words = given.split(), wanted.split()
    common = sum((Counter(given_words) & Counter(wanted_words)).values())
    return 2 * common / (len(given_words) + len(wanted_words)) if common else 0.0
