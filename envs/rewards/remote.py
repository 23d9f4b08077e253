"""Rewards from a service: batched HTTP requests with a deadline, retries and a breaker.

    POST url   {"episodes": [{"task_id", "answer", "label", "messages", "metadata", "metrics"}, ...]}
    200        {"rewards": [0.5, {"style": 1.0, "facts": 0.0}, null, ...]}

One reward for each episode, in their order: a number, numbers by name, or null for one that could not be graded.
"""

from __future__ import annotations

import asyncio
import json
import queue
import threading
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, InvalidStateError
from dataclasses import dataclass, field
from typing import Any

import httpx
import orjson

from polyturn.configs.schema.tasks import RemoteReward
from polyturn.envs.faults import EnvironmentFault
from polyturn.envs.messages import EpisodeView, RewardValue, as_score
from polyturn.tools.bounded_answers import BoundedSyncTransport
from polyturn.tools.retries import CircuitBreaker, Retries, Tries, asked_wait_s, may_pass, transport_problem
from polyturn.tools.secrets import blank_credentials, public_url

FIRST_DELAY_S = 0.1
MAX_DELAY_S = 5.0
_NEVER_ARRIVED = (httpx.ConnectError, httpx.ConnectTimeout, httpx.RemoteProtocolError)
"""The request was not answered, and may be sent again."""


@dataclass(frozen=True, slots=True)
class Waiting:
    """An episode on its way to a reward."""

    task_id: str
    body: orjson.Fragment
    deadline: float
    reward: Future[RewardValue] = field(default_factory=Future)


class RemoteGrader:
    """A reward that a service gives. Any number of environments, threads and event loops may share one.

    Every failure is an `EnvironmentFault`: no answer by the deadline, a service that cannot be reached or says no,
    an answer that is not of the stated form.
    """

    name = "remote"

    def __init__(self, config: RemoteReward) -> None:
        """Raises `ValueError` for a url that is none. Sends nothing yet."""
        url = httpx.URL(config.url)
        if url.scheme not in ("http", "https") or not url.host:
            raise ValueError(f"url: {public_url(config.url)!r} is not an http(s) address")
        self._config = config
        self._waiting: queue.Queue[Waiting | None] = queue.Queue()
        self._url = public_url(config.url)
        self._client = httpx.Client(
            transport=BoundedSyncTransport(httpx.HTTPTransport(trust_env=False)), trust_env=False
        )
        self._headers: Mapping[str, str] = {}
        """Beside the type of the content."""
        self._breaker = CircuitBreaker(threshold=config.breaker_failures, cooldown_s=config.breaker_reset_s)
        self._gathering = threading.Lock()
        self._starting = threading.Lock()
        self._senders: list[threading.Thread] = []

    async def __call__(self, episode: EpisodeView) -> RewardValue:
        deadline = time.monotonic() + self._config.deadline_s
        waiting = Waiting(episode.task.task_id, self._encode(episode), deadline)
        self._start()
        self._waiting.put(waiting)
        try:
            async with asyncio.timeout(self._config.deadline_s):
                return await asyncio.wrap_future(waiting.reward)
        except TimeoutError:
            raise EnvironmentFault(self._too_late()).of(self._part) from None
        except EnvironmentFault as fault:
            raise fault.of(self._part) from fault.__cause__

    @property
    def _part(self) -> str:
        return f"reward service {self._url}"

    def close(self) -> None:
        """End the threads, once what they are sending is answered."""
        for _ in self._senders:
            self._waiting.put(None)
        for sender in self._senders:
            sender.join()
        self._senders.clear()
        self._client.close()

    def _start(self) -> None:
        with self._starting:
            if not self._senders:
                self._senders = [
                    threading.Thread(target=self._send_batches, name=f"reward-{index}", daemon=True)
                    for index in range(self._config.max_concurrent_requests)
                ]
                for sender in self._senders:
                    sender.start()

    def _send_batches(self) -> None:
        while True:
            with self._gathering:
                batch, is_last = self._gather()
            # Whoever waited has gone when its deadline is over or its episode was cancelled.
            batch = [item for item in batch if item.reward.set_running_or_notify_cancel()]
            if batch:
                try:
                    self._send(batch)
                except EnvironmentFault as fault:
                    settle(batch, fault)
                except Exception as error:  # noqa: BLE001  nobody else could tell those who wait
                    settle(batch, EnvironmentFault(f"{self._url}: {type(error).__name__}: {error}"))
            if is_last:
                return

    def _gather(self) -> tuple[list[Waiting], bool]:
        """Up to a batch of what comes within `linger_s` of the first, and whether to end after it."""
        first = self._waiting.get()
        if first is None:
            return [], True
        batch, until = [first], time.monotonic() + self._config.linger_s
        while len(batch) < self._config.batch_size:
            try:
                item = self._waiting.get(timeout=max(0.0, until - time.monotonic()))
            except queue.Empty:
                break
            if item is None:
                return batch, True
            batch.append(item)
        return batch, False

    def _send(self, batch: Sequence[Waiting]) -> None:
        """Post a batch until it is answered, and hand out the rewards. Raises `EnvironmentFault`."""
        content = self._content(batch)
        deadline = max(item.deadline for item in batch)
        tries = Tries(
            Retries(
                max_retries=self._config.max_retries,
                first_wait_s=FIRST_DELAY_S,
                max_wait_s=MAX_DELAY_S,
                deadline_s=deadline - time.monotonic(),
            )
        )
        while True:
            problem, asked_s, answer = self._post(content, deadline)
            if answer is not None:
                problem = self._read(answer, batch)
                if not problem:
                    return
            wait_s = tries.next_wait_s(asked_s)
            if wait_s is None:
                raise EnvironmentFault(tries.over(problem, asked_s))
            time.sleep(wait_s)

    def _post(self, content: bytes, deadline: float) -> tuple[str, float | None, Any]:
        """The decoded answer; or what may go right next time, and the seconds that the service asks to wait.

        Raises `EnvironmentFault` for all else that fails.
        """
        config = self._config
        if time.monotonic() >= deadline:
            raise EnvironmentFault(self._too_late())
        if not self._breaker.admit():
            raise EnvironmentFault(
                f"{self._url} failed {config.breaker_failures} times in a row and is left alone for "
                f"{config.breaker_reset_s:g} s"
            )
        try:
            status, asked_s, body = self._exchange(content, deadline)
        except httpx.HTTPError as error:
            self._breaker.fail()
            problem = f"{self._url} cannot be reached: {transport_problem(error)}"
            if isinstance(error, _NEVER_ARRIVED):
                return problem, None, None
            if isinstance(error, httpx.TimeoutException):
                problem = self._too_late()
            raise EnvironmentFault(problem) from error
        if status >= 500:
            self._breaker.fail()
        else:
            self._breaker.succeed()
        if status != 200:
            problem = f"{self._url} answered {status}: {blank_credentials(repr(body[:200]))}"
            if may_pass(status):
                return problem, asked_s, None
            raise EnvironmentFault(problem)
        try:
            return "", None, orjson.loads(body)
        except orjson.JSONDecodeError as error:
            raise EnvironmentFault(f"{self._url} answered something that is not JSON: {error}") from error

    def _exchange(self, content: bytes, deadline: float) -> tuple[int, float | None, bytes]:
        """Status, the wait that it asks for, and body, by the deadline even where they come drop by drop.

        Raises `httpx.HTTPError`.
        """
        headers = {"content-type": "application/json", **self._headers}
        left = max(0.001, deadline - time.monotonic())
        with self._client.stream(
            "POST", self._next_url(), content=content, headers=headers, timeout=left
        ) as response:
            parts = []
            for part in response.iter_bytes():
                parts.append(part)
                if time.monotonic() > deadline:
                    raise httpx.ReadTimeout("the answer takes too long", request=response.request)
            return response.status_code, asked_wait_s(response.headers), b"".join(parts)

    def _encode(self, episode: EpisodeView) -> orjson.Fragment:
        """What is sent of an episode."""
        return _body(episode)

    def _content(self, batch: Sequence[Waiting]) -> bytes:
        """The body of a request."""
        return orjson.dumps({"episodes": [item.body for item in batch]})

    def _read(self, answer: Any, batch: Sequence[Waiting]) -> str:
        """Hand out the rewards; or else what is wrong with the answer and may be right next time.

        Raises `EnvironmentFault`.
        """
        _hand_out(answer, batch, self._url)
        return ""

    def _next_url(self) -> str:
        """Where the next request goes."""
        return self._config.url

    def _too_late(self) -> str:
        return f"{self._url} gave no reward within {self._config.deadline_s:g} s"


def _body(episode: EpisodeView) -> orjson.Fragment:
    """Encoded at once, so that a label that JSON cannot hold is the fault of its own episode."""
    body = {
        "task_id": episode.task.task_id,
        "answer": episode.answer,
        "label": episode.label,
        "messages": episode.messages,
        "metadata": dict(episode.task.metadata),
        "metrics": dict(episode.metrics),
    }
    try:
        return orjson.Fragment(orjson.dumps(body))
    except (
        TypeError
    ):  # integers beyond 64 bits, which the slower encoder writes; it refuses what is no JSON, too
        return orjson.Fragment(json.dumps(body))


def _hand_out(answer: Any, batch: Sequence[Waiting], url: str) -> None:
    rewards = answer.get("rewards") if isinstance(answer, dict) else None
    if not isinstance(rewards, list) or len(rewards) != len(batch):
        got = f"{len(rewards)} rewards" if isinstance(rewards, list) else f"{answer!r:.100}"
        raise EnvironmentFault(
            f'{url} must answer {{"rewards": [...]}} with {len(batch)} rewards, one for each episode, not {got}'
        )
    for item, reward in zip(batch, rewards, strict=True):
        if reward is None:
            settle([item], EnvironmentFault(f"{url} could not grade task {item.task_id!r}"))
            continue
        try:
            as_score(reward)
        except ValueError as error:
            settle([item], EnvironmentFault(f"{url}: {error}"))
            continue
        settle([item], reward)


def settle(batch: Sequence[Waiting], outcome: Any) -> None:
    for item in batch:
        try:
            if isinstance(outcome, Exception):
                item.reward.set_exception(outcome)
            else:
                item.reward.set_result(outcome)
        except InvalidStateError:
            continue  # settled before the batch failed
