"""Waiting for what another thread does, with something to do meanwhile."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future
from typing import TypeVar

Value = TypeVar("Value")
Meanwhile = Callable[[], None]
"""Called again and again by who waits. What it raises ends the wait."""
EVERY_S = 0.25


def nothing() -> None:
    """There is nothing to do meanwhile."""


def awaited(future: Future[Value], meanwhile: Meanwhile, *, every_s: float = EVERY_S) -> Value:
    """The result of `future`. Raises what it raises, or what `meanwhile` raises, after which it is cancelled."""
    while True:
        try:
            return future.result(timeout=every_s)
        except TimeoutError:
            if future.done():
                raise
        try:
            meanwhile()
        except BaseException:
            future.cancel()
            raise
