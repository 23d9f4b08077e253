"""How long an engine may stay silent while it takes weights, when nothing else of it can be asked."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

FACTOR = 10.0
"""By which an answer may be later than the latest of the updates before."""


class Patience:
    """Of one group of engines.

    Its first update sets things up (connections, kernels, memory), so that only `timeout_s` bounds it. From then on it
    is known how long an answer takes: one that is late by `hung_after_s`, and by far more than the others took, does
    not come.
    """

    def __init__(self, *, timeout_s: float, hung_after_s: float) -> None:
        self._timeout_s = timeout_s
        self._hung_after_s = min(hung_after_s, timeout_s)
        self._longest_s = 0.0
        self._is_known = False

    @property
    def seconds(self) -> float:
        """How long to wait for an answer."""
        if not self._is_known:
            return self._timeout_s
        return min(self._timeout_s, max(self._hung_after_s, FACTOR * self._longest_s))

    def note(self, seconds: float) -> None:
        """An answer took so long."""
        self._longest_s = max(self._longest_s, seconds)

    @contextmanager
    def noting(self) -> Iterator[None]:
        """Note how long the block takes, unless it fails."""
        started = time.monotonic()
        yield
        self.note(time.monotonic() - started)

    def end_update(self) -> None:
        """An update went through: what its answers took is known from now on."""
        self._is_known = True
