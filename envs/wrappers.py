"""Gymnasium's wrappers around tool environments: acting in raw text, and a wrapped one that is played like any."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import gymnasium

from polyturn.envs.messages import AssistantMessage, Observation
from polyturn.envs.played_env import PlayedEnv, StepResult, where_hooks_ran
from polyturn.envs.spaces import ChatSpace, ReplySpace
from polyturn.envs.tool_env import ToolEnv
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


def _of_inner(name: str) -> Any:
    """An attribute of a `WrappedEnv` that is the one of the environment inside, to read and to set."""

    def read(env: WrappedEnv) -> Any:
        return getattr(env.inner, name)

    def write(env: WrappedEnv, value: Any) -> None:
        setattr(env.inner, name, value)

    return property(read, write)


class WrappedEnv(PlayedEnv):
    """Gymnasium's wrappers around a `ToolEnv`, which are synchronous: steps go through them, in the thread of what may
    block, and everything else is asked of the environment inside.

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
        self.observation_space, self.action_space = env.observation_space, env.action_space  # type: ignore[assignment]
        self.metadata, self.spec, self.render_mode = env.metadata, env.spec, inner.render_mode
        self._done = True

    step_limits = _of_inner("step_limits")
    engine_urls = _of_inner("engine_urls")
    graded_by = _of_inner("graded_by")
    np_random = _of_inner("np_random")
    env_id, tools, task = _of_inner("env_id"), _of_inner("tools"), _of_inner("task")
    tasks, check_label = _of_inner("tasks"), _of_inner("check_label")
    oracle, random_policy, answer_of = _of_inner("oracle"), _of_inner("random_policy"), _of_inner("answer_of")

    @property
    def unwrapped(self) -> ToolEnv:
        return self.inner

    @property
    def is_reusable(self) -> bool:
        return super().is_reusable and self.inner.is_reusable

    @property
    def still_running(self) -> tuple[str, ...]:
        return self.inner.still_running or super().still_running

    @where_hooks_ran
    def close(self) -> None:
        """Close the wrappers and what is inside."""
        self._done = True
        self.env.close()
        super().close()

    def render(self) -> Any:
        """What the wrappers make of it."""
        return self.env.render()

    async def _reset(
        self, seed: int | None, options: dict[str, Any] | None, offload: Offload
    ) -> tuple[Observation, dict[str, Any]]:
        self._done = True
        observation, info = await offload(functools.partial(self.env.reset, seed=seed, options=options))
        self._done = False
        return observation, info

    async def _step(self, action: AssistantMessage, offload: Offload) -> StepResult:
        if self._done:
            raise gymnasium.error.ResetNeeded("the episode is over: call reset() before step()")
        if action not in self.action_space:
            raise ValueError(f"an action is an AssistantMessage, not {type(action).__name__}")
        self._done = True  # until this step has gone well
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
