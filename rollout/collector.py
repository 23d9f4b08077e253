"""The episode scheduler: plays groups of episodes at once, retries what fails, and never scores a failure."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
from collections import Counter
from collections.abc import Awaitable, Callable, Iterable, Sequence
from dataclasses import replace
from typing import Any, Protocol

from polyturn.agents.deadlines import Slots
from polyturn.agents.episode import LASTING, Episode, Outcome, failure_reason, failure_text, sentence_of
from polyturn.agents.policy import Policy
from polyturn.envs.faults import EnvironmentFault, message_of
from polyturn.envs.hooks import current_task, is_interruption
from polyturn.envs.messages import EnvironmentChoice, ListTasks, Task, TaskSource
from polyturn.envs.rewards.rubric import GroupCriterion
from polyturn.envs.tasks.order import PrefetchedTasks, task_digest
from polyturn.envs.tool_env import ToolEnv
from polyturn.rollout.environment_pool import EnvironmentPool
from polyturn.rollout.groups import (
    Group,
    Prompt,
    add_group_rewards,
    episode_id,
    episode_seed,
    parse_episode_id,
)
from polyturn.rollout.limits import RolloutLimits
from polyturn.tools.threads import PinnedThread

DRAIN_S = 60.0
CANCEL_S = 10.0
"""How long episodes that were cancelled may take to end."""
MIN_FAILURES_TO_GIVE_UP = 32


class RolloutError(RuntimeError):
    """No episode can be had: the message says why."""


class Play(Protocol):
    """Plays one episode. What raises in it, or behind it, is an episode with the outcome FAILED."""

    async def __call__(
        self,
        *,
        env: ToolEnv,
        policy: Any,
        task: Task,
        seed: int,
        episode_id: str,
        group_id: str,
        slots: Slots,
    ) -> Episode:
        """`slots` are what episodes wait for."""
        ...


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
        make_chosen: Callable[[EnvironmentChoice], ToolEnv] | None = None,
        group_rewards: Sequence[GroupCriterion] = (),
    ) -> None:
        """
        Args:
            make_env: Makes the environment of tasks that choose none.
            tasks: What prompts are about; what is not in memory is read ahead by threads.
            make_chosen: Makes the environment that a task chooses; None: there are no such tasks.
            group_rewards: Added to the rewards of a group as soon as all its episodes are there.
        """
        self.tasks = tasks
        self.group_rewards = tuple(group_rewards)
        self._prefetched = None if isinstance(tasks, ListTasks) else PrefetchedTasks(tasks)
        self._play = play
        self._limits = limits
        self._seed = seed
        self._pool = EnvironmentPool(make_env, make_chosen, make_timeout_s=limits.environment_timeout_s)

    async def collect(
        self,
        prompts: Sequence[Prompt],
        *,
        samples_per_prompt: int,
        policy: Policy,
        finished: Iterable[Episode] = (),
        keep: Callable[[Episode], Awaitable[None]] | None = None,
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
            keep: Awaited with every attempt that ends, failed ones included, before it counts as ended.
            on_episode: Called with the same, behind `keep`.
            stop: Once set, no attempt starts, and those under way have `drain_s` seconds to end.
            drain_s: See `stop`; then they are cancelled, and missing from their groups.

        Raises:
            RolloutError: every episode failed, or none ended for `stall_timeout_s`.
        """
        self.prefetch(prompts)
        collection = _Collection(
            collector=self,
            policy=policy,
            limits=self._limits,
            keep=keep,
            on_episode=on_episode or (lambda _: None),
            stop=stop or asyncio.Event(),
        )
        return await collection.run(prompts, samples_per_prompt, finished, drain_s)

    async def play(
        self, prompt: Prompt, sample: int, attempt: int, *, policy: Policy, slots: Slots
    ) -> Episode:
        """Play one attempt. Whatever goes wrong in it is an episode that failed."""
        own_task = current_task()
        task: Task | None = None
        digest = ""
        seed = episode_seed(run_seed=self._seed, group_id=prompt.group_id, sample=sample, attempt=attempt)
        identity = episode_id(prompt.group_id, sample, attempt)
        try:
            task = await self.task(prompt)
            digest = task_digest(task)
            episode = await self._play_task(task, prompt, seed, identity, policy=policy, slots=slots)
            return replace(episode, task_digest=digest)
        except BaseException as error:
            if is_interruption(error, own_task):
                raise
            choice = None if task is None else task.environment
            return Episode(
                episode_id=identity,
                group_id=prompt.group_id,
                env_id="" if choice is None else choice.env_id,
                task_id="" if task is None else task.task_id,
                task_digest=digest,
                seed=seed,
                outcome=Outcome.FAILED,
                stop_reason=failure_reason(error),
                reward=None,
                error=failure_text(error),
            )

    async def _play_task(
        self, task: Task, prompt: Prompt, seed: int, identity: str, *, policy: Policy, slots: Slots
    ) -> Episode:
        """Play in an environment of the pool."""
        pooled = await self._pool.take(task.environment)
        survived = False
        try:
            episode = await self._play(
                env=pooled.env,
                policy=policy,
                task=task,
                seed=seed,
                episode_id=identity,
                group_id=prompt.group_id,
                slots=slots,
            )
            survived = episode.outcome is not Outcome.FAILED
        finally:
            self._pool.give_back(pooled, task.environment, survived=survived)
        return episode

    def check_threads(self) -> None:
        """Raise `RolloutError` when too many threads are held by what never returned."""
        lost = self._pool.lost
        if lost.total() > self._limits.max_lost_threads:
            what, count = lost.most_common(1)[0]
            raise RolloutError(
                f"{lost.total()} calls never returned and hold their threads, more than "
                f"rollout.max_lost_threads={self._limits.max_lost_threads}; {count} of them are: {what}. Give what it "
                "waits for a deadline of its own"
            )

    def close(self) -> None:
        """Close the environments."""
        self._pool.close()
        if self._prefetched is not None:
            self._prefetched.close()

    def prefetch(self, prompts: Sequence[Prompt]) -> None:
        """Read the tasks of these prompts in the background."""
        if self._prefetched is not None:
            self._prefetched.prefetch(prompt.task_index for prompt in prompts)

    async def task(self, prompt: Prompt) -> Task:
        """The task of a prompt."""
        if self._prefetched is None:
            return self.tasks[prompt.task_index]
        return await self._prefetched.read(prompt.task_index, timeout_s=self._limits.environment_timeout_s)

    async def add_group_rewards(self, prompt: Prompt, episodes: Sequence[Episode]) -> tuple[Episode, ...]:
        """The episodes of a prompt with the group rewards. Raises `EnvironmentFault` when one of those fails."""
        task = await self.task(prompt)
        thread = PinnedThread("group rewards")
        try:
            return await add_group_rewards(
                episodes,
                self.group_rewards,
                task=task,
                executor=thread,
                timeout_s=self._limits.environment_timeout_s,
            )
        finally:
            self._pool.watch(thread)


class _Collection:
    """One call of `collect`."""

    def __init__(
        self,
        *,
        collector: Collector,
        policy: Policy,
        limits: RolloutLimits,
        keep: Callable[[Episode], Awaitable[None]] | None,
        on_episode: Callable[[Episode], None],
        stop: asyncio.Event,
    ) -> None:
        self._collector = collector
        self._policy = policy
        self._limits = limits
        self._write = keep
        self._on_episode = on_episode
        self._stop = stop
        self._episodes = asyncio.Semaphore(limits.max_concurrent_episodes)
        self._slots = Slots(
            requests=asyncio.Semaphore(limits.max_concurrent_requests),
            steps=asyncio.Semaphore(limits.max_concurrent_tools),
            timeout_s=limits.queue_timeout_s,
        )
        self._ended = asyncio.Event()
        self._attempts: dict[tuple[str, int], list[Episode]] = {}
        self._samples_per_prompt = 0
        self._scored: dict[str, tuple[Episode, ...]] = {}
        self._num_survived = self._num_failed = 0
        self._playing: dict[str, None] = {}
        """Episodes under way, those that began first in front."""
        self._faults: Counter[str] = Counter()
        self._kinds: Counter[str] = Counter()

    async def run(
        self, prompts: Sequence[Prompt], samples_per_prompt: int, finished: Iterable[Episode], drain_s: float
    ) -> list[Group]:
        assert len({prompt.group_id for prompt in prompts}) == len(prompts), "two prompts share a group id"
        self._samples_per_prompt = samples_per_prompt
        self._attempts = {
            (prompt.group_id, sample): [] for prompt in prompts for sample in range(samples_per_prompt)
        }
        by_group = {prompt.group_id: prompt for prompt in prompts}
        for episode in finished:
            group_id, sample, _ = parse_episode_id(episode.episode_id)
            if (group_id, sample) in self._attempts:
                await self._check_task(by_group[group_id], episode)
                self._keep(episode)
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
            if jobs:  # what holds on to its cancellation, as careless code does, is left behind
                await asyncio.wait(jobs, timeout=CANCEL_S)
        groups = [self._group(prompt) for prompt in prompts]
        if not any(group.episodes for group in groups) and not self._stop.is_set():
            raise RolloutError(f"every episode failed: {self._why()}")
        return groups

    async def _check_task(self, prompt: Prompt, episode: Episode) -> None:
        """Raise where an episode that was played before is of another task than its group is of now."""
        task = await self._collector.task(prompt)
        if episode.task_digest and episode.task_digest != task_digest(task):
            raise RolloutError(
                f"{other_task(episode, task)}. A group of both would compare answers to two questions: give the run "
                "the tasks, the seed and the options that it began with, or begin a new one"
            )

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
            done.add_done_callback(lambda ended: ended.cancelled() or ended.exception())
            await asyncio.gather(stopping, stalled, return_exceptions=True)

    async def _await_stall(self) -> None:
        """Raise when no attempt has ended for `stall_timeout_s`."""
        limit = self._limits.stall_timeout_s
        while True:
            self._ended.clear()
            try:
                await asyncio.wait_for(self._ended.wait(), timeout=limit)
            except TimeoutError:
                names = ", ".join(itertools.islice(self._playing, 3))
                oldest = f", the first of them {names}" if names else ""
                so_far = f"; so far {self._why()}" if self._faults else ""
                raise RolloutError(
                    f"no episode ended for {limit:g} s, {len(self._playing)} are under way{oldest}{so_far}"
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
                identity = episode_id(prompt.group_id, sample, len(attempts))
                self._playing[identity] = None
                try:
                    episode = await self._collector.play(
                        prompt, sample, len(attempts), policy=self._policy, slots=self._slots
                    )
                finally:
                    del self._playing[identity]
            if self._write is not None:
                await self._write(episode)
            self._keep(episode)
            self._count(episode)
            self._on_episode(episode)
            self._give_up_early()
            self._collector.check_threads()
        await self._score_if_complete(prompt)

    async def _score_if_complete(self, prompt: Prompt) -> None:
        """Add the group rewards once, after the last sample. Where they fail for good the group loses its episodes."""
        group_id, max_retries = prompt.group_id, self._limits.max_retries
        if not self._collector.group_rewards or group_id in self._scored:
            return
        if not all(_is_settled(attempts, max_retries) for attempts in self._attempts_of(prompt)):
            return
        self._scored[group_id] = ()
        survivors = self._survivors(prompt)
        for retry in range(max_retries + 1):
            try:
                self._scored[group_id] = await self._collector.add_group_rewards(prompt, survivors)
                return
            except EnvironmentFault as fault:
                self._faults[message_of(fault)] += 1
                self._kinds["group_reward_fault"] += 1
                await self._delay(self._limits.retry_delay_s * 2**retry)

    def _attempts_of(self, prompt: Prompt) -> list[list[Episode]]:
        return [self._attempts[prompt.group_id, sample] for sample in range(self._samples_per_prompt)]

    def _survivors(self, prompt: Prompt) -> tuple[Episode, ...]:
        """The first attempt of each sample that did not fail."""
        survived = (
            [episode for episode in attempts if episode.outcome is not Outcome.FAILED]
            for attempts in self._attempts_of(prompt)
        )
        return tuple(episodes[0] for episodes in survived if episodes)

    async def _delay(self, seconds: float) -> None:
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._stop.wait(), timeout=seconds)

    def _keep(self, episode: Episode) -> None:
        group_id, sample, _ = parse_episode_id(episode.episode_id)
        self._attempts[group_id, sample].append(episode)
        if episode.outcome is Outcome.FAILED:
            self._faults[sentence_of(episode.error or episode.stop_reason)] += 1
            self._kinds[episode.stop_reason] += 1

    def _count(self, episode: Episode) -> None:
        """What was played before, perhaps on machinery that has been mended since, is kept and not counted."""
        failed = episode.outcome is Outcome.FAILED
        self._num_failed += failed
        self._num_survived += not failed
        self._ended.set()

    def _give_up_early(self) -> None:
        """Do not go on when too large a share of all attempts that were played here failed."""
        num_failed, num_survived = self._num_failed, self._num_survived
        if num_failed <= max(
            MIN_FAILURES_TO_GIVE_UP, min(self._limits.max_concurrent_episodes, len(self._attempts))
        ):
            return
        if not num_survived and num_failed > 2 * self._limits.max_concurrent_episodes:
            raise RolloutError(f"no episode survived: {self._why()}")
        share, most = num_failed / (num_failed + num_survived), self._limits.max_failure_share
        if num_survived and share > most:
            raise RolloutError(
                f"{share:.0%} of the attempts failed, and rollout.max_failure_share allows {most:.0%}: {self._why()}"
            )

    def _why(self) -> str:
        """How many attempts failed, the most frequent reason, and how many of each kind."""
        if not self._faults:
            return "none was played"
        kinds = ", ".join(f"{count} {kind}" for kind, count in self._kinds.most_common())
        reason, count = self._faults.most_common(1)[0]
        return f"{self._faults.total()} attempts failed, {count} of them with: {reason} ({kinds})"

    def _group(self, prompt: Prompt) -> Group:
        survivors = self._survivors(prompt)
        scored = self._scored.get(prompt.group_id, survivors)
        num_dropped = len(survivors) - len(scored)
        num_retries = 0
        for attempts in self._attempts_of(prompt):
            survived = any(episode.outcome is not Outcome.FAILED for episode in attempts)
            dropped = not survived and _is_settled(attempts, self._limits.max_retries)
            num_dropped += dropped
            num_retries += sum(episode.outcome is Outcome.FAILED for episode in attempts) - dropped
        return Group(
            group_id=prompt.group_id,
            prompt=prompt,
            episodes=scored,
            num_expected=self._samples_per_prompt,
            num_dropped=num_dropped,
            num_retries=num_retries,
        )


def other_task(episode: Episode, task: Task) -> str:
    """That an episode was played on another task than its group is of."""
    was, now = repr(episode.task_id), repr(task.task_id)
    what = f"the task {was}, not {now}" if was != now else f"another task of the id {was}"
    return f"group {episode.group_id}: the stored episode {episode.episode_id} is of {what}"


def _is_settled(attempts: Sequence[Episode], max_retries: int) -> bool:
    return len(attempts) > max_retries or any(
        episode.outcome is not Outcome.FAILED or episode.stop_reason in LASTING for episode in attempts
    )
