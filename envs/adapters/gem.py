"""Environments of GEM (Axon RL, arXiv 2510.01051; needs `polyturn[gem]`)."""

from __future__ import annotations

import difflib
import inspect
import logging
import random
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from polyturn.envs.adapters.peer import (
    MissingPackage,
    OwnRandomness,
    PeerEpisode,
    PeerStep,
    PeerTextEnv,
    RewardKind,
    SeededTasks,
    check_size,
    check_split,
    require,
)
from polyturn.envs.messages import AssistantMessage, Message, Script, Task, TaskSource
from polyturn.tools.types import ToolSpec

# Where GEM's games keep what the player is to find; GEM itself gives no answers.
_SOLUTIONS: Mapping[str, Callable[[Any], str]] = {
    "GuessTheNumberEnv": lambda env: str(env.game_number),
    "MastermindEnv": lambda env: " ".join(map(str, env.game_code)),
}


class GemEnv(PeerTextEnv):
    """Games and other environments of GEM by their ids, such as `game:Mastermind-v0-easy`.

    A task is a seed. GEM seeds Python's and NumPy's global generators at each reset and draws from them in its games;
    here each episode has generators of its own, so that episodes beside each other do not change each other's draws.
    """

    def __init__(
        self,
        *,
        env: str = "game:Mastermind-v0-easy",
        env_options: Mapping[str, Any] | None = None,
        size: int = 100_000,
        reward: RewardKind = "success",
        deadline_s: float = 30.0,
        split: str = "train",
        render_mode: str | None = None,
    ) -> None:
        """
        Args:
            env: An id of GEM's registry. Those that load data from a hub do so on this machine.
            env_options: Arguments of GEM's environment.
            size: Tasks of each split.
            reward: `success`: 1.0 where the last step was paid 1 or more, else 0.0; `return`: the sum of all steps.
            deadline_s: For one call of GEM.
            split: `train`, `validation` or `heldout`.
            render_mode: None or "ansi".

        Raises:
            MissingPackage: GEM is not installed, or lacks something that this environment imports.
            ValueError: an environment or an option that GEM does not have.
        """
        _require_gem()
        from gem.envs.registration import ENV_REGISTRY

        if env not in ENV_REGISTRY:
            near = difflib.get_close_matches(env, ENV_REGISTRY, n=1)
            raise ValueError(
                f"GEM has no environment {env!r}" + (f"; did you mean {near[0]!r}?" if near else "")
            )
        check_size(size)
        check_split(split)
        super().__init__(reward=reward, deadline_s=deadline_s, split=split, render_mode=render_mode)
        self._gem_id = env
        self._gem_options = dict(env_options or {})
        self._size = size
        self._gem: Any = None
        probe = self._in_peer(self._make)  # what is wrong with the options shows now
        _refuse_unknown(type(probe), self._gem_options)
        self.oracle = self._tell_solution if type(probe).__name__ in _SOLUTIONS else None

    def tasks(self, split: str) -> TaskSource:
        """Seeds, disjoint between `train`, `validation` and `heldout`; small games repeat themselves."""
        return SeededTasks(self._gem_id, split, self._size, _task)

    def random_policy(self, seed: int) -> Script:
        """GEM's own random actions; words where it has none."""
        randomness = OwnRandomness(seed)

        def script(messages: Sequence[Message], tools: Sequence[ToolSpec]) -> AssistantMessage:
            del messages, tools
            with randomness.active():
                return AssistantMessage(content=_random_action(self._gem))

        return script

    def seed_of(self, task: Task) -> int:
        return int(task.metadata["seed"])

    def open_episode(self, task: Task) -> tuple[PeerEpisode, Sequence[Message]]:
        self._gem = self._make()
        observation, info = self._gem.reset(seed=self.seed_of(task))
        return _GemEpisode(self._gem), (_user(observation, info),)

    def _make(self) -> Any:
        from gem.envs.registration import make

        try:
            return make(self._gem_id, **self._gem_options)
        except TypeError as error:
            raise ValueError(f"GEM's {self._gem_id!r} does not take {self._gem_options}: {error}") from error
        except ImportError as error:
            advice = f"install what GEM's {self._gem_id!r} needs with: pip install 'polyturn[gem]'"
            raise MissingPackage(f"{error}; {advice}", name=error.name) from error

    def _tell_solution(self, messages: Sequence[Message], tools: Sequence[ToolSpec]) -> AssistantMessage:
        del messages, tools
        solution = _SOLUTIONS[type(self._gem).__name__](self._gem)
        return AssistantMessage(content=f"\\boxed{{{solution}}}")


class _GemEpisode:
    def __init__(self, env: Any) -> None:
        self._env = env

    def step(self, text: str) -> PeerStep:
        observation, reward, terminated, truncated, info = self._env.step(text)
        done = bool(terminated or truncated)
        return PeerStep(messages=(_user(observation, info),), reward=float(reward), done=done)

    def close(self) -> None:
        self._env = None


def _task(task_id: str, seed: int) -> Task:
    return Task(task_id=task_id, messages=(), metadata={"seed": seed})


def _user(observation: Any, info: Mapping[str, Any]) -> Message:
    """An observation with its suffix, which GEM's own wrappers add."""
    suffix = info.get("suffix")
    return {"role": "user", "content": f"{observation}\n{suffix}" if suffix else str(observation)}


def _refuse_unknown(kind: type, options: Mapping[str, Any]) -> None:
    """GEM's games take any option, and ignore those that they do not know. Raises ValueError."""
    known = [p.name for p in inspect.signature(kind).parameters.values() if p.kind is not p.VAR_KEYWORD]
    for name in options:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"it takes {', '.join(known)}"
            raise ValueError(f"GEM's {kind.__name__} has no option {name!r}; {hint}")


def _random_action(env: Any) -> str:
    try:
        return str(env.sample_random_action())
    except NotImplementedError:
        return f"\\boxed{{{random.randrange(10)}}}"


def _require_gem() -> None:
    """Import GEM, without the handler that it gives the root logger."""
    root = logging.getLogger()
    level, handlers = root.level, list(root.handlers)
    require("gem.envs", extra="gem")
    root.setLevel(level)
    root.handlers[:] = handlers
