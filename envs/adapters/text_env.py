"""Somebody else's text-only `gymnasium.Env` as a tool environment: observations are said, and replies are actions."""

from __future__ import annotations

import copy
import functools
import importlib
import re
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import gymnasium

from polyturn.envs.adapters.tabular import best_actions
from polyturn.envs.adapters.text_spaces import (
    NoAction,
    action_reader,
    action_text,
    describe_actions,
    observation_text,
)
from polyturn.envs.hooks import Offload
from polyturn.envs.messages import AssistantMessage, Message
from polyturn.envs.scripts import Script
from polyturn.envs.tasks import GeneratedTasks, Task, TaskSource
from polyturn.envs.tasks.splits import known_split
from polyturn.envs.tool_env import StepResult, ToolEnv
from polyturn.tools.types import ToolSpec

SPLITS: Mapping[str, int] = {"train": 0, "heldout": 1_000_000}
"""The first seed of each split."""

FROZEN_LAKE: Mapping[str, Any] = {
    "env_id": "FrozenLake-v1",
    "env_options": {"is_slippery": False},
    "actions": ("left", "down", "right", "up"),
    "instructions": "Cross a frozen lake of 4 x 4 fields, numbered 0 to 15 row by row. Start on 0 and reach 15. "
    "The ice has holes at 5, 7, 11 and 12. You are told which field you are on.",
}
"""What is played when no environment is named."""

_HIGHLIGHT = re.compile(r"\x1b\[[0-9;]*m(.*?)\x1b\[0m", re.DOTALL)


class TextEnvAdapter(ToolEnv):
    """Plays a `gymnasium.Env` whose observations and actions can be written.

    A task is a seed of the environment. An observation becomes a user message; the reply that follows is the action. A
    reply that means none is told so and costs a turn, but nothing reaches the environment. What the environment calls
    terminated or truncated is so here, too.
    """

    def __init__(
        self,
        *,
        env_id: str | None = None,
        env_options: Mapping[str, Any] | None = None,
        instructions: str | None = None,
        actions: Sequence[str] = (),
        show: Literal["observation", "render", "both"] = "observation",
        reward: Literal["sum", "last"] = "sum",
        oracle: str | Script | None = None,
        num_tasks: int = 1000,
        tasks: TaskSource | None = None,
        split: str = "train",
        max_turns: int | None = None,
        render_mode: str | None = None,
    ) -> None:
        """
        Args:
            env_id: As `gymnasium.make` takes it, `module:Name-v0` included; None plays the frozen lake.
            env_options: Arguments of that environment.
            instructions: Said before the first observation.
            actions: What the actions of a `Discrete` space are called.
            show: Observations, what `render()` returns as text, or both; to render, set a text mode in `env_options`.
            reward: `sum` pays what each step earns, `last` only what the last one earns.
            oracle: A script, or `module:name` of one. Without one, an environment with a table of transitions `P` and a
                state `s`, as Gymnasium's toy texts have, is solved.
            num_tasks: Seeds of each split.
            tasks: Takes the place of the seeds; `metadata["seed"]` of a task is its seed.
            split: `train` or `heldout`.
            max_turns: Truncate after so many replies, those that were no action included.
            render_mode: None or "ansi".

        Raises:
            ValueError: there is no such environment, it does not take the options, or replies cannot be its actions.
        """
        if env_id is None:
            env_id, env_options = FROZEN_LAKE["env_id"], env_options or FROZEN_LAKE["env_options"]
            instructions, actions = instructions or FROZEN_LAKE["instructions"], FROZEN_LAKE["actions"]
        if num_tasks < 1:
            raise ValueError(f"num_tasks must be at least 1, not {num_tasks}")
        super().__init__(tasks=tasks, split=split, max_turns=max_turns, render_mode=render_mode)
        self.played = _make(env_id, env_options or {})
        self._names = tuple(actions)
        self._read = action_reader(self.played.action_space, self._names)
        self._instructions = "\n\n".join(
            filter(None, (instructions, describe_actions(self.played.action_space, self._names)))
        )
        self._show, self._pay, self._num_tasks = show, reward, num_tasks
        if oracle is not None:
            self.oracle = _import(oracle) if isinstance(oracle, str) else oracle  # type: ignore[method-assign, assignment]
        elif not hasattr(self.played.unwrapped, "P"):
            self.oracle = None  # type: ignore[method-assign, assignment]
        self._solution: list[int] | None = None
        self._step_reward = 0.0
        self._truncated = False

    def tasks(self, split: str) -> TaskSource:
        """The seeds of `train` or `heldout`, as tasks."""
        if self._given_tasks is not None:
            return self._given_tasks
        return _seeds(known_split(split, SPLITS), self._num_tasks)

    def begin(self, task: Task) -> Sequence[Message]:
        """The instructions and the first observation."""
        observation, _ = self.played.reset(seed=int(task.metadata["seed"]))
        self._step_reward, self._truncated = 0.0, False
        said = [
            *(message["content"] for message in task.messages),
            self._instructions,
            self._say(observation),
        ]
        return [{"role": "user", "content": "\n\n".join(text for text in said if text)}]

    def follow_up(self, message: AssistantMessage) -> Sequence[Message]:
        """What the environment answers; nothing once it has ended."""
        self._step_reward = 0.0
        try:
            action = self._read(message.content)
        except NoAction as complaint:
            return [{"role": "user", "content": str(complaint)}]
        observation, reward, terminated, truncated, _ = self.played.step(action)
        if self._pay == "sum" or terminated or truncated:
            self._step_reward = float(reward)
        self._truncated = bool(truncated) and not terminated
        if terminated or truncated:
            return ()
        return [{"role": "user", "content": self._say(observation)}]

    def grade(self, message: AssistantMessage) -> Mapping[str, float]:
        """What the last step earned."""
        del message
        return {"environment": self._step_reward}

    def oracle(self, messages: Sequence[Message], tools: Sequence[ToolSpec]) -> AssistantMessage:  # type: ignore[override]
        """The best action in the state that the environment is in, by its own table."""
        del messages, tools
        inner: Any = self.played.unwrapped
        if self._solution is None:
            self._solution = best_actions(inner.P)
        action = self._solution[int(inner.s)]
        return AssistantMessage(content=action_text(self.played.action_space, action, self._names))

    def random_policy(self, seed: int) -> Script:
        """Actions drawn from the environment's own space."""
        space = copy.deepcopy(self.played.action_space)
        space.seed(seed)

        def script(messages: Sequence[Message], tools: Sequence[ToolSpec]) -> AssistantMessage:
            del messages, tools
            return AssistantMessage(content=action_text(space, space.sample(), self._names))

        return script

    def close(self) -> None:
        """Close both environments."""
        self.played.close()
        super().close()

    async def _step(self, action: AssistantMessage, offload: Offload) -> StepResult:
        self._step_reward = 0.0
        observation, _, terminated, truncated, info = await super()._step(action, offload)
        if terminated and self._truncated:
            terminated, truncated = False, True
            info["stop_reason"] = "environment"
        info["reward_parts"] = {"environment": self._step_reward}
        return observation, self._step_reward, terminated, truncated, info

    def _say(self, observation: Any) -> str:
        texts = []
        if self._show != "render":
            texts.append(observation_text(self.played.observation_space, observation))
        if self._show != "observation":
            texts.append(_HIGHLIGHT.sub(r"[\1]", str(self.played.render())).strip("\n"))
        return "\n".join(texts)


def _make(env_id: str, options: Mapping[str, Any]) -> gymnasium.Env[Any, Any]:
    try:
        return gymnasium.make(env_id, disable_env_checker=True, **options)
    except (gymnasium.error.Error, TypeError, ImportError) as error:
        raise ValueError(f"cannot make {env_id!r}: {error}") from error


def _import(name: str) -> Script:
    module, _, attribute = name.partition(":")
    try:
        return getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError, ValueError) as error:
        raise ValueError(f"there is no script {name!r} (as module:name): {error}") from error


@functools.lru_cache(maxsize=8)
def _seeds(split: str, count: int) -> TaskSource:
    first = SPLITS[split]

    def seed(index: int, seed: int) -> Task:
        del seed
        return Task(task_id=f"{split}-{index}", messages=(), metadata={"seed": first + index})

    return GeneratedTasks(seed, size=count, name=split)
