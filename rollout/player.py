"""Plays one attempt of a task in an environment of the pool: whatever goes wrong in it is an episode that failed."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from contextlib import AbstractAsyncContextManager, nullcontext
from dataclasses import replace
from functools import partial
from typing import Any, Protocol

from polyturn.agents.deadlines import Slots
from polyturn.agents.episode import Episode, Outcome, failed_part, failure_reason, failure_text
from polyturn.agents.forking import BRANCH_REFUSED, Fork
from polyturn.agents.policy import ChatEngines, Policy
from polyturn.envs.hooks import current_task, is_interruption
from polyturn.envs.messages import EnvironmentChoice, ListTasks, Task, TaskSource
from polyturn.envs.played_env import PlayedEnv
from polyturn.envs.rewards.rubric import GroupCriterion
from polyturn.envs.tasks.order import PrefetchedTasks, task_digest
from polyturn.rollout.environment_pool import EnvironmentPool
from polyturn.rollout.groups import (
    Prompt,
    add_group_rewards,
    episode_id,
    episode_seed,
)
from polyturn.rollout.limits import RolloutLimits
from polyturn.rollout.teachers import Teachers
from polyturn.tools.threads import PinnedThread


class RolloutError(RuntimeError):
    """No episode can be had: the message says why."""


class Play(Protocol):
    """Plays one episode. What raises in it, or behind it, is an episode with the outcome FAILED."""

    async def __call__(
        self,
        *,
        env: PlayedEnv,
        policy: Any,
        task: Task,
        seed: int,
        episode_id: str,
        group_id: str,
        slots: Slots,
        fork: Fork | None = None,
    ) -> Episode:
        """`slots` are what episodes wait for. With a `fork` it begins as a branch; only then is that given."""
        ...


class Player(Protocol):
    """Plays attempts, here or elsewhere, and knows the tasks."""

    @property
    def limits(self) -> RolloutLimits: ...

    @property
    def tasks(self) -> TaskSource: ...

    @property
    def group_rewards(self) -> Sequence[GroupCriterion]: ...

    async def play(
        self,
        prompt: Prompt,
        sample: int,
        attempt: int,
        *,
        policy: Policy,
        slots: Slots,
        fork: Fork | None = None,
    ) -> Episode:
        """Play one attempt. Whatever goes wrong in it is an episode that failed.

        Args:
            fork: Play it as this branch of another episode, or from the start where the environment cannot be rebuilt.
        """
        ...

    def prefetch(self, prompts: Sequence[Prompt]) -> None:
        """Read the tasks of these prompts in the background."""
        ...

    async def task(self, prompt: Prompt) -> Task:
        """The task of a prompt."""
        ...

    async def add_group_rewards(self, prompt: Prompt, episodes: Sequence[Episode]) -> tuple[Episode, ...]:
        """The episodes of a prompt with the group rewards. Raises `EnvironmentFault` when one of those fails."""
        ...

    def check_threads(self) -> None:
        """Raise `RolloutError` when too many threads are held by what never returned."""
        ...


class EpisodePlayer:
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
        make_env: Callable[[], PlayedEnv],
        tasks: TaskSource,
        play: Play,
        limits: RolloutLimits,
        seed: int,
        make_chosen: Callable[[EnvironmentChoice], PlayedEnv] | None = None,
        group_rewards: Sequence[GroupCriterion] = (),
        serves: AbstractAsyncContextManager[object] | None = None,
        teachers: Teachers | None = None,
    ) -> None:
        """
        Args:
            make_env: Makes the environment of tasks that choose none.
            tasks: What prompts are about; what is not in memory is read ahead by threads.
            make_chosen: Makes the environment that a task chooses; None: there are no such tasks.
            group_rewards: Added to the rewards of a group as soon as all its episodes are there.
            serves: What `play` needs open in the event loop; None: nothing.
            teachers: Asked of the tokens of every episode that did not fail.
        """
        self.serves = serves or nullcontext()
        """To be entered in the event loop before the first episode, once."""
        self.tasks = tasks
        self.group_rewards = tuple(group_rewards)
        self._prefetched = None if isinstance(tasks, ListTasks) else PrefetchedTasks(tasks)
        self._play = play
        self._teachers = teachers
        self.limits = limits
        self._seed = seed
        self._pool = EnvironmentPool(make_env, make_chosen, make_timeout_s=limits.environment_timeout_s)

    async def play(
        self,
        prompt: Prompt,
        sample: int,
        attempt: int,
        *,
        policy: Policy,
        slots: Slots,
        fork: Fork | None = None,
    ) -> Episode:
        """Play one attempt. Whatever goes wrong in it is an episode that failed.

        Args:
            fork: Play it as this branch of another episode, or from the start where the environment cannot be rebuilt.
        """
        own_task = current_task()
        task: Task | None = None
        digest = ""
        seed = episode_seed(run_seed=self._seed, group_id=prompt.group_id, sample=sample, attempt=attempt)
        identity = episode_id(prompt.group_id, sample, attempt)
        try:
            task = await self.task(prompt)
            digest = task_digest(task)
            episode = await self._play_task(
                task, prompt, seed, identity, policy=policy, slots=slots, fork=fork
            )
            if self._teachers is not None and episode.outcome is not Outcome.FAILED:
                episode = await self._teachers.teach(episode, task)
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
                failed_part=failed_part(error),
            )

    async def _play_task(
        self,
        task: Task,
        prompt: Prompt,
        seed: int,
        identity: str,
        *,
        policy: Policy,
        slots: Slots,
        fork: Fork | None,
    ) -> Episode:
        """Play in an environment of the pool."""
        pooled = await self._pool.take(task.environment)
        offer_engines(pooled.env, policy)
        play = partial(
            self._play,
            env=pooled.env,
            policy=policy,
            task=task,
            seed=seed,
            episode_id=identity,
            group_id=prompt.group_id,
            slots=slots,
        )
        survived = False
        try:
            episode = await (play() if fork is None else self._play_branch(pooled.env, play, fork))
            survived = episode.outcome is not Outcome.FAILED
        finally:
            self._pool.give_back(pooled, task.environment, survived=survived)
        return episode

    async def _play_branch(
        self, env: PlayedEnv, play: Callable[..., Awaitable[Episode]], fork: Fork
    ) -> Episode:
        """Play a branch, or where the environment cannot be rebuilt from the start."""
        if env.is_replayable:
            episode = await play(fork=fork)
            if episode.stop_reason != BRANCH_REFUSED or not env.is_reusable:
                return episode
        return replace(await play(), parent_id=fork.parent_id)

    def check_threads(self) -> None:
        """Raise `RolloutError` when too many threads are held by what never returned."""
        lost = self._pool.lost
        if lost.total() > self.limits.max_lost_threads:
            what, count = lost.most_common(1)[0]
            raise RolloutError(
                f"{lost.total()} calls never returned and hold their threads, more than "
                f"rollout.max_lost_threads={self.limits.max_lost_threads}; {count} of them are: {what}. Give what it "
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
        return await self._prefetched.read(prompt.task_index, timeout_s=self.limits.environment_timeout_s)

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
                timeout_s=self.limits.environment_timeout_s,
            )
        finally:
            self._pool.watch(thread)


def offer_engines(env: PlayedEnv, policy: Any) -> None:
    """Tell an environment where the policy's engines answer chat requests."""
    env.unwrapped.engine_urls = policy.chat_urls if isinstance(policy, ChatEngines) else ()


def other_task(episode: Episode, task: Task) -> str:
    """That an episode was played on another task than its group is of."""
    was, now = repr(episode.task_id), repr(task.task_id)
    what = f"the task {was}, not {now}" if was != now else f"another task of the id {was}"
    return f"group {episode.group_id}: the stored episode {episode.episode_id} is of {what}"
