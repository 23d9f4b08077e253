"""Times of day, dates and quantities of several units, which are texts of their own and no arithmetic."""

from __future__ import annotations

import re
from fractions import Fraction

from polyturn.envs.rewards.math.kinds import Clock, Value, Words
from polyturn.envs.rewards.math.lexer import Token
from polyturn.envs.rewards.math.terms import number
from polyturn.envs.rewards.math.units import Unit, read_unit
from polyturn.envs.rewards.math.vocabulary import MONTHS, SHORT_NAMES

MAX_CHARACTERS = 120

_CLOCK = re.compile(
    r"(?:at\s++)?(?P<hour>\d{1,2})(?:\s*+[:h]\s*+(?P<minute>\d{2}))?(?::(?P<second>\d{2}))?(?:\s*+o'?\s*+clock)?"
    r"\s*+(?P<half>[ap]\s*+\.?\s*+m\b\.?|noon|midnight)?(?:\s++(?:in\s++the\s++)?(?P<part>morning|afternoon|evening))?\.?",
    re.IGNORECASE,
)
_MONTH = (
    rf"(?P<month>{'|'.join((*MONTHS, *(name for name in SHORT_NAMES if SHORT_NAMES[name] in MONTHS)))})\.?"
)
_DAY = r"(?P<day>\d{1,2})(?:st|nd|rd|th)?"
_YEAR = r"(?:,?\s++(?P<year>\d{4}))?"
_WEEKDAY = r"(?:(?:mon|tues|wednes|thurs|fri|satur|sun)day,?\s++)?"
_DATES = tuple(
    re.compile(_WEEKDAY + form, re.IGNORECASE)
    for form in (
        rf"{_MONTH}\s++{_DAY}{_YEAR}",
        rf"(?:the\s++)?{_DAY}\s++(?:of\s++)?{_MONTH}{_YEAR}",
        r"(?P<year>\d{4})-(?P<month>\d{2})-(?P<day>\d{2})",
        r"(?P<month>\d{1,2})/(?P<day>\d{1,2})/(?P<year>\d{4})",
    )
)
_QUANTITY = re.compile(r"(?<!\d)(\d++(?:\.\d++)?)\s*+([A-Za-z]++)\.?\s*+(?:,\s*+)?(?:and\s++)?")
_FEET_AND_INCHES = re.compile(r"(?<!\d)(\d++)\s?'\s*+(\d++(?:\.\d++)?)\s?(?:\"|'')")


def read_moment(text: str) -> Clock | Words | Value | None:
    """The time, date or quantity in several units that all of a text is; None where it is none."""
    if len(text) > MAX_CHARACTERS or not any(map(str.isdigit, text)):
        return {"noon": Clock(12, 0, half="pm"), "midnight": Clock(0, 0, half="am")}.get(text.lower())
    return _clock(text) or _date(text) or _quantities(text)


def _clock(text: str) -> Clock | None:
    found = _CLOCK.fullmatch(text)
    if found is None:
        return None
    half = (found["half"] or "").lower()
    part = (found["part"] or "").lower()
    if not (found["minute"] or half or part or "clock" in text.lower()):
        return None
    hour, minute, second = (int(found[name] or 0) for name in ("hour", "minute", "second"))
    if hour > 24 or minute > 59 or second > 59 or (found["second"] and not found["minute"]):
        return None
    if half in ("noon", "midnight"):
        return Clock(12, 0, half="pm") if half == "noon" and hour == 12 else Clock(0, 0, half="am")
    if half:
        half = half[0] + "m"
    elif part:
        half = "am" if part == "morning" else "pm"
    if half and not 1 <= hour <= 12:
        half = ""
    if half:
        hour = hour % 12 + 12 * (half == "pm")
    return Clock(hour, minute, second, half)


def _date(text: str) -> Words | None:
    for form in _DATES:
        if found := form.fullmatch(text):
            month = found["month"].lower()
            if not month.isdigit():
                month = str(MONTHS.index(SHORT_NAMES.get(month, month)) + 1)
            year = found["year"] or ""
            if 1 <= int(month) <= 12 and 1 <= int(found["day"]) <= 31:
                return Words(f"date {year}-{int(month)}-{int(found['day'])}")
    return None


def _quantities(text: str) -> Value | None:
    """`9 hours 20 minutes`, `5 ft 6 in`: amounts of one kind, each of a smaller unit than the one before."""
    if feet := _FEET_AND_INCHES.fullmatch(text):
        text = f"{feet[1]} ft {feet[2]} in"
    total, position, count = Fraction(0), 0, 0
    kind: Unit | None = None
    while position < len(text):
        found = _QUANTITY.match(text, position)
        unit = read_unit([Token("text", found[2])]) if found else None
        if found is None or unit is None or not unit.powers or unit.words:
            return None
        if kind is not None and (unit.powers != kind.powers or unit.scale >= kind.scale):
            return None
        total += Fraction(found[1]) * unit.scale
        kind, position, count = unit, found.end(), count + 1
    return Value(number(total), Unit(kind.powers)) if kind is not None and count > 1 else None
