"""What a tool may cost: a deadline, a length, and how many calls run at once."""

from __future__ import annotations

import asyncio
import threading
from collections import deque
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any, Literal, TypeVar

from polyturn.tools.plain import as_number

Value = TypeVar("Value")

MAX_RESULT_CHARS = 32_768
"""What the model is shown of the result of a tool that sets no limit of its own."""


class SlotsExhausted(RuntimeError):
    """Every slot of a tool is held by a call that was given up and never returned. Infrastructure, not the model."""


class OutOfTime(Exception):
    """What the policy may take for its tool calls is over, and one of them has not returned."""


class ConcurrencyGate:
    """At most `num_slots` calls at once, over all threads and event loops of the process; first come, first served.

    A thread cannot be killed, so a call that was given up keeps its slot until it really ends. When all slots are
    kept that way, those who wait and those who come get `SlotsExhausted` instead of waiting for ever.
    """

    def __init__(self, num_slots: int) -> None:
        """
        Raises:
            ValueError: `num_slots` below 1.
        """
        if num_slots < 1:
            raise ValueError(f"a tool needs at least one slot, not {num_slots}")
        self.num_slots = num_slots
        self._lock = threading.Lock()
        self._num_free = num_slots
        self._num_given_up = 0
        self._waiting: deque[Future[None]] = deque()

    @property
    def num_running(self) -> int:
        """Slots that are taken."""
        return self.num_slots - self._num_free

    def acquire(self) -> None:
        """Take a slot; blocks the thread until there is one."""
        ticket = self._ticket()
        if ticket is not None:
            ticket.result()

    async def acquire_async(self) -> None:
        """Take a slot; waits on the event loop that runs."""
        ticket = self._ticket()
        if ticket is None:
            return
        try:
            await asyncio.wrap_future(ticket)
        except asyncio.CancelledError:
            # Granted in the very moment of the cancellation: nobody will use it.
            if not ticket.cancel() and ticket.exception() is None:
                self.release()
            raise

    def release(self, *, given_up: bool = False) -> None:
        """Give a slot back; `given_up` says that the call had been marked so."""
        with self._lock:
            self._num_given_up -= given_up
            while self._waiting:
                ticket = self._waiting.popleft()
                if ticket.set_running_or_notify_cancel():
                    ticket.set_result(None)
                    return
            self._num_free += 1

    def give_up(self) -> None:
        """Mark one running call as given up: it keeps its slot until `release(given_up=True)`."""
        with self._lock:
            self._num_given_up += 1
            if self._num_given_up < self.num_slots:
                return
            waiting, self._waiting = self._waiting, deque()
            for ticket in waiting:
                if ticket.set_running_or_notify_cancel():
                    ticket.set_exception(self._exhausted())

    def _ticket(self) -> Future[None] | None:
        """None where a slot was free, else what to wait for."""
        with self._lock:
            if self._num_given_up >= self.num_slots:
                raise self._exhausted()
            if self._num_free > 0:
                self._num_free -= 1
                return None
            ticket: Future[None] = Future()
            self._waiting.append(ticket)
            return ticket

    def _exhausted(self) -> SlotsExhausted:
        return SlotsExhausted(f"all {self.num_slots} slots are held by calls that never returned")


@dataclass(frozen=True, kw_only=True, slots=True)
class ToolLimits:
    """The limits and the price of one tool, as given to `@tool`."""

    timeout_s: float | None = None
    """Seconds for one call, without the wait for a slot. None: as long as it takes."""
    max_output_chars: int | None = None
    """Characters of a result that the model is shown. None: as many as of any tool."""
    truncate: Literal["middle", "end"] = "middle"
    """Where a longer result is cut."""
    gate: ConcurrencyGate | None = None
    """How many calls run at once. Tools that share a gate share its slots."""
    cost: float | Callable[[Mapping[str, Any]], float] = 0.0
    """What a call costs, in a unit of the author's: a number, or a function of the arguments."""

    def __post_init__(self) -> None:
        if self.timeout_s is not None and not self.timeout_s > 0:
            raise ValueError(f"timeout_s must be above 0, not {self.timeout_s}")
        if self.max_output_chars is not None and self.max_output_chars < 1:
            raise ValueError(f"max_output_chars must be at least 1, not {self.max_output_chars}")
        if self.truncate not in ("middle", "end"):
            raise ValueError(f"truncate must be 'middle' or 'end', not {self.truncate!r}")

    def cost_of(self, arguments: Mapping[str, Any]) -> float:
        """The price of one call. Raises `ValueError` where it is no finite number."""
        try:
            return as_number(self.cost(arguments) if callable(self.cost) else self.cost)
        except ValueError as error:
            raise ValueError(f"the cost of a call: {error}") from error

    def shorten(self, text: str, default: int | None = None) -> tuple[str, bool]:
        """The text as the model is shown it, and whether it was cut; `default` is the limit where there is none.

        shorten("abcdefghij") at 4 characters, middle: "ab\\n... [truncated: 4 of 10 characters shown] ...\\nij"
        """
        limit = self.max_output_chars or default
        if limit is None or len(text) <= limit:
            return text, False
        notice = f"... [truncated: {limit:,} of {len(text):,} characters shown]"
        if self.truncate == "end":
            return f"{text[:limit]}\n{notice}", True
        tail = limit // 2
        return f"{text[: limit - tail]}\n{notice} ...\n{text[len(text) - tail :] if tail else ''}", True


NO_LIMITS = ToolLimits()
