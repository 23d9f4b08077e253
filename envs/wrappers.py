"""Gymnasium's wrappers around tool environments: acting in raw text, and a wrapped one that is played like any."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import gymnasium
import numpy as np

from polyturn.envs.messages import AssistantMessage, Observation, Reward, Script, Task, TaskSource
from polyturn.envs.spaces import ChatSpace, ReplySpace
from polyturn.envs.tool_env import StepResult, ToolEnv
from polyturn.tools.threads import Offload


class TextSpace(gymnasium.Space[str]):
    """Any text. `gymnasium.spaces.Text` refuses what lies outside its character set."""

    def __init__(self, seed: int | None = None) -> None:
        super().__init__(None, None, seed)

    @property
    def is_np_flattenable(self) -> bool:
        return False

    def contains(self, x: Any) -> bool:
        return isinstance(x, str)

    def sample(self, mask: Any | None = None, probability: Any | None = None) -> str:
        if mask is not None or probability is not None:
            raise ValueError("a space of texts has no masks or probabilities")
        return str(int(self.np_random.integers(1000)))

    def __eq__(self, other: object) -> bool:
        return isinstance(other, TextSpace)

    def __hash__(self) -> int:
        return hash(TextSpace)


class RawTextAction(gymnasium.ActionWrapper[Observation, str, AssistantMessage]):
    """Lets one act in raw text: `parse` (a dialect's, or one's own for tags) makes it an assistant message."""

    def __init__(
        self, env: gymnasium.Env[Observation, AssistantMessage], parse: Callable[[str], AssistantMessage]
    ) -> None:
        super().__init__(env)
        self.action_space = TextSpace()
        self._parse = parse

    def action(self, action: str) -> AssistantMessage:
        return self._parse(action)


class WrappedToolEnv(ToolEnv):
    """Steps go through the wrappers; tasks, tools and scripts are those of the environment inside.

    Where wrappers change the reward, the difference is the reward part `wrappers`.
    """

    def __init__(self, env: gymnasium.Env[Any, Any]) -> None:
        """
        Raises:
            ValueError: there is no `ToolEnv` inside, or the wrappers change what actions or observations are.
        """
        inner = env.unwrapped
        if not isinstance(inner, ToolEnv):
            raise ValueError(f"{type(inner).__name__} is no polyturn.ToolEnv")
        for kind, space, wanted in (
            ("actions", env.action_space, ReplySpace),
            ("observations", env.observation_space, ChatSpace),
        ):
            if not isinstance(space, wanted):
                raise ValueError(
                    f"the wrappers of {inner.env_id} turn its {kind} into {space}; a policy that is trained speaks in "
                    "messages, so they must stay as they are"
                )
        self.env, self.inner = env, inner
        super().__init__(render_mode=inner.render_mode)
        self.toolset = inner.toolset
        self.observation_space, self.action_space = env.observation_space, env.action_space  # type: ignore[assignment]
        self.metadata, self.spec = env.metadata, env.spec
        self._given_tasks = inner._given_tasks

    @property
    def graded_by(self) -> Reward | None:  # type: ignore[override]
        return self.inner.graded_by

    @graded_by.setter
    def graded_by(self, reward: Reward | None) -> None:
        self.inner.graded_by = reward

    @property
    def oracle(self) -> Script | None:  # type: ignore[override]
        return self.inner.oracle

    def check_label(self, label: Any) -> None:
        """As the environment inside."""
        self.inner.check_label(label)

    def random_policy(self, seed: int) -> Script:
        """That of the environment inside."""
        return self.inner.random_policy(seed)

    def tasks(self, split: str) -> TaskSource:
        """Those of the environment inside."""
        return self.inner.tasks(split)

    @property
    def task(self) -> Task:
        return self.inner.task

    @property
    def env_id(self) -> str:
        return self.inner.env_id

    @property
    def np_random(self) -> np.random.Generator:
        return self.inner.np_random

    @np_random.setter
    def np_random(self, value: np.random.Generator) -> None:
        self.inner.np_random = value

    @property
    def is_reusable(self) -> bool:
        return super().is_reusable and self.inner.is_reusable

    @property
    def still_running(self) -> tuple[str, ...]:
        return self.inner.still_running or super().still_running

    def close(self) -> None:
        """Close the wrappers and what is inside."""
        self._done = True
        self.env.close()
        if self._hook_thread is not None:
            self._hook_thread.shutdown()

    def render(self) -> Any:
        """What the wrappers make of it."""
        return self.env.render()

    def _waits(self) -> bool:
        # The environment inside runs an event loop of its own where it needs one.
        return False

    async def _reset(
        self, seed: int | None, options: dict[str, Any] | None, offload: Offload
    ) -> tuple[Observation, dict[str, Any]]:
        self._done = True
        # The environment inside sees to deadlines itself.
        self.inner.step_limits = self.step_limits
        observation, info = await offload(functools.partial(self.env.reset, seed=seed, options=options))
        self._np_random, self._task = self.inner.np_random, self.inner.task
        self._done = False
        return observation, info

    async def _step(self, action: AssistantMessage, offload: Offload) -> StepResult:
        if self._done:
            raise gymnasium.error.ResetNeeded("the episode is over: call reset() before step()")
        if action not in self.action_space:
            raise ValueError(f"an action is an AssistantMessage, not {type(action).__name__}")
        self._done = True  # until this step has gone well
        self.inner.step_limits = self.step_limits
        observation, reward, terminated, truncated, info = await offload(
            functools.partial(self.env.step, action)
        )
        reward, parts = float(reward), dict(info.get("reward_parts", {}))
        rest = reward - sum(parts.values())
        if not math.isclose(rest, 0.0, abs_tol=1e-9):
            parts["wrappers"] = rest
        info["reward_parts"] = parts
        self._done = bool(terminated or truncated)
        if self._done:
            info.setdefault("stop_reason", "terminated" if terminated else "environment")
        return observation, reward, bool(terminated), bool(truncated), info
