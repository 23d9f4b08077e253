"""What teachers say of the tokens of an episode that has ended: asked for at once, of all its segments.

The rule for failures: a request that may yet be answered is made again, at another engine where there is one, within
`request_timeout_s`. Then the attempt fails, as it does where the answer cannot be used, and is played again as any
other; a teacher's failure is never a number.
"""

from __future__ import annotations

import asyncio
import functools
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from types import TracebackType
from typing import Self

import numpy as np
import numpy.typing as npt

from polyturn.agents.connections import EngineClient
from polyturn.agents.episode import Episode
from polyturn.agents.ledger import Segment
from polyturn.agents.policy import EngineUnavailable, GarbledAnswer, PolicyFault
from polyturn.agents.sglang_scorer import SGLangScorer
from polyturn.configs.models import resolve_model_path
from polyturn.configs.schema.engines import TeacherConfig
from polyturn.configs.sizing.model_shape import ModelShape
from polyturn.envs.faults import EnvironmentFault
from polyturn.envs.messages import Task
from polyturn.tools.retries import Retries, Tries

TASK_KEY = "teacher"
"""Of a task's metadata: the name of the teacher that its episodes have, whatever their environment."""
MAX_SCORES_BYTES = 64 * 1024 * 1024
"""Of a server's answer: some fifty bytes for each token of a segment."""


@dataclass(eq=False, kw_only=True, slots=True)
class _Engine:
    scorer: SGLangScorer
    num_requests: int = 0
    """Under way."""


class Teacher:
    """One teacher, at any number of engines; a request goes where the fewest are under way. One event loop only."""

    def __init__(self, config: TeacherConfig, *, vocab_size: int) -> None:
        """`config.urls` says where it is asked; nothing is sent yet."""
        assert config.urls, f"{config.name} is served nowhere"
        self.config = config
        self._client = EngineClient(timeout_s=config.request_timeout_s, max_bytes=MAX_SCORES_BYTES)
        self._slots = asyncio.Semaphore(config.max_concurrent_requests)
        self._engines = [
            _Engine(scorer=SGLangScorer(client=self._client, url=url, vocab_size=vocab_size))
            for url in config.urls
        ]

    def teaches(self, env_id: str) -> bool:
        """Whether it is the teacher of an environment's episodes."""
        return self.config.environments is None or env_id in self.config.environments

    async def score(self, segment: Segment) -> npt.NDArray[np.float32]:
        """Its logprobs of the segment's sampled tokens, [T], 0 elsewhere.

        Raises:
            EngineUnavailable: no engine answered in time.
            PolicyFault: one refused, or its answer cannot be used.
        """
        start = int(segment.sampled.argmax())
        column = np.zeros(len(segment), dtype=np.float32)
        try:
            async with asyncio.timeout(self.config.request_timeout_s), self._slots:
                column[start:] = await self._ask(segment.token_ids, start)
        except TimeoutError as error:
            message = f"teacher {self.config.name}: no answer within {self.config.request_timeout_s:g} s"
            raise EngineUnavailable(message, is_gone=False) from error
        return np.where(segment.sampled, column, np.float32(0))

    async def aclose(self) -> None:
        """Close the connections."""
        await self._client.aclose()

    async def _ask(self, token_ids: npt.NDArray[np.int32], start: int) -> npt.NDArray[np.float32]:
        retries = Retries(max_retries=self.config.max_retries, deadline_s=self.config.request_timeout_s)
        tries, failed = Tries(retries), list[_Engine]()
        while True:
            asked = [engine for engine in self._engines if engine not in failed] or self._engines
            engine = min(asked, key=lambda one: one.num_requests)
            engine.num_requests += 1
            once = replace(retries, max_retries=0, deadline_s=tries.left_s)
            try:
                return await engine.scorer.score(token_ids, start=start, retries=once)
            except EngineUnavailable as fault:
                failed.append(engine)
                wait_s = tries.next_wait_s()
                if wait_s is None:
                    message = f"teacher {self.config.name}: {tries.over(str(fault))}"
                    if isinstance(fault, GarbledAnswer):
                        raise PolicyFault(message) from fault
                    raise EngineUnavailable(message, is_gone=fault.is_gone) from fault
            finally:
                engine.num_requests -= 1
            # Another engine may answer at once; when all have failed, they are given time.
            if len(failed) >= len(self._engines):
                failed.clear()
                await asyncio.sleep(wait_s)


class Teachers:
    """All teachers of a run; an asynchronous context manager that closes their connections."""

    def __init__(self, teachers: Sequence[Teacher]) -> None:
        self._by_name: Mapping[str, Teacher] = {teacher.config.name: teacher for teacher in teachers}

    @classmethod
    def from_config(cls, configs: Sequence[TeacherConfig]) -> Self | None:
        """The teachers that a config names, each with `urls`; None where it names none."""
        if not configs:
            return None
        return cls([Teacher(config, vocab_size=_vocab_size(config.path)) for config in configs])

    async def teach(self, episode: Episode, task: Task) -> Episode:
        """The episode with what its teachers say of its sampled tokens, and how long that took among its metrics.

        Of several teachers the logprobs are averaged by their weights: the reverse KL to that average is the weighted
        mean of those to each.

        Raises:
            EnvironmentFault: the task names a teacher that there is not.
            PolicyFault: a teacher did not answer.
        """
        teachers = self._of(episode, task)
        if not teachers or not episode.num_sampled_tokens:
            return episode
        started = time.perf_counter()
        jobs = [_scored(segment, teachers) for segment in episode.segments]
        segments = tuple(await asyncio.gather(*jobs))
        seconds = time.perf_counter() - started
        return replace(episode, segments=segments, metrics={**episode.metrics, "teacher_seconds": seconds})

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, fault: BaseException | None, trace: TracebackType | None
    ) -> None:
        for teacher in self._by_name.values():
            await teacher.aclose()

    def _of(self, episode: Episode, task: Task) -> list[Teacher]:
        named = task.metadata.get(TASK_KEY)
        if named is None:
            return [teacher for teacher in self._by_name.values() if teacher.teaches(episode.env_id)]
        if named not in self._by_name:
            raise EnvironmentFault(
                f"task {task.task_id!r}: its metadata name the teacher {named!r:.100}; there are "
                f"{', '.join(self._by_name)}"
            )
        return [self._by_name[named]]


async def _scored(segment: Segment, teachers: Sequence[Teacher]) -> Segment:
    if not segment.num_sampled:
        return segment
    columns = await asyncio.gather(*(teacher.score(segment) for teacher in teachers))
    weights = [teacher.config.weight for teacher in teachers]
    mean = np.average(np.stack(columns), axis=0, weights=weights) if len(columns) > 1 else columns[0]
    return replace(segment, teacher_logprobs=mean.astype(np.float32))


@functools.cache
def _vocab_size(path: str) -> int:
    return ModelShape.read(resolve_model_path(path, needs_weights=False)).vocab_size
