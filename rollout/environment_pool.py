"""Environments that are made once and used again."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable

from polyturn.envs.tasks import EnvironmentChoice
from polyturn.envs.tool_env import ToolEnv


class EnvironmentPool:
    """Idle environments, by what a task asks for. Safe to use from several threads."""

    def __init__(
        self,
        make_env: Callable[[], ToolEnv],
        make_chosen: Callable[[EnvironmentChoice], ToolEnv] | None = None,
    ) -> None:
        """`make_env` makes those of tasks that choose none; without `make_chosen` there are no others."""
        self._make_env = make_env
        self._make_chosen = make_chosen
        self._lock = threading.Lock()
        self._idle: dict[str, list[ToolEnv]] = {}

    def take(self, choice: EnvironmentChoice | None) -> ToolEnv | None:
        """An idle environment of the kind that a task chooses, if there is one."""
        with self._lock:
            idle = self._idle.get(_key(choice))
            return idle.pop() if idle else None

    def make(self, choice: EnvironmentChoice | None) -> ToolEnv:
        """A new one. Raises what making it raises."""
        if choice is None:
            return self._make_env()
        if self._make_chosen is None:
            raise ValueError(
                f"a task asks for the environment {choice.env_id!r}, and only one kind is played here"
            )
        return self._make_chosen(choice)

    def give_back(self, env: ToolEnv, choice: EnvironmentChoice | None) -> None:
        """Keep an environment for that choice, for the next who asks."""
        with self._lock:
            self._idle.setdefault(_key(choice), []).append(env)

    def close(self) -> None:
        """Close the idle environments."""
        with self._lock:
            idle, self._idle = self._idle, {}
        for envs in idle.values():
            for env in envs:
                env.close()


def _key(choice: EnvironmentChoice | None) -> str:
    """Environments with the same key may stand in for each other."""
    return "" if choice is None else f"{choice.env_id} {json.dumps(choice.options, sort_keys=True)}"
