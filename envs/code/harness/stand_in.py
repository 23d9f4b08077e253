"""What tests take from pytest, where it is not installed: `raises`, `approx`, `param` and `mark.parametrize`."""

from __future__ import annotations

import math
import re
import sys
import types
from collections.abc import Callable
from typing import Any

from polyturn.envs.code.harness.asking import StoppedIteration


class Raises:
    """A block that must raise."""

    def __init__(self, expected: Any, match: str | None = None) -> None:
        kinds = expected if isinstance(expected, tuple) else (expected,)
        stops = any(issubclass(kind, (StopIteration, StopAsyncIteration)) for kind in kinds)
        self._expected = (*kinds, *([StoppedIteration] if stops else []))
        self._match = match
        self.value: BaseException | None = None

    def __enter__(self) -> Raises:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: Any) -> bool:
        if kind is None:
            raise AssertionError(f"{self._expected[0].__name__} was not raised")
        if not issubclass(kind, self._expected):
            return False
        self.value = error
        if self._match is not None and re.search(self._match, str(error)) is None:
            raise AssertionError(f"{str(error)!r} does not match {self._match!r}")
        return True


def raises(expected: Any, *call: Any, match: str | None = None, **names: Any) -> Any:
    """A block that must raise, or a call that must."""
    if not call:
        return Raises(expected, match)
    with Raises(expected) as caught:
        call[0](*call[1:], **names)
    return caught


class Approx:
    """Equals numbers near its own, and containers of such."""

    def __init__(self, value: Any, rel: float | None = None, abs: float | None = None) -> None:
        self._value, self._rel, self._abs = value, 1e-6 if rel is None else rel, 1e-12 if abs is None else abs

    def __repr__(self) -> str:
        return f"approx({self._value!r})"

    def __eq__(self, other: object) -> bool:
        return self._near(other, self._value)

    __hash__ = None  # type: ignore[assignment]

    def _near(self, value: Any, wanted: Any) -> bool:
        if isinstance(wanted, dict):
            return (
                isinstance(value, dict)
                and value.keys() == wanted.keys()
                and all(self._near(value[key], wanted[key]) for key in wanted)
            )
        if isinstance(wanted, (list, tuple)):
            return (
                type(value) is type(wanted)
                and len(value) == len(wanted)
                and all(map(self._near, value, wanted))
            )
        if isinstance(wanted, (int, float)) and isinstance(value, (int, float)):
            return value == wanted or math.isclose(value, wanted, rel_tol=self._rel, abs_tol=self._abs)
        return bool(value == wanted)


def parametrize(names: Any, values: Any, **_: Any) -> Callable[[Any], Any]:
    """Runs a test for each of the values."""
    known = [name.strip() for name in names.split(",")] if isinstance(names, str) else list(names)

    def decorate(function: Any) -> Any:
        def run_all(*owner: Any, **given: Any) -> None:
            for case in values:
                function(
                    *owner, **given, **dict(zip(known, case if len(known) > 1 else (case,), strict=True))
                )

        return run_all

    return decorate


class Marks:
    """Of all marks one does something."""

    parametrize = staticmethod(parametrize)

    def __getattr__(self, name: str) -> Any:
        return lambda *given, **_: given[0] if given and callable(given[0]) else lambda function: function


def install() -> None:
    """Makes `import pytest` give these names."""
    module = types.ModuleType("pytest")
    module.__dict__.update(raises=raises, approx=Approx, mark=Marks(), param=lambda *values, **_: values)
    sys.modules["pytest"] = module
