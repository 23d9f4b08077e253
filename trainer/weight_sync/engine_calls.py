"""Calls to all engines of an update at once; who failed, and with what answer, is known by URL."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import nullcontext
from typing import Any, TypeVar

from polyturn.rollout.engines.control import EngineControl
from polyturn.rollout.engines.process import EngineError
from polyturn.tools.closing import Closing
from polyturn.trainer.weight_sync import WeightSyncError
from polyturn.trainer.weight_sync.patience import Patience

T = TypeVar("T")
LONGEST_SUM_S = 600.0
"""How long an engine may take to sum up its weights."""
BEGIN = "begin a weight update"
"""What engines are to do first, in the sentence of those that do not."""
Calls = Mapping[str, "Future[T]"]
"""Calls under way, by the engine's URL."""


class EngineCalls(Closing):
    """The engines that weights are published to."""

    def __init__(self, urls: Sequence[str], *, timeout_s: float, hung_after_s: float | None = None) -> None:
        """
        Args:
            timeout_s: How long any of them may take to answer one call.
            hung_after_s: After which one is taken to hang, once it is known how long answers take; None: `timeout_s`.
        """
        self.urls = list(urls)
        self.patience = Patience(
            timeout_s=timeout_s, hung_after_s=timeout_s if hung_after_s is None else hung_after_s
        )
        self._controls = {url: EngineControl(url, timeout_s=timeout_s) for url in urls}
        self._threads = ThreadPoolExecutor(max_workers=max(1, len(urls)), thread_name_prefix="weight-sync")

    def __len__(self) -> int:
        return len(self.urls)

    def start(self, call: Callable[[EngineControl], T]) -> dict[str, Future[T]]:
        """Begin a call on every engine."""
        return {url: self._threads.submit(call, control) for url, control in self._controls.items()}

    def ask(self, call: Callable[[EngineControl], T], *, doing: str) -> dict[str, T]:
        """What every engine answers to a call, by its URL.

        Raises:
            WeightSyncError: names those that refused, broke off, or said nothing in time.
        """
        return self.answers(self.start(call), doing=doing)

    def start_sums(self) -> dict[str, Future[dict[str, str]]]:
        """Begin to have every engine sum up its weights."""
        return self.start(lambda engine: engine.weight_checksums(timeout_s=LONGEST_SUM_S))

    def sums(self, calls: Mapping[str, Future[dict[str, str]]]) -> dict[str, dict[str, str]]:
        """The checksums of every engine; see `ask`."""
        return self.answers(calls, doing="sum its weights up", within_s=LONGEST_SUM_S)

    def answers(
        self, calls: Mapping[str, Future[T]], *, doing: str, within_s: float | None = None
    ) -> dict[str, T]:
        """The answers to calls under way; see `ask`. `within_s`: if they take longer than others by their nature."""
        is_ordinary = within_s is None
        within_s = self.patience.seconds if within_s is None else within_s
        deadline = time.monotonic() + within_s
        answers: dict[str, T] = {}
        failures: dict[str, str] = {}
        for url, call in calls.items():
            try:
                with self.patience.noting() if is_ordinary else nullcontext():
                    answers[url] = call.result(timeout=max(0.0, deadline - time.monotonic()))
            except EngineError as fault:
                failures[url] = str(fault)
            except TimeoutError:
                failures[url] = f"no answer within {within_s:g} s"
        if failures:
            raise failed(failures, doing=doing)
        return answers

    def begin_update(self, version: int) -> None:
        """Open an update on every engine, and let no token pass for one of a whole version until its end."""
        self.answers(self.start_update(version), doing=BEGIN)

    def start_update(self, version: int) -> dict[str, Future[None]]:
        """Begin to open it; nothing may be sent before all of these have answered."""
        return self.start(lambda engine: _begin(engine, version))

    def end_update(self, version: int) -> None:
        """Close it, and have every engine say that it serves the version."""
        self.ask(lambda engine: engine.end_weight_update(), doing="end a weight update")
        self.ask(lambda engine: engine.stamp(version), doing="take a version")
        self.check_version(version)
        self.patience.end_update()

    def check_version(self, version: int) -> None:
        """Raise `WeightSyncError` unless every engine says that it serves `version`."""
        served = self.ask(lambda engine: engine.weight_version(), doing="say its version")
        wrong = {
            url: f"it serves {found!r}, not {version}"
            for url, found in served.items()
            if found != str(version)
        }
        if wrong:
            raise failed(wrong, doing=f"take version {version}")

    def close(self) -> None:
        """Close the connections; calls under way end by themselves."""
        self._threads.shutdown(wait=False)
        for control in self._controls.values():
            control.close()


def _begin(engine: EngineControl, version: int) -> None:
    engine.begin_weight_update()
    engine.stamp(f"{version} in part")


def failed(failures: Mapping[str, str], *, doing: str) -> WeightSyncError:
    """The error that names the engines that failed."""
    told = "; ".join(f"{url}: {answer}" for url, answer in failures.items())
    return WeightSyncError(f"{len(failures)} of the engines did not {doing}: {told}", failures=failures)


def faults_of(calls: Mapping[str, Future[Any]]) -> dict[str, str]:
    """What those calls failed with that have ended already."""
    return {
        url: str(fault)
        for url, call in calls.items()
        if call.done() and (fault := call.exception()) is not None
    }
