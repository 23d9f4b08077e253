"""Drives the environment of one episode: where its hooks run, how long they may take, and what it gives, checked."""

from __future__ import annotations

import functools
import time
from collections.abc import Awaitable, Callable
from typing import Any, TypeVar

import gymnasium

from polyturn.agents.deadlines import EpisodeLimits, EpisodeTime
from polyturn.envs.border import read_reset, read_step
from polyturn.envs.faults import EnvironmentFault
from polyturn.envs.hooks import StepLimits
from polyturn.envs.messages import AssistantMessage, Observation, Task
from polyturn.envs.played_env import PlayedEnv
from polyturn.tools.plain import shown
from polyturn.tools.threads import GivenUp, PinnedThread
from polyturn.tools.tool import OutOfTime

Value = TypeVar("Value")
Environment = gymnasium.Env[Observation, AssistantMessage]


class EnvironmentDriver:
    """Resets and steps an environment within the limits and the time of its episode.

    A `PlayedEnv` is awaited; any other runs in a thread.
    """

    def __init__(
        self,
        env: Environment,
        *,
        task: Task | str | None,
        seed: int,
        limits: EpisodeLimits,
        clock: EpisodeTime,
    ) -> None:
        self.task_id = task.task_id if isinstance(task, Task) else task or ""
        self._env = env
        self._task = task
        self._seed = seed
        self._limits = limits
        self._clock = clock
        self._offload = None if isinstance(env, PlayedEnv) else PinnedThread("environment")
        self._num_calls_made = 0
        self.refuses_calls = False
        """Whether a call was answered by saying that those of the episode are used up."""

    @property
    def env_id(self) -> str:
        """The environment's id, or what it is called."""
        inner = self._env.unwrapped
        if isinstance(inner, PlayedEnv):
            return inner.env_id
        return getattr(self._env.spec, "id", type(inner).__name__)

    async def reset(self) -> tuple[Observation, dict[str, Any]]:
        """The first messages and the info.

        Raises:
            EnvironmentFault: it failed, took too long, or gave what cannot be played or kept.
        """
        options = {} if self._task is None else {"task": self._task}
        self._set_limits(max_tool_calls=None)
        if isinstance(self._env, PlayedEnv):
            reset: Callable[[], Awaitable[Any]] = functools.partial(
                self._env.reset_async, seed=self._seed, options=options
            )
        else:
            plain = functools.partial(self._env.reset, seed=self._seed, options=options)
            reset = functools.partial(self._in_thread, plain, self._hook_timeout_s)
        given = await self._clock.environment(reset)
        observation, info = self._checked(read_reset, given)
        self.task_id = info.get("task_id", self.task_id)
        return observation, info

    async def step(self, action: AssistantMessage) -> tuple[Observation, float, bool, bool, dict[str, Any]]:
        """Gymnasium's five values. The seconds of tool calls are the policy's time.

        Raises:
            EnvironmentFault: as `reset`.
            OutOfTime: an environment that is no `PlayedEnv` took more than the policy had left.
        """
        num_allowed = self._num_calls_allowed()
        self._set_limits(max_tool_calls=num_allowed)
        if isinstance(self._env, PlayedEnv):
            step: Callable[[], Awaitable[Any]] = functools.partial(self._env.step_async, action)
        else:
            step = functools.partial(self._step_in_thread, action)
        given = await self._clock.environment(step)
        num_calls = len(action.tool_calls)
        self.refuses_calls |= num_calls > 0 and num_allowed == 0
        self._num_calls_made += num_calls if num_allowed is None else min(num_calls, num_allowed)
        observation, reward, terminated, truncated, info = self._checked(read_step, given)
        self._clock.spent_s += sum(result.seconds for result in info.get("tool_results", ()))
        return observation, reward, terminated, truncated, info

    def _checked(self, read: Callable[[Any], Value], given: Any) -> Value:
        try:
            return read(given)
        except ValueError as error:
            raise EnvironmentFault(f"{self.env_id}: task {shown(self.task_id)}: {error}") from error

    def _num_calls_allowed(self) -> int | None:
        """How many of the next action's tool calls are made."""
        per_turn, per_episode = self._limits.max_tool_calls_per_turn, self._limits.max_tool_calls_per_episode
        if per_episode is None:
            return per_turn
        left = max(0, per_episode - self._num_calls_made)
        return left if per_turn is None else min(per_turn, left)

    @property
    def _hook_timeout_s(self) -> float:
        return self._limits.hook_timeout_s or self._limits.timeout_s

    def _set_limits(self, *, max_tool_calls: int | None) -> None:
        """Tell the environment what its next reset or step may take."""
        inner = self._env.unwrapped
        if isinstance(inner, PlayedEnv):
            inner.step_limits = StepLimits(
                hook_timeout_s=self._hook_timeout_s,
                tools_timeout_s=self._clock.left_s,
                queue_timeout_s=self._clock.slots.timeout_s if self._clock.slots is not None else None,
                max_tool_calls=max_tool_calls,
                max_result_chars=self._limits.max_tool_result_chars,
            )

    async def _step_in_thread(self, action: AssistantMessage) -> Any:
        """A step of one that is no `PlayedEnv`. What it takes is the policy's, unless there is one inside."""
        step = functools.partial(self._env.step, action)
        if isinstance(self._env.unwrapped, PlayedEnv):
            return await self._in_thread(step, None)
        started = time.perf_counter()
        assert self._offload is not None
        try:
            return await self._offload(step, timeout_s=self._clock.left_s, what="step")
        except GivenUp:
            raise OutOfTime(
                f"a step did not end within the {self._clock.left_s:g} s that were left"
            ) from None
        finally:
            self._clock.spent_s += time.perf_counter() - started

    async def _in_thread(self, function: Callable[[], Any], timeout_s: float | None) -> Any:
        assert self._offload is not None
        try:
            return await self._offload(function, timeout_s=timeout_s, what="an environment")
        except GivenUp:
            raise EnvironmentFault(f"the environment did not answer within {timeout_s:g} s") from None
