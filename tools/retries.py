"""When a service is asked again: which failures pass, after how long and until when, and when it is left alone."""

from __future__ import annotations

import email.utils
import errno
import math
import random
import resource
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field

PASSING = frozenset({408, 425, 429})
"""Refusals that say "later": request timeout, too early, too many requests. All others say "never"."""


def may_pass(status: int) -> bool:
    """Whether the same request may be answered later."""
    return status in PASSING or status >= 500


def asked_wait_s(headers: Mapping[str, str], *, now: float | None = None) -> float | None:
    """The seconds that `Retry-After` asks for, which names seconds or a date; None where it says nothing readable.

    `Retry-After-Ms`, which some services send beside it, is more exact.
    """
    milliseconds = _number(headers.get("retry-after-ms", ""))
    if milliseconds is not None:
        return milliseconds / 1000
    text = headers.get("retry-after", "").strip()
    seconds = _number(text)
    if seconds is None:
        try:
            date = email.utils.parsedate_to_datetime(text)
        except (TypeError, ValueError, OverflowError):
            return None
        seconds = max(0.0, date.timestamp() - (time.time() if now is None else now))
    return seconds


def _number(text: str) -> float | None:
    """A finite number from 0 up; what is below is 0."""
    try:
        value = float(text)
    except ValueError:
        return None
    return max(0.0, value) if math.isfinite(value) else None


@dataclass(frozen=True, kw_only=True, slots=True)
class Retries:
    """How often, and after how long, a request is sent again. Waits double, each times a factor in [0.5, 1.5)."""

    max_retries: int = 4
    """Of tries that nobody asked to wait for: a `Retry-After` counts against the deadline alone."""
    first_wait_s: float = 0.25
    max_wait_s: float = 30.0
    deadline_s: float = 600.0
    """Of the request with all its tries and waits."""
    jitter: random.Random = field(default_factory=random.Random)

    def wait_s(self, attempt: int) -> float:
        """Seconds before the retry that follows attempt 0, 1, ..."""
        return min(self.first_wait_s * 2 ** min(attempt, 64), self.max_wait_s) * (0.5 + self.jitter.random())


class Tries:
    """The tries of one request, the first of which is under way."""

    def __init__(self, retries: Retries, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._retries, self._clock = retries, clock
        self._deadline = clock() + retries.deadline_s
        self._num_uninvited = 0
        self._is_late = False
        self.count = 1

    @property
    def left_s(self) -> float:
        """Until the deadline; at least 0."""
        return max(0.0, self._deadline - self._clock())

    def next_wait_s(self, asked_s: float | None = None) -> float | None:
        """The seconds to wait before the next try, which is counted; None: there is none.

        Args:
            asked_s: What the server asked for. It is never asked sooner.
        """
        wait_s = self._retries.wait_s(self.count - 1)
        if asked_s:
            wait_s += asked_s
        else:
            self._num_uninvited += 1
        self._is_late = wait_s >= self.left_s
        if self._num_uninvited > self._retries.max_retries or self._is_late:
            return None
        self.count += 1
        return wait_s

    def over(self, problem: str, asked_s: float | None = None) -> str:
        """The problem, and why there is no further try."""
        asked = f"; it asks to wait {asked_s:g} s" if asked_s else ""
        late = (
            f", and the deadline of {self._retries.deadline_s:.3g} s leaves no time" if self._is_late else ""
        )
        return f"{problem}{asked}; tried {self.count} times{late}"


def transport_problem(error: BaseException) -> str:
    """What a request died of, in a line. Out of file descriptors is said in words: httpx does not tell."""
    for cause in _causes(error):
        if isinstance(cause, OSError) and cause.errno in (errno.EMFILE, errno.ENFILE):
            soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
            return (
                f"no connection could be opened: this process has no file descriptor left, its limit is {soft}; "
                "raise that (ulimit -n), or lower rollout.max_concurrent_requests and max_concurrent_episodes"
            )
    return f"{type(error).__name__}: {error}".rstrip(": ")


def _causes(error: BaseException) -> Iterator[BaseException]:
    """The exception and what it came from, groups opened."""
    waiting, seen = [error], set()
    while waiting:
        one = waiting.pop()
        if id(one) in seen:
            continue
        seen.add(id(one))
        yield one
        waiting += [cause for cause in (one.__cause__, one.__context__) if cause is not None]
        if isinstance(one, BaseExceptionGroup):
            waiting += one.exceptions


class CircuitBreaker:
    """Closed until `threshold` failures come in a row; then open for `cooldown_s`, after which one trial is admitted.

        closed --threshold failures--> open --cooldown--> trial --success--> closed
                                        ^                   |
                                        +------failure------+

    Safe in threads.
    """

    def __init__(
        self, *, threshold: int, cooldown_s: float, clock: Callable[[], float] = time.monotonic
    ) -> None:
        assert threshold >= 1
        self._threshold = threshold
        self._cooldown_s = cooldown_s
        self._clock = clock
        self._lock = threading.Lock()
        self._num_failures = 0
        self._opened_at: float | None = None
        self._on_trial = False

    def admit(self) -> bool:
        """Whether to ask now. After the cooldown only the first one is admitted, until its outcome is told."""
        with self._lock:
            if self._opened_at is None:
                return True
            if self._on_trial or self._clock() - self._opened_at < self._cooldown_s:
                return False
            self._on_trial = True
            return True

    @property
    def is_open(self) -> bool:
        """Whether the service is left alone, or on trial."""
        return self._opened_at is not None

    def succeed(self) -> None:
        """The service answered."""
        with self._lock:
            self._num_failures, self._opened_at, self._on_trial = 0, None, False

    def fail(self) -> None:
        """The service did not answer as it should."""
        with self._lock:
            self._num_failures += 1
            if self._on_trial or self._num_failures >= self._threshold:
                self._opened_at = self._clock()
            self._on_trial = False
