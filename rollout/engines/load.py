"""What engines say of their own load (`GET /v1/loads`), sampled while episodes are played."""

from __future__ import annotations

import asyncio
import statistics
import time
from collections import deque
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from typing import Any, Protocol

import httpx

from polyturn.agents.http import HTTPAnswer

POLL_S = 1.0
ANSWER_S = 5.0
"""An engine that takes longer to say how it is says nothing."""
MAX_SILENT = 3
"""An engine that answers nothing at all so many times in a row is gone."""
KEPT = 100_000
"""Samples between two steps: a day of them."""
KEPT_TIMED = 3_600
"""Of them with their times: an hour."""


@dataclass(frozen=True, kw_only=True, slots=True)
class EngineLoad:
    """One sample of one engine."""

    num_running: int
    num_waiting: int
    """Requests in its queue."""
    num_used_tokens: int
    """KV of running requests; what is only cached is not among them."""
    max_tokens: int
    """KV that it has room for."""

    @property
    def kv_use(self) -> float:
        """Share of the room that running requests take; SGLang's own `token_usage` is rounded to hundredths."""
        return self.num_used_tokens / self.max_tokens if self.max_tokens > 0 else 0.0

    @classmethod
    def from_answer(cls, answer: Any) -> EngineLoad:
        """Of all data-parallel ranks together. Raises `ValueError` where the answer is another."""
        try:
            ranks = answer["loads"]
            sums = {
                name: sum(int(rank[key]) for rank in ranks)
                for name, key in (
                    ("num_running", "num_running_reqs"),
                    ("num_waiting", "num_waiting_reqs"),
                    ("num_used_tokens", "num_used_tokens"),
                    ("max_tokens", "max_total_num_tokens"),
                )
            }
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"no loads of an engine: {type(error).__name__} {error}") from error
        return cls(**sums)


Loads = Mapping[int, EngineLoad | None]
"""One sample, by the engines' numbers; None: it did not say."""


class LoadClient(Protocol):
    """`httpx.AsyncClient`, or `EngineClient`."""

    async def get(self, url: str, *, timeout: float) -> HTTPAnswer:
        """The answer of a page. Raises `httpx.HTTPError`."""
        ...


class LoadPoller:
    """Samples the load of engines, and keeps what a step's metrics want to know."""

    def __init__(
        self,
        urls: Mapping[int, str],
        *,
        client: LoadClient,
        set_present: Callable[[int, bool], None] | None = None,
        on_loads: Callable[[Loads], None] | None = None,
    ) -> None:
        """
        Args:
            urls: Of the engines themselves, not of a router, by their numbers.
            set_present: Told which engine has been silent for long, and which of those speaks again.
            on_loads: Called with every sample.
        """
        self._urls = dict(urls)
        self._client = client
        self._set_present = set_present or (lambda _number, _present: None)
        self._on_loads = on_loads or (lambda _: None)
        self._num_silent = dict.fromkeys(self._urls, 0)
        self._samples: list[Loads] = []
        self._timed: deque[tuple[float, Loads]] = deque(maxlen=KEPT_TIMED)

    def set_urls(self, urls: Mapping[int, str]) -> None:
        """Other engines are there from now on."""
        self._num_silent = {
            number: self._num_silent[number] if self._urls.get(number) == url else 0
            for number, url in urls.items()
        }
        self._urls = dict(urls)

    async def poll(self) -> Loads:
        """Take one sample."""
        urls = dict(self._urls)
        found = await asyncio.gather(*(self._load(number, url) for number, url in urls.items()))
        loads = dict(zip(urls, found, strict=True))
        if len(self._samples) < KEPT:
            self._samples.append(loads)
        self._timed.append((time.perf_counter(), loads))
        self._on_loads(loads)
        return loads

    async def _load(self, number: int, url: str) -> EngineLoad | None:
        try:
            answer = await self._client.get(f"{url}/v1/loads", timeout=ANSWER_S)
        except httpx.HTTPError:
            self._note_presence(number, url, answered=False)
            return None
        self._note_presence(number, url, answered=True)
        try:
            return EngineLoad.from_answer(answer.json())
        except ValueError:
            return None

    def _note_presence(self, number: int, url: str, *, answered: bool) -> None:
        if self._urls.get(number) != url:
            return  # another one is there by now
        was_gone = self._num_silent[number] >= MAX_SILENT
        self._num_silent[number] = 0 if answered else self._num_silent[number] + 1
        if self._num_silent[number] >= MAX_SILENT:
            self._set_present(number, False)
        elif was_gone:
            self._set_present(number, True)

    @asynccontextmanager
    async def polling(self, *, every_s: float = POLL_S) -> AsyncIterator[None]:
        """Take samples in the background for as long as the block runs."""

        async def poll_on() -> None:
            while True:
                await self.poll()
                await asyncio.sleep(every_s)

        task = asyncio.create_task(poll_on())
        try:
            yield
        finally:
            task.cancel()
            with suppress(asyncio.CancelledError):
                await task

    @property
    def num_samples(self) -> int:
        """That the next figures are of."""
        return len(self._samples)

    def take_samples(self) -> list[tuple[float, Loads]]:
        """The samples since the last call, the newest `KEPT_TIMED`, each with its time by `time.perf_counter`."""
        samples = list(self._timed)
        self._timed.clear()
        return samples

    def take_figures(self) -> Mapping[str, float]:
        """Metrics of all samples since the last call: of each engine means, and the largest share of its KV."""
        samples, self._samples = self._samples, []
        row: dict[str, float] = {}
        for index in sorted({number for sample in samples for number in sample}):
            loads = [sample[index] for sample in samples if index in sample]
            said = [load for load in loads if load is not None]
            if loads:
                row[f"engine/{index}/silent"] = 1 - len(said) / len(loads)
            if said:
                row |= {
                    f"engine/{index}/kv_use": statistics.fmean(load.kv_use for load in said),
                    f"engine/{index}/kv_use_max": max(load.kv_use for load in said),
                    f"engine/{index}/running": statistics.fmean(load.num_running for load in said),
                    f"engine/{index}/waiting": statistics.fmean(load.num_waiting for load in said),
                }
        return row
