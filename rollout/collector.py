"""The episode scheduler: plays groups of episodes at once, retries what fails, and never scores a failure."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Executor, ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any, Protocol

from polyturn.agents.episode import Episode, Outcome
from polyturn.envs.tasks import Task, TaskSource
from polyturn.envs.tool_env import ToolEnv
from polyturn.rollout.limits import LimitedEnv, LimitedPolicy, Policy, RolloutLimits
from polyturn.rollout.prompts import Prompt

DRAIN_S = 60.0
MIN_FAILURES_TO_GIVE_UP = 32


class RolloutError(RuntimeError):
    """No episode can be had: the message says why."""


class Play(Protocol):
    """Plays one episode. A fault of policy or environment is an episode with the outcome FAILED."""

    async def __call__(
        self,
        *,
        env: ToolEnv,
        policy: Any,
        task: Task,
        seed: int,
        episode_id: str,
        group_id: str,
        executor: Executor,
    ) -> Episode:
        """`executor` is for what is not asynchronous in the environment."""
        ...


@dataclass(frozen=True, kw_only=True, slots=True)
class Group:
    """The episodes of one prompt, by identity. Episodes that failed for good are counted, not contained."""

    group_id: str
    prompt: Prompt
    episodes: tuple[Episode, ...]
    """In the order of their sample indices."""
    num_expected: int
    num_dropped: int
    """Episodes that still failed after all retries."""
    num_retries: int
    """Failed attempts that were played again."""

    @property
    def num_missing(self) -> int:
        """Episodes that were not played because the collection was stopped."""
        return self.num_expected - len(self.episodes) - self.num_dropped

    @property
    def is_usable(self) -> bool:
        """Whether a baseline can be taken from the group: two survivors, where so many were asked for."""
        return len(self.episodes) >= min(2, self.num_expected)


def episode_seed(*, run_seed: int, group_id: str, sample: int, attempt: int) -> int:
    """The seed of one attempt: 48 bits of SHA-256 over its identity, so independent of order and timing."""
    identity = f"{run_seed}/{group_id}/{sample}/{attempt}".encode()
    return int.from_bytes(hashlib.sha256(identity).digest()[:6])


def episode_id(group_id: str, sample: int, attempt: int) -> str:
    """The id of one attempt; `parse_episode_id` reads it."""
    return f"{group_id}.{sample}.{attempt}"


def parse_episode_id(identity: str) -> tuple[str, int, int]:
    """Group id, sample index and attempt of an `episode_id`."""
    group_id, sample, attempt = identity.rsplit(".", 2)
    return group_id, int(sample), int(attempt)


class Collector:
    """Plays prompts of one task source; environments are made once and used again. Close it at the end.

    States of one sample of one prompt:

        waiting -> playing -> survived
                     |  ^
              failed |  | after a delay, with a fresh attempt id and seed
                     v  |
                   waiting -> dropped (after max_retries)
    """

    def __init__(
        self,
        *,
        make_env: Callable[[], ToolEnv],
        tasks: TaskSource,
        play: Play,
        limits: RolloutLimits,
        seed: int,
    ) -> None:
        self.tasks = tasks
        self._make_env = make_env
        self._play = play
        self._limits = limits
        self._seed = seed
        self._idle: list[ToolEnv] = []
        self._threads = ThreadPoolExecutor(limits.max_concurrent_tools, thread_name_prefix="environment")

    async def collect(
        self,
        prompts: Sequence[Prompt],
        *,
        samples_per_prompt: int,
        policy: Policy,
        finished: Iterable[Episode] = (),
        on_episode: Callable[[Episode], None] | None = None,
        stop: asyncio.Event | None = None,
        drain_s: float = DRAIN_S,
    ) -> list[Group]:
        """Play `samples_per_prompt` episodes of each prompt; groups come back in the order of the prompts.

        Args:
            prompts: What to play; their group ids must differ.
            samples_per_prompt: Episodes per group.
            policy: Who plays.
            finished: Attempts of these prompts that were made before, failed ones included: they are not made again.
            on_episode: Called with every attempt that ends, failed ones included, as it ends.
            stop: Once set, no attempt starts, and those under way have `drain_s` seconds to end.
            drain_s: See `stop`; then they are cancelled, and missing from their groups.

        Raises:
            RolloutError: every episode failed, or none ended for `stall_timeout_s`.
        """
        collection = _Collection(
            collector=self,
            policy=policy,
            limits=self._limits,
            on_episode=on_episode or (lambda _: None),
            stop=stop or asyncio.Event(),
        )
        return await collection.run(prompts, samples_per_prompt, finished, drain_s)

    async def play(
        self, prompt: Prompt, sample: int, attempt: int, *, policy: LimitedPolicy, tools: asyncio.Semaphore
    ) -> Episode:
        """Play one attempt in an environment of the pool."""
        task = self.tasks[prompt.task_index]
        env = self._idle.pop() if self._idle else await self._in_thread(self._make_env)
        survived = False
        try:
            episode = await self._play(
                env=LimitedEnv(env, tools),
                policy=policy,
                task=task,
                seed=episode_seed(
                    run_seed=self._seed, group_id=prompt.group_id, sample=sample, attempt=attempt
                ),
                episode_id=episode_id(prompt.group_id, sample, attempt),
                group_id=prompt.group_id,
                executor=self._threads,
            )
            survived = episode.outcome is not Outcome.FAILED and env.is_reusable
        finally:
            # After a fault or a cancellation, what the environment holds may be broken or still in use by a thread;
            # after a tool's timeout too.
            if survived:
                self._idle.append(env)
            else:
                self._threads.submit(env.close)
        waited = min(policy.queue_s, episode.timings.generate_s)
        timings = replace(
            episode.timings, generate_s=episode.timings.generate_s - waited, queue_s=policy.queue_s
        )
        return replace(episode, timings=timings)

    def close(self) -> None:
        """Close the environments."""
        for env in self._idle:
            env.close()
        self._idle.clear()
        self._threads.shutdown(wait=False, cancel_futures=True)

    async def _in_thread(self, function: Callable[[], ToolEnv]) -> ToolEnv:
        return await asyncio.get_running_loop().run_in_executor(self._threads, function)


class _Collection:
    """One call of `collect`."""

    def __init__(
        self,
        *,
        collector: Collector,
        policy: Policy,
        limits: RolloutLimits,
        on_episode: Callable[[Episode], None],
        stop: asyncio.Event,
    ) -> None:
        self._collector = collector
        self._policy = policy
        self._limits = limits
        self._on_episode = on_episode
        self._stop = stop
        self._requests = asyncio.Semaphore(limits.max_concurrent_requests)
        self._episodes = asyncio.Semaphore(limits.max_concurrent_episodes)
        self._tools = asyncio.Semaphore(limits.max_concurrent_tools)
        self._ended = asyncio.Event()
        self._attempts: dict[tuple[str, int], list[Episode]] = {}
        self._num_survived = 0
        self._num_playing = 0
        self._faults: Counter[str] = Counter()

    async def run(
        self, prompts: Sequence[Prompt], samples_per_prompt: int, finished: Iterable[Episode], drain_s: float
    ) -> list[Group]:
        assert len({prompt.group_id for prompt in prompts}) == len(prompts), "two prompts share a group id"
        self._attempts = {
            (prompt.group_id, sample): [] for prompt in prompts for sample in range(samples_per_prompt)
        }
        for episode in finished:
            group_id, sample, _ = parse_episode_id(episode.episode_id)
            if (group_id, sample) in self._attempts:
                self._record(episode)
        jobs = [
            asyncio.create_task(self._sample(prompt, sample))
            for prompt in prompts
            for sample in range(samples_per_prompt)
        ]
        try:
            await self._watch(jobs, drain_s)
        finally:
            for job in jobs:
                job.cancel()
            await asyncio.gather(*jobs, return_exceptions=True)
        if not self._num_survived and not self._stop.is_set():
            raise RolloutError(f"every episode failed: {self._why()}")
        return [self._group(prompt, samples_per_prompt) for prompt in prompts]

    async def _watch(self, jobs: Sequence[asyncio.Task[None]], drain_s: float) -> None:
        """Until all samples are done, or the stop's deadline has passed; raises what a sample raises."""
        stopping = asyncio.create_task(self._stop.wait())
        done = asyncio.gather(*jobs)
        stalled = asyncio.create_task(self._await_stall())
        try:
            await asyncio.wait((done, stopping, stalled), return_when=asyncio.FIRST_COMPLETED)
            if stalled.done():
                stalled.result()
            if not done.done():
                with contextlib.suppress(TimeoutError):
                    await asyncio.wait_for(asyncio.shield(done), timeout=drain_s)
            if done.done():
                done.result()
        finally:
            stopping.cancel()
            stalled.cancel()
            done.cancel()
            await asyncio.gather(stopping, stalled, done, return_exceptions=True)

    async def _await_stall(self) -> None:
        """Raise when no attempt has ended for `stall_timeout_s`."""
        limit = self._limits.stall_timeout_s
        while True:
            self._ended.clear()
            try:
                await asyncio.wait_for(self._ended.wait(), timeout=limit)
            except TimeoutError:
                so_far = f"; so far {self._why()}" if self._faults else ""
                raise RolloutError(
                    f"no episode ended for {limit:g} s, {self._num_playing} are under way{so_far}"
                ) from None

    async def _sample(self, prompt: Prompt, sample: int) -> None:
        """Play one sample until it survives or has failed too often."""
        attempts = self._attempts[prompt.group_id, sample]
        while not _is_settled(attempts, self._limits.max_retries):
            if attempts and self._limits.retry_delay_s:
                await self._delay(self._limits.retry_delay_s * 2 ** (len(attempts) - 1))
            async with self._episodes:
                if self._stop.is_set():
                    return
                policy = LimitedPolicy(self._policy, self._requests)
                self._num_playing += 1
                try:
                    episode = await self._collector.play(
                        prompt, sample, len(attempts), policy=policy, tools=self._tools
                    )
                finally:
                    self._num_playing -= 1
            self._record(episode)
            self._on_episode(episode)
            self._give_up_early()

    async def _delay(self, seconds: float) -> None:
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._stop.wait(), timeout=seconds)

    def _record(self, episode: Episode) -> None:
        group_id, sample, _ = parse_episode_id(episode.episode_id)
        self._attempts[group_id, sample].append(episode)
        if episode.outcome is Outcome.FAILED:
            self._faults[episode.error or episode.stop_reason] += 1
        else:
            self._num_survived += 1
        self._ended.set()

    def _give_up_early(self) -> None:
        """Do not play a whole step when nothing but failures came back from more than one full round of episodes."""
        patience = max(MIN_FAILURES_TO_GIVE_UP, 2 * self._limits.max_concurrent_episodes)
        if not self._num_survived and self._faults.total() > patience:
            raise RolloutError(f"no episode survived: {self._why()}")

    def _why(self) -> str:
        """How many attempts failed, and the most frequent reason."""
        if not self._faults:
            return "none was played"
        reason, count = self._faults.most_common(1)[0]
        return f"{self._faults.total()} attempts failed, {count} of them with: {reason}"

    def _group(self, prompt: Prompt, samples_per_prompt: int) -> Group:
        survivors: list[Episode] = []
        num_dropped = num_retries = 0
        for sample in range(samples_per_prompt):
            attempts = self._attempts[prompt.group_id, sample]
            survived = [episode for episode in attempts if episode.outcome is not Outcome.FAILED]
            survivors += survived[:1]
            dropped = not survived and _is_settled(attempts, self._limits.max_retries)
            num_dropped += dropped
            num_retries += len(attempts) - bool(survived) - dropped
        return Group(
            group_id=prompt.group_id,
            prompt=prompt,
            episodes=tuple(survivors),
            num_expected=samples_per_prompt,
            num_dropped=num_dropped,
            num_retries=num_retries,
        )


def _is_settled(attempts: Sequence[Episode], max_retries: int) -> bool:
    return len(attempts) > max_retries or any(episode.outcome is not Outcome.FAILED for episode in attempts)
