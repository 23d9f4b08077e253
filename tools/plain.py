"""Values as JSON and the stores can hold them: what comes from models and from other people's code, brought to that."""

from __future__ import annotations

import json
import math
import numbers
import re
from collections.abc import Mapping
from decimal import Decimal
from typing import Any

MAX_DEPTH = 64
"""Levels of lists and objects in each other."""
MAX_DIGITS = 1_000
"""Of a whole number in a call: Python refuses to print one of more than 4,300."""
MAX_SIZE = 1e12
"""Of rewards and what is counted: its square is still a float of 32 bits."""
_LARGEST = 1 << 63
# Control characters but line breaks and tabs, marks of direction, line breaks that only some programs see, and what
# has no width and no place in a text: joiners stay, which Persian and emoji are written with.
_UNPRINTABLE = re.compile(
    r"[\x00-\x08\x0b-\x1f\x7f-\x9f\xad\u061c\u180e\u200b\u200e\u200f\u2028-\u202e\u2060-\u206f\ufeff\ufff9-\ufffb"
    r"\U000e0000-\U000e007f]"
)
_BITS_A_DIGIT = math.log2(10)


def clean_text(text: str) -> str:
    """A text that UTF-8 can hold: half a surrogate pair becomes U+FFFD."""
    if text.isascii():
        return str(text)
    try:
        text.encode()
    except UnicodeEncodeError:
        # Two halves that belong together become the character that they are.
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return str(text)


def printable(text: str) -> str:
    """A text for a terminal: what would move its cursor, colour it or turn its direction stands there as an escape."""
    return _UNPRINTABLE.sub(lambda found: found[0].encode("unicode_escape").decode(), clean_text(text))


def printable_json(text: str) -> str:
    """JSON for a terminal, or for a program: the same, with JSON's own escapes, so that it is read back as it was."""
    return _UNPRINTABLE.sub(lambda found: json.dumps(found[0])[1:-1], text)


def shown(value: Any, *, limit: int = 80) -> str:
    """A value in a message: its `repr`, cut."""
    if isinstance(value, str | bytes | bytearray):
        value = value[:limit]
    try:
        text = clean_text(repr(value))
    except Exception as error:  # noqa: BLE001  anybody's `__repr__`, and integers that are too long to print
        text = f"<{type(value).__name__} that cannot be shown: {type(error).__name__}>"
    return text if len(text) <= limit else f"{text[: limit - 3]}..."


def as_number(value: Any) -> float:
    """A finite number of sensible size as a `float`; also NumPy's and torch's scalars, `Decimal` and `Fraction`.

    Raises:
        ValueError: it is none.
    """
    if type(value) is float:
        number = value
    else:
        value = _item(value)
        if not isinstance(value, numbers.Real | Decimal):
            raise ValueError(f"it must be a number, not {shown(value)} ({type(value).__name__})")
        try:
            number = float(value)
        except (OverflowError, ValueError) as error:
            raise ValueError(f"it must be a finite number, not {shown(value)}") from error
    if not -MAX_SIZE <= number <= MAX_SIZE:  # NaN is in no interval
        raise ValueError(f"it must be a finite number of at most {MAX_SIZE:g} in size, not {number}")
    return number


def unfit(value: Any, *, where: str) -> str | None:
    """What keeps a value that a model gave from being JSON that can be worked with; None where nothing does."""
    return _unfit(value, where, 0)


def recordable(value: Any) -> Any:
    """A copy that JSON and the stores hold, whatever it was: what they cannot hold stands there as text.

    Integers beyond 64 bits become their digits, numbers that are not finite and foreign objects their `repr`.
    """
    return _recordable(value, 0)


def is_plain(value: Any) -> bool:
    """Whether `recordable` would change nothing, in the usual case of few short values. May say no to others."""
    if type(value) is not dict:
        return _is_leaf(value)
    for key, item in value.items():  # noqa: SIM110  a generator costs twice as much
        if type(key) is not str or not key.isascii() or not _is_leaf(item):
            return False
    return True


def _is_leaf(value: Any) -> bool:
    kind = type(value)
    if kind is str:
        return value.isascii()
    if kind is int:
        return -_LARGEST <= value < _LARGEST
    return kind is bool or value is None or (kind is float and math.isfinite(value))


def num_digits(value: int) -> int:
    """About how many decimal digits an integer has, without printing it."""
    return int(value.bit_length() / _BITS_A_DIGIT) + 1


def _item(value: Any) -> Any:
    """The Python number in a scalar of NumPy or torch."""
    if hasattr(value, "dtype") and hasattr(value, "item") and getattr(value, "size", None) != 0:
        try:
            # What NumPy's mean of nothing but masked values is: no number, though its item is 0.
            is_masked = hasattr(value, "mask") and hasattr(value.mask, "dtype") and bool(value.mask)
            return value if is_masked else value.item()
        except (ValueError, TypeError, RuntimeError):
            return value
    return value


def _unfit(value: Any, where: str, depth: int) -> str | None:
    if isinstance(value, str):
        if not value.isascii() and clean_text(value) != value:
            return f"argument {where!r} holds half a surrogate pair, which is no character"
        return None
    if value is None or isinstance(value, bool):
        return None
    if isinstance(value, int):
        digits = num_digits(value)
        if digits > MAX_DIGITS:
            return (
                f"argument {where!r} is a number of about {digits:,} digits; at most {MAX_DIGITS:,} are taken"
            )
        return None
    if isinstance(value, float):
        return None if math.isfinite(value) else f"argument {where!r} is {value}, which is no JSON number"
    if depth >= MAX_DEPTH:
        return f"argument {where!r} has more than {MAX_DEPTH} levels"
    if isinstance(value, list | tuple):
        items = ((f"{where}[{index}]", item) for index, item in enumerate(value))
    elif isinstance(value, Mapping):
        for key in value:
            if not isinstance(key, str) or clean_text(key) != key:
                return f"argument {where!r} has the key {shown(key)}, which is no text"
        items = ((f"{where}.{key[:40]}", item) for key, item in value.items())
    else:
        return f"argument {where!r} is a {type(value).__name__}, which JSON does not have"
    return next((found for path, item in items if (found := _unfit(item, path, depth + 1))), None)


def _recordable(value: Any, depth: int) -> Any:
    if isinstance(value, str):
        return clean_text(value)
    if value is None or isinstance(value, bool):
        return value
    value = _item(value)
    if isinstance(value, int) and not isinstance(value, bool):
        if -_LARGEST <= value < _LARGEST:
            return int(value)
        digits = num_digits(value)
        return str(value) if digits <= MAX_DIGITS else f"<a number of about {digits:,} digits>"
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else str(value)
    if isinstance(value, Mapping | list | tuple):
        if depth >= MAX_DEPTH:
            return "<more levels than can be kept>"
        if isinstance(value, Mapping):
            return {_key(key): _recordable(item, depth + 1) for key, item in value.items()}
        return [_recordable(item, depth + 1) for item in value]
    return shown(value, limit=1_000)


def _key(key: Any) -> str:
    return clean_text(key) if isinstance(key, str) else shown(key)
