"""Separate limits for live episodes, generation requests and tool calls.

A request's slot is held while the request is under way and never during tool time: an episode that waits for a tool
leaves the engines to others.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from concurrent.futures import Executor
from dataclasses import dataclass
from typing import Any

from polyturn.agents.policy import Generation, MessagePolicy, SamplingParams, TokenPolicy
from polyturn.configs.schema import RolloutConfig
from polyturn.envs.messages import AssistantMessage, Message, Observation
from polyturn.envs.tasks import Task
from polyturn.envs.tool_env import StepResult, ToolEnv
from polyturn.tools.types import ToolSpec

Policy = TokenPolicy | MessagePolicy


@dataclass(frozen=True, kw_only=True, slots=True)
class RolloutLimits:
    """How much may happen at once, and how often a failed episode is played again."""

    max_concurrent_requests: int = 256
    max_concurrent_episodes: int = 256
    max_concurrent_tools: int = 32
    """Environment steps at once; also the number of threads for steps that are not asynchronous."""
    max_retries: int = 2
    retry_delay_s: float = 0.5
    """Wait before the first retry; doubles with each."""
    stall_timeout_s: float | None = None
    """Give up when no attempt has ended for so long."""
    max_failure_share: float = 0.5
    """Give up when a larger share of the attempts of one collection failed, once there are enough to tell."""

    @classmethod
    def from_config(cls, config: RolloutConfig, *, episode_timeout_s: float) -> RolloutLimits:
        """The limits of a run. An episode ends by its own timeout, so twice that without any end is a stall."""
        return cls(
            max_concurrent_requests=config.max_concurrent_requests,
            max_concurrent_episodes=config.max_concurrent_episodes,
            max_concurrent_tools=config.max_concurrent_tools,
            max_retries=config.max_retries,
            max_failure_share=config.max_failure_share,
            stall_timeout_s=2 * episode_timeout_s,
        )


class LimitedPolicy:
    """A policy for one episode whose requests wait for a slot; `queue_s` is how long they waited in sum."""

    def __init__(self, policy: Policy, slots: asyncio.Semaphore) -> None:
        self._policy: Any = policy
        self._slots = slots
        self.queue_s = 0.0

    async def generate(self, *, prompt_ids: Sequence[int], sampling: SamplingParams) -> Generation:
        """As the policy's own."""
        asked = time.perf_counter()
        async with self._slots:
            self.queue_s += time.perf_counter() - asked
            return await self._policy.generate(prompt_ids=prompt_ids, sampling=sampling)

    async def reply(self, *, messages: Sequence[Message], tools: Sequence[ToolSpec]) -> AssistantMessage:
        """As the policy's own."""
        asked = time.perf_counter()
        async with self._slots:
            self.queue_s += time.perf_counter() - asked
            return await self._policy.reply(messages=messages, tools=tools)


class LimitedEnv(ToolEnv):
    """What a player sees of an environment: resets and steps that wait for a slot. All else is the environment's."""

    def __init__(self, env: ToolEnv, slots: asyncio.Semaphore) -> None:
        # Not ToolEnv's own set-up: this one only forwards.
        self._env = env
        self._slots = slots

    @property
    def unwrapped(self) -> ToolEnv:
        return self._env

    @property
    def env_id(self) -> str:
        return self._env.env_id

    @property
    def task(self) -> Task:
        return self._env.task

    @property
    def tools(self) -> tuple[ToolSpec, ...]:
        return self._env.tools

    async def reset_async(
        self,
        *,
        seed: int | None = None,
        options: dict[str, Any] | None = None,
        executor: Executor | None = None,
    ) -> tuple[Observation, dict[str, Any]]:
        """As the environment's own."""
        async with self._slots:
            return await self._env.reset_async(seed=seed, options=options, executor=executor)

    async def step_async(self, action: AssistantMessage, *, executor: Executor | None = None) -> StepResult:
        """As the environment's own."""
        async with self._slots:
            return await self._env.step_async(action, executor=executor)

    def close(self) -> None:
        """As the environment's own."""
        self._env.close()
