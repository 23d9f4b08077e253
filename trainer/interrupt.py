"""Ctrl-C: the first asks for a drain, the second insists."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable
from types import FrameType, TracebackType


class InterruptGuard:
    """Turns the first SIGINT or SIGTERM into a flag, and a second one into `KeyboardInterrupt`."""

    def __init__(self, on_request: Callable[[], None] = lambda: None) -> None:
        """`on_request` is called once, in the signal handler, when the first signal arrives."""
        self._on_request = on_request
        self._requested = threading.Event()
        self._previous: dict[int, object] = {}

    @property
    def requested(self) -> bool:
        return self._requested.is_set()

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
        self._on_request()
