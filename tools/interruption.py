"""Ctrl-C as a request to end in order."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable
from types import FrameType, TracebackType


class InterruptGuard:
    """Turns the first SIGINT or SIGTERM into a flag, and a second one into `KeyboardInterrupt`."""

    def __init__(self) -> None:
        self._subscribers: list[Callable[[], object]] = []
        self._requested = threading.Event()
        self._previous: dict[int, object] = {}

    @property
    def requested(self) -> bool:
        return self._requested.is_set()

    def subscribe(self, on_request: Callable[[], object]) -> None:
        """Call `on_request` once, in the signal handler, when the first signal arrives; at once where it has."""
        self._subscribers.append(on_request)
        if self.requested:
            on_request()

    def __enter__(self) -> InterruptGuard:
        for number in (signal.SIGINT, signal.SIGTERM):
            self._previous[number] = signal.signal(number, self._handle)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)  # type: ignore[arg-type]

    def _handle(self, number: int, frame: FrameType | None) -> None:  # noqa: ARG002
        if self._requested.is_set():
            raise KeyboardInterrupt
        self._requested.set()
        for on_request in self._subscribers:
            on_request()
