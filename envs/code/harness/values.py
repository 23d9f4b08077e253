"""Values as tagged JSON, in both directions.

None, booleans, texts, small integers and finite floats stand for themselves, lists too; everything else is an object
with one key.
"""

from __future__ import annotations

import collections
import json
import math
import os
import sys
from collections.abc import Iterable
from typing import Any

CLASS = "Solution"
"""The class whose methods are asked for where the task is in the form of LeetCode."""
MAX_DEPTH = 60
MAX_ITEMS = 2_000_000
BIG = 1 << 53


class DoesNotCross(Exception):
    """A value that cannot be told: not built of plain values and containers, too deep, or too large."""


class Opaque:
    """Stands for a value of the solution's that does not cross. It equals nothing but itself."""

    def __init__(self, kind: str) -> None:
        self._kind = kind

    def __repr__(self) -> str:
        return f"<a value of type {self._kind}, which does not cross>"


class Packer:
    """Turns values into JSON.

    Of subclasses of the built-in types only what the built-in type holds is told. With `lenient` what does not cross
    arrives as an `Opaque`.
    """

    def __init__(self, *, lenient: bool) -> None:
        self._lenient = lenient
        self._count = 0

    def pack(self, value: Any, depth: int = 0) -> Any:
        """Raises DoesNotCross, and where it is lenient only for a value that is too large."""
        self._count += 1
        if self._count > MAX_ITEMS:
            raise DoesNotCross("too large a value")
        if value is None or value is True or value is False:
            return value
        if isinstance(value, str):
            return str.__str__(value)
        if isinstance(value, int):
            number = int.__index__(value)
            return number if -BIG < number < BIG else {"i": hex(number)}
        if isinstance(value, float):
            real = float.__float__(value)
            return real if math.isfinite(real) else {"f": float.__repr__(real)}
        if depth > MAX_DEPTH:
            return self._opaque(value, "too deep a value")
        if isinstance(value, list):
            return self._items(list.__iter__(value), depth)
        if isinstance(value, tuple):
            return {"t": self._items(tuple.__iter__(value), depth)}
        if isinstance(value, dict):
            kind = "c" if isinstance(value, collections.Counter) else "d"
            kind = "o" if isinstance(value, collections.OrderedDict) else kind
            return {kind: self._items(dict.items(value), depth)}
        if isinstance(value, set):
            return {"s": self._items(set.__iter__(value), depth)}
        if isinstance(value, frozenset):
            return {"z": self._items(frozenset.__iter__(value), depth)}
        if isinstance(value, complex):
            return {"j": [self.pack(value.real), self.pack(value.imag)]}
        if isinstance(value, (bytes, bytearray)):
            return {"b" if isinstance(value, bytes) else "a": bytes(value).hex()}
        if isinstance(value, range):
            return {"r": self._items((value.start, value.stop, value.step), depth)}
        if isinstance(value, collections.deque):
            return {"q": [self._items(collections.deque.__iter__(value), depth), value.maxlen]}
        return self._rarer(value, depth)

    def _items(self, values: Iterable[Any], depth: int) -> list[Any]:
        return [self.pack(item, depth + 1) for item in values]

    def _rarer(self, value: Any, depth: int) -> Any:
        """Of modules that are imported only where they are used, and what can be gone through once."""
        decimals, fractions, dates = map(sys.modules.get, ("decimal", "fractions", "datetime"))
        if decimals and isinstance(value, decimals.Decimal):
            return {"D": decimals.Decimal.__str__(value)}
        if fractions and isinstance(value, fractions.Fraction):
            return {"F": [self.pack(value.numerator), self.pack(value.denominator)]}
        if dates and type(value) in (dates.date, dates.datetime, dates.time):
            return {f"T{type(value).__name__}": value.isoformat()}
        if dates and isinstance(value, dates.timedelta):
            return {"L": [value.days, value.seconds, value.microseconds]}
        if type(value).__module__ == "numpy" and hasattr(value, "tolist"):
            return self.pack(value.tolist(), depth + 1)
        if self._lenient and isinstance(value, (collections.abc.Iterator, collections.abc.MappingView)):
            kind = "I" if isinstance(value, collections.abc.Iterator) else "V"
            return {kind: self._items(iter(value), depth)}  # type: ignore[arg-type]
        return self._opaque(value, f"a value of type {type(value).__name__}")

    def _opaque(self, value: Any, problem: str) -> Any:
        if not self._lenient:
            raise DoesNotCross(problem)
        return {"?": str(type(value).__name__)[:100]}


def unpack(data: Any) -> Any:
    """The plain value. Raises ValueError, TypeError, KeyError, ArithmeticError or RecursionError for anything else."""
    if isinstance(data, list):
        return [unpack(item) for item in data]
    if not isinstance(data, dict):
        return data
    ((tag, content),) = data.items()
    if tag == "i":
        return int(content, 16)
    if tag == "f":
        return {"nan": math.nan, "inf": math.inf, "-inf": -math.inf}[content]
    if tag == "j":
        return complex(*unpack(content))
    if tag in "ba":
        return (bytes if tag == "b" else bytearray).fromhex(content)
    if tag in "dco":
        makers = {"d": dict, "c": collections.Counter, "o": collections.OrderedDict}
        return makers[tag]({unpack(key): unpack(value) for key, value in unpack_pairs(content)})
    if tag == "q":
        items, max_length = content
        return collections.deque(unpack(items), max_length)
    if tag == "?":
        return Opaque(content)
    if tag in "DFL" or tag[:1] == "T":
        return _unpack_rarer(tag, content)
    containers: dict[str, Any] = {
        "t": tuple,
        "s": set,
        "z": frozenset,
        "r": lambda parts: range(*parts),
        "I": iter,
        "V": lambda parts: dict.fromkeys(parts).keys() if _hashable(parts) else list(parts),
    }
    return containers[tag](unpack(content))


def unpack_pairs(content: Any) -> list[Any]:
    """Pairs of packed values, packed as tuples."""
    return [pair["t"] for pair in content]


def _unpack_rarer(tag: str, content: Any) -> Any:
    if tag == "D":
        from decimal import Decimal

        return Decimal(content)
    if tag == "F":
        from fractions import Fraction

        return Fraction(*unpack(content))
    import datetime

    if tag == "L":
        return datetime.timedelta(*content)
    kinds: dict[str, Any] = {"Tdate": datetime.date, "Tdatetime": datetime.datetime, "Ttime": datetime.time}
    return kinds[tag].fromisoformat(content)


def _hashable(parts: list[Any]) -> bool:
    try:
        hash(tuple(parts))
    except TypeError:
        return False
    return True


def same(value: Any, expected: Any) -> bool:
    """Whether a value is what a JSON label says: a label has no tuples, no keys but texts, and floats of finite length.

    Two floats are compared to nine digits, all else exactly: an integer of many digits is no float near it.
    """
    if isinstance(expected, list):
        return (
            isinstance(value, (list, tuple))
            and len(value) == len(expected)
            and all(map(same, value, expected))
        )
    if isinstance(expected, dict):
        if not isinstance(value, dict) or len(value) != len(expected):
            return False
        by_text = {_as_key(key): item for key, item in value.items()}
        return by_text.keys() == expected.keys() and all(
            same(by_text[key], expected[key]) for key in expected
        )
    if isinstance(value, float) and isinstance(expected, float):
        return value == expected or math.isclose(value, expected, rel_tol=1e-9, abs_tol=1e-12)
    return bool(value == expected)


def with_keys(value: Any) -> Any:
    """An argument of a case; one whose keys are no texts comes as `{"\\0keys": [[key, value], ...]}`."""
    if isinstance(value, dict) and value.keys() == {"\0keys"}:
        return dict(map(tuple, value["\0keys"]))
    return value


def _as_key(key: Any) -> str:
    """A key as JSON has it."""
    if key is None or isinstance(key, bool):
        return {None: "null", True: "true", False: "false"}[key]
    return str(key)


def take_over(given: Any, changed: Any) -> None:
    """Functions that change their argument in place change the tests' own, at any depth."""
    if type(given) is not type(changed):
        return
    if isinstance(given, (list, collections.deque)):
        kept = [_merged(old, new) for old, new in zip(given, changed)]  # noqa: B905 - either may be longer
        rest = list(changed)[len(kept) :]
        given.clear()
        given.extend([*kept, *rest])
    elif isinstance(given, dict):
        merged = {key: _merged(given[key], new) if key in given else new for key, new in changed.items()}
        given.clear()
        given.update(merged)
    elif isinstance(given, set):
        given.clear()
        given.update(changed)
    elif isinstance(given, bytearray):
        given[:] = changed


def _merged(old: Any, new: Any) -> Any:
    if type(old) is type(new) and isinstance(old, (list, dict, set, bytearray, collections.deque)):
        take_over(old, new)
        return old
    return new


def reply(fd: int, answer: Any) -> None:
    """Writes one line."""
    data = memoryview(json.dumps(answer).encode() + b"\n")
    while data:
        data = data[os.write(fd, data) :]
