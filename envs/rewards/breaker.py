"""A circuit breaker: leave alone for a while what fails again and again."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable


class Breaker:
    """Safe to use from several threads.

    closed --- num_failures in a row ---> open --- reset_s ---> half open: one call is let through
      ^                                    ^                          |
      +------------- success --------------+------- failure ----------+
    """

    def __init__(
        self, *, num_failures: int, reset_s: float, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._num_failures = num_failures
        self._reset_s = reset_s
        self._clock = clock
        self._lock = threading.Lock()
        self._in_a_row = 0
        self._opened_at: float | None = None
        self._is_trying = False

    def allows(self) -> bool:
        """Whether a call may be made now; its outcome must then be told."""
        with self._lock:
            if self._opened_at is None:
                return True
            if self._is_trying or self._clock() - self._opened_at < self._reset_s:
                return False
            self._is_trying = True
            return True

    def succeeded(self) -> None:
        """A call went well."""
        with self._lock:
            self._in_a_row, self._opened_at, self._is_trying = 0, None, False

    def failed(self) -> None:
        """A call failed."""
        with self._lock:
            self._in_a_row += 1
            if self._is_trying or self._in_a_row >= self._num_failures:
                self._opened_at, self._is_trying = self._clock(), False
