"""A circuit breaker: after many failures in a row nothing is asked for a while."""

from __future__ import annotations

import time
from collections.abc import Callable


class CircuitBreaker:
    """Closed until `threshold` failures come in a row; then open for `cooldown_s`, after which one trial is admitted.

        closed --threshold failures--> open --cooldown--> trial --success--> closed
                                        ^                   |
                                        +------failure------+

    Not locked: to be used from one thread.
    """

    def __init__(
        self, *, threshold: int, cooldown_s: float, clock: Callable[[], float] = time.monotonic
    ) -> None:
        assert threshold >= 1
        self._threshold = threshold
        self._cooldown_s = cooldown_s
        self._clock = clock
        self._num_failures = 0
        self._opened_at: float | None = None
        self._on_trial = False

    @property
    def is_open(self) -> bool:
        """Whether nothing is admitted at this moment."""
        if self._opened_at is None:
            return False
        return self._on_trial or self._clock() - self._opened_at < self._cooldown_s

    def admit(self) -> bool:
        """Whether to ask now. After the cooldown only the first one is admitted, until its outcome is told."""
        if self.is_open:
            return False
        self._on_trial = self._opened_at is not None
        return True

    def succeed(self) -> None:
        """The backend answered."""
        self._num_failures, self._opened_at, self._on_trial = 0, None, False

    def fail(self) -> None:
        """The backend did not answer as it should."""
        self._num_failures += 1
        if self._on_trial or self._num_failures >= self._threshold:
            self._opened_at = self._clock()
        self._on_trial = False
