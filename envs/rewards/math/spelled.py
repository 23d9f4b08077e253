"""Numbers in words: `twenty-five`, `two and a half`, `three quarters`, `1.45 million`, `second`."""

from __future__ import annotations

import re
from collections.abc import Sequence
from fractions import Fraction


def _indexed(words: str, start: int = 0, step: int = 1) -> dict[str, int]:
    return {word: start + step * index for index, word in enumerate(words.split())}


_ONES = _indexed(
    "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen seventeen"
    " eighteen nineteen"
)
_TENS = _indexed("twenty thirty forty fifty sixty seventy eighty ninety", 20, 10)
MULTIPLIERS = {"hundred": 100, "thousand": 1_000, "million": 10**6, "billion": 10**9, "trillion": 10**12}
MULTIPLIERS |= {"dozen": 12, "lakh": 10**5, "crore": 10**7, "tenthousand": 10**4, "hundredmillion": 10**8}
"""What a number before it is multiplied by."""

_ORDINAL_ONES = _indexed(
    "zeroth first second third fourth fifth sixth seventh eighth ninth tenth eleventh twelfth thirteenth fourteenth"
    " fifteenth sixteenth seventeenth eighteenth nineteenth"
)
_ORDINAL_TENS = _indexed(
    "twentieth thirtieth fortieth fiftieth sixtieth seventieth eightieth ninetieth", 20, 10
)
_ORDINAL_POWERS = {"hundredth": 100, "thousandth": 1_000, "millionth": 10**6}
_PARTS = {
    name: value
    for name, value in (_ORDINAL_ONES | _ORDINAL_TENS | _ORDINAL_POWERS).items()
    if name not in ("zeroth", "first", "second")
}
_PARTS |= {"half": 2, "halve": 2, "quarter": 4}
_ORDINAL = re.compile(r"(\d{1,9})(?:st|nd|rd|th)", re.IGNORECASE)
_WORD = re.compile(r"[A-Za-z]+")
NUMBER_WORDS = {**_ONES, **_TENS, "hundred": 100}
"""Single words."""


def part_named(word: str) -> int | None:
    """How many `tenths` or `thirds` make one; None for other words, quarters among them, which may be coins."""
    singular = _singular(word.lower())
    return _PARTS.get(singular) if singular not in ("quarter", "half") else None


def ordinal(text: str) -> int | None:
    """The place that a text names: `5th`, `second`, `twenty-first`; None for anything else."""
    text = text.strip().lower()
    if found := _ORDINAL.fullmatch(text):
        return int(found[1])
    *tens, last = re.split(r"[\s-]+", text)
    if last in _ORDINAL_ONES:
        if not tens:
            return _ORDINAL_ONES[last]
        return _TENS[tens[0]] + _ORDINAL_ONES[last] if len(tens) == 1 and tens[0] in _TENS else None
    return _ORDINAL_TENS.get(last) if not tens else None


def leading_number(text: str) -> tuple[Fraction, str] | None:
    """The number that a text begins with in words, and the rest; None where it begins with none."""
    words: list[str] = []
    ends: list[int] = []
    position = 0
    while found := _WORD.match(text, position):
        words.append(found[0].lower())
        ends.append(found.end())
        position = found.end()
        while position < len(text) and text[position] in " -\t":
            position += 1
        if len(words) == 16:
            break
    taken = _Reader(words).read()
    if taken is None:
        return None
    value, count = taken
    rest = text[ends[count - 1] :]
    return None if rest.startswith("-") else (value, rest)


class _Reader:
    """Reads as many words as make a number."""

    def __init__(self, words: Sequence[str]) -> None:
        self._words = words
        self._at = 0

    def read(self) -> tuple[Fraction, int] | None:
        negative = self._skip("minus", "negative")
        value = self._part("a", "an")
        if value is None:
            value = self._whole()
            if value is None:
                return None
            value = self._with_part(value)
        return (-value if negative else value), self._at

    def _word(self, ahead: int = 0) -> str:
        index = self._at + ahead
        return self._words[index] if index < len(self._words) else ""

    def _skip(self, *words: str) -> bool:
        if self._word() in words:
            self._at += 1
            return True
        return False

    def _part(self, *articles: str) -> Fraction | None:
        """half, a half, a quarter, a third: one part; `third` alone is a place."""
        if self._word() in ("half", "quarter") and not articles:
            return self._take_part(1)
        if self._word() == "half":
            return self._take_part(1)
        if self._word() in articles and _singular(self._word(1)) in _PARTS:
            self._at += 1
            return self._take_part(1)
        if self._word() in articles and self._word(1) in MULTIPLIERS:
            self._at += 1
        return None

    def _take_part(self, count: int) -> Fraction:
        self._at += 1
        part = Fraction(count, _PARTS[_singular(self._words[self._at - 1])])
        # half a dozen, half a million
        article = self._word() in ("a", "of") and self._word(1) in MULTIPLIERS
        if article or self._word() in MULTIPLIERS:
            self._at += 1 + article
            part *= MULTIPLIERS[self._words[self._at - 1]]
        return part

    def _whole(self) -> Fraction | None:
        """A whole number, or one with digits after `point`."""
        total, current, found = 0, 0, False
        last = 10**30
        while True:
            word = self._word()
            if word in _TENS and current % 100 == 0:
                current += _TENS[word]
                if self._word(1) in _ONES and 0 < _ONES[self._word(1)] < 10:
                    self._at += 1
                    current += _ONES[self._word()]
            elif word in _ONES and current % 100 == 0 and (current or not found or total):
                current += _ONES[word]
            elif word in ("hundred", "dozen") and current < 100:
                current = max(current, 1) * MULTIPLIERS[word]
            elif word in MULTIPLIERS and MULTIPLIERS[word] < last:
                last = MULTIPLIERS[word]
                total, current = total + max(current, 1) * last, 0
            elif word == "and" and found and self._continues():
                self._at += 1
                continue
            else:
                break
            found = True
            self._at += 1
        if not found:
            return None
        value = Fraction(total + current)
        digits = ""
        if self._word() == "point" and self._word(1) in _ONES:
            self._at += 1
            while self._word() in _ONES and _ONES[self._word()] < 10:
                digits += str(_ONES[self._word()])
                self._at += 1
            value += Fraction(int(digits), 10 ** len(digits)) if digits else 0
        return value

    def _continues(self) -> bool:
        """Whether `and` stands within a number: one hundred and five."""
        before, after = self._words[self._at - 1], self._word(1)
        return before in MULTIPLIERS and (after in _ONES or after in _TENS) and before != "dozen"

    def _with_part(self, value: Fraction) -> Fraction:
        """two and a half, three quarters, two thirds."""
        if self._word() == "and" and self._word(1) in ("a", "an", "one") and self._is_part(2):
            self._at += 2
            return value + self._take_part(1)
        if self._word() == "and" and self._word(1) == "half":
            self._at += 1
            return value + self._take_part(1)
        if self._word() == "and" and self._word(1) in _ONES and self._is_part(2):
            self._at += 2
            return value + self._take_part(_ONES[self._words[self._at - 1]])
        if self._is_part(0) and value.denominator == 1:
            return value * self._take_part(1)
        return value

    def _is_part(self, ahead: int) -> bool:
        return _singular(self._word(ahead)) in _PARTS


def _singular(word: str) -> str:
    return word[:-1] if word.endswith("s") else word
