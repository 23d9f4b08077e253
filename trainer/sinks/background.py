"""A sink in a thread of its own, whose troubles are not the run's.

    rows -> [queue, bounded] -> thread: open, write, write, ..., close

A row that finds the queue full, or that the sink raises at, is dropped and counted.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable
from functools import partial

from polyturn.trainer.sinks.protocol import MetricSink, Row, SinkStart


class BackgroundSink:
    """Hands rows to a sink without waiting for it."""

    def __init__(
        self,
        name: str,
        sink: MetricSink,
        start: SinkStart,
        *,
        queue_size: int,
        close_timeout_s: float,
    ) -> None:
        """The sink is opened by its thread.

        Args:
            queue_size: rows that wait for it.
            close_timeout_s: how long `close` waits for these.
        """
        self.name = name
        self._sink = sink
        self._start = start
        self._close_timeout_s = close_timeout_s
        self._rows: queue.Queue[tuple[int, Row] | None] = queue.Queue(queue_size)
        self._lock = threading.Lock()
        self._num_dropped = 0
        self._has_warned = False
        self._given_up = threading.Event()
        """Nobody waits for what the thread may still do."""
        self._thread = threading.Thread(target=self._run, name=f"metrics to {name}", daemon=True)
        self._thread.start()

    @property
    def num_dropped(self) -> int:
        """Rows that the sink did not get, or did not take, so far."""
        return self._num_dropped

    def write(self, step: int, values: Row) -> None:
        """Queue a row; never waits and never raises."""
        try:
            self._rows.put_nowait((step, dict(values)))
        except queue.Full:
            self._drop(f"it has not taken the last {self._rows.maxsize} rows")

    def close(self) -> None:
        """Wait for the rows in the queue, for so long as it may take."""
        try:
            self._rows.put(None, timeout=self._close_timeout_s)
        except queue.Full:
            pass
        else:
            self._thread.join(self._close_timeout_s)
        if self._thread.is_alive():
            self._given_up.set()
            self._warn(f"it had not taken all rows {self._close_timeout_s:g} s after the run's end")

    def _run(self) -> None:
        is_open = self._attempt(partial(self._sink.open, self._start))
        while not self._given_up.is_set():
            item = self._rows.get()
            if item is None:
                break
            if not is_open or not self._attempt(partial(self._sink.write, *item)):
                self._drop()
        if is_open:
            self._attempt(self._sink.close)

    def _attempt(self, call: Callable[[], None]) -> bool:
        try:
            call()
        except BaseException as fault:  # noqa: BLE001 - whatever a dashboard raises, the run goes on without it
            self._warn(f"{type(fault).__name__}: {fault}")
            return False
        return True

    def _drop(self, why: str = "") -> None:
        with self._lock:
            self._num_dropped += 1
        if why:
            self._warn(why)

    def _warn(self, why: str) -> None:
        """Once."""
        with self._lock:
            has_warned, self._has_warned = self._has_warned, True
        if not has_warned:
            self._start.tell(
                f"warning: metrics to {self.name}: {why}. The run goes on, and metrics.jsonl has every row; "
                "sink/NAME/dropped in it counts what is missing there"
            )
