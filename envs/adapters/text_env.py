"""Somebody else's text-only `gymnasium.Env` as a tool environment: observations are said, and replies are actions."""

from __future__ import annotations

import copy
import functools
import importlib
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import gymnasium
import numpy as np
from gymnasium import Space, spaces

from polyturn.envs.messages import AssistantMessage, Message, Script, Task, TaskSource, known_split
from polyturn.envs.tasks import GeneratedTasks
from polyturn.envs.tool_env import StepResult, ToolEnv
from polyturn.tools.threads import Offload
from polyturn.tools.types import ToolSpec

Transitions = Mapping[int, Mapping[int, Sequence[tuple[float, int, float, bool]]]]
"""By state and action: probability, next state, reward, and whether that is the end."""

DISCOUNT = 0.999
"""Just below 1, so that the shorter of two ways is the better one."""


def best_actions(transitions: Transitions, *, tolerance: float = 1e-9, max_sweeps: int = 5000) -> list[int]:
    """The best action in every state, by value iteration (Sutton and Barto, section 4.4)."""
    values = [0.0] * len(transitions)

    def worth(state: int, action: Any) -> float:
        return sum(
            probability * (reward + (0.0 if ended else DISCOUNT * values[following]))
            for probability, following, reward, ended in transitions[state][action]
        )

    for _ in range(max_sweeps):
        change = 0.0
        for state, actions in transitions.items():
            value = max(worth(state, action) for action in actions)
            change = max(change, abs(value - values[state]))
            values[state] = value
        if change < tolerance:
            break
    return [
        max(actions, key=lambda action, state=state: worth(state, action))  # type: ignore[misc]
        for state, actions in sorted(transitions.items())
    ]


_NUMBER = re.compile(r"(?<![\w.])-?\d{1,9}(?!\w|\.\d)")
_TAIL = 2000
"""How much of the end of a reply is read: an action is short."""


class NoAction(ValueError):
    """A reply that is no action; the text tells the model what one is."""


def observation_text(space: Space[Any], observation: Any) -> str:
    """An observation in words. Text stays as it is; whatever is made of numbers becomes a list of them."""
    if isinstance(observation, str):
        return observation
    if isinstance(space, spaces.Dict) and isinstance(observation, Mapping):
        return "\n".join(
            f"{name}: {observation_text(part, observation[name])}" for name, part in space.items()
        )
    if isinstance(space, spaces.Tuple):
        return ", ".join(
            observation_text(part, value) for part, value in zip(space.spaces, observation, strict=True)
        )
    if isinstance(observation, (np.ndarray, np.generic)):
        return str(observation.tolist())
    return str(observation)


def action_reader(space: Space[Any], names: Sequence[str] = ()) -> Callable[[str], Any]:
    """A function from replies to actions; it raises `NoAction` for one that means none.

    A reply may say more than the action: its last name or number counts.

    Args:
        space: `Text`, `Discrete`, `MultiDiscrete` or `MultiBinary`, or a space of one's own that contains texts.
        names: What the actions of a `Discrete` space are called, from its first on.

    Raises:
        ValueError: actions of this space cannot be written in text, or there are not as many names as actions.
    """
    if isinstance(space, spaces.Discrete):
        if names and len(names) != space.n:
            raise ValueError(f"there are {space.n} actions, but {len(names)} names for them")
        return lambda text: _discrete(space, names, text)
    if names:
        raise ValueError(f"only the actions of a Discrete space have names, not those of {space}")
    if isinstance(space, (spaces.MultiDiscrete, spaces.MultiBinary)):
        return lambda text: _several(space, text)
    # Box would warn of the question.
    if not isinstance(space, spaces.Text) and (isinstance(space, spaces.Box) or not space.contains("a")):
        raise ValueError(
            f"a reply cannot be an action of {space}: Text, Discrete, MultiDiscrete and MultiBinary can be written"
        )
    return lambda text: _text(space, text)


def action_text(space: Space[Any], action: Any, names: Sequence[str] = ()) -> str:
    """The reply that means an action."""
    if names and isinstance(space, spaces.Discrete):
        return names[int(action) - int(space.start)]
    return action if isinstance(action, str) else " ".join(str(part) for part in np.ravel(action))


def describe_actions(space: Space[Any], names: Sequence[str] = ()) -> str:
    """One sentence on how to act."""
    if names:
        return f"Answer with one of: {', '.join(names)}."
    if isinstance(space, spaces.Discrete):
        return f"Answer with a number from {space.start} to {space.start + space.n - 1}."
    if isinstance(space, spaces.MultiDiscrete):
        ranges = ", ".join(
            f"{low} to {low + n - 1}"
            for low, n in zip(np.ravel(space.start), np.ravel(space.nvec), strict=True)
        )
        return f"Answer with {space.nvec.size} numbers: {ranges}."
    if isinstance(space, spaces.MultiBinary):
        return f"Answer with {int(np.prod(space.shape))} numbers, each 0 or 1."
    return "Answer with a text."


def _discrete(space: spaces.Discrete, names: Sequence[str], text: str) -> Any:
    tail = text[-_TAIL:]
    if names:
        pattern = "|".join(re.escape(name) for name in sorted(names, key=len, reverse=True))
        if found := re.findall(rf"(?<!\w)(?:{pattern})(?!\w)", tail, re.IGNORECASE):
            lower = [name.lower() for name in names]
            return space.start + lower.index(found[-1].lower())
    numbers = _NUMBER.findall(tail)
    if numbers and (action := space.dtype.type(int(numbers[-1]))) in space:  # type: ignore[union-attr]
        return action
    raise NoAction(f"That is no action. {describe_actions(space, names)}")


def _several(space: spaces.MultiDiscrete | spaces.MultiBinary, text: str) -> Any:
    size = int(np.prod(space.shape))
    numbers = [int(number) for number in _NUMBER.findall(text[-_TAIL:])][-size:]
    if len(numbers) == size:
        action = np.array(numbers, dtype=np.int64).astype(space.dtype).reshape(space.shape)
        if np.array_equal(action.ravel(), numbers) and space.contains(action):
            return action
    raise NoAction(f"That is no action. {describe_actions(space)}")


def _text(space: Space[Any], text: str) -> str:
    stripped = text.strip()
    if not space.contains(stripped):
        limit = f" of at most {space.max_length} characters" if isinstance(space, spaces.Text) else ""
        raise NoAction(f"That is no action. Answer with a text{limit}, in the characters that are allowed.")
    return stripped


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
