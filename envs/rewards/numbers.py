"""Numbers in plain notation, read exactly. What is not finite, or too large to be meant, is no number."""

from __future__ import annotations

import re
from decimal import Decimal
from fractions import Fraction

MAX_DIGITS = 100
MAX_EXPONENT = 400

# Linear in the text: it begins with a digit or a sign before one, digits are taken whole, and spaces are few.
_NUMBER = re.compile(
    r"(?<![\w.^])(?<!\d\*\*)(?=[-+\u2212]?\$?\.?\d)(?P<sign>[-+\u2212]?)\$?"
    r"(?P<whole>\d{1,3}(?:,\d{3})+(?!\d)|\d++)?(?P<part>\.\d++)?(?P<exponent>[eE][-+]?\d++)?"
    r"(?:\s{0,4}/\s{0,4}(?P<below>\d++(?![\d.,]*+[./])))?(?:\s?\\?%)?"
    r"(?!\w|\.\d|\s{0,4}\^|\s{0,4}\*\*\s{0,4}[\d(-])"
)
_DECLARED = re.compile(r"####|\banswer\s{0,8}(?:is|:|=)", re.IGNORECASE)
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
    declared = list(_DECLARED.finditer(text))
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
