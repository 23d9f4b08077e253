"""What a request asks for: parameters by name, read as what they are to be."""

from __future__ import annotations

import math
from collections.abc import Iterable


class BadParameter(ValueError):
    """A parameter is not what it has to be; one sentence."""


class NotThere(LookupError):
    """What was asked for is not there; one sentence."""

    def __str__(self) -> str:
        return str(self.args[0])


class Parameters:
    """Pairs of names and texts, as a query string has them. Every method raises `BadParameter` for a wrong value."""

    def __init__(self, pairs: Iterable[tuple[str, str]] = ()) -> None:
        self._pairs = tuple(pairs)

    def every(self, name: str) -> list[str]:
        """All values of a name, in order."""
        return [value for key, value in self._pairs if key == name]

    def text(self, name: str) -> str | None:
        """The value; None where there is none."""
        found = self.every(name)
        if len(found) > 1:
            raise BadParameter(f"{name} is given {len(found)} times; give it once")
        return found[0] if found else None

    def required(self, name: str) -> str:
        """The value, which must be there."""
        found = self.text(name)
        if found is None:
            raise BadParameter(f"{name} is missing")
        return found

    def integer(self, name: str, default: int, *, low: int = 0, high: int = 2**53) -> int:
        """A whole number of `low` to `high`."""
        found = self.maybe_integer(name, low=low, high=high)
        return default if found is None else found

    def maybe_integer(self, name: str, *, low: int = 0, high: int = 2**53) -> int | None:
        """The same; None where there is none."""
        text = self.text(name)
        if text is None:
            return None
        digits = text.removeprefix("-")
        if not (digits.isascii() and digits.isdigit()) or len(digits) > 20 or not low <= int(text) <= high:
            raise BadParameter(f"{name} must be a whole number of {low} to {high}")
        return int(text)

    def maybe_number(self, name: str) -> float | None:
        """A finite number; None where there is none."""
        text = self.text(name)
        if text is None:
            return None
        try:
            number = float(text)
        except ValueError:
            number = math.nan
        if not math.isfinite(number):
            raise BadParameter(f"{name} must be a finite number")
        return number

    def maybe_flag(self, name: str) -> bool | None:
        """`true` or `false`; None where there is none."""
        text = self.text(name)
        if text not in (None, "true", "false"):
            raise BadParameter(f"{name} must be true or false")
        return None if text is None else text == "true"
