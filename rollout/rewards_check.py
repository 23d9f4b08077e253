"""Whether a run's rewards can grade its tasks, found out before anything starts."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from polyturn.configs.schema.run import RunConfig
from polyturn.envs.registry import make
from polyturn.envs.rewards.factory import make_group_rewards
from polyturn.envs.rewards.labels import check_label
from polyturn.envs.tasks import EnvironmentChoice, ListTasks, MixtureTasks, SlicedTasks, Task, TaskSource
from polyturn.envs.tasks.files import FileTasks
from polyturn.envs.tasks.types import where_of
from polyturn.envs.tool_env import ToolEnv
from polyturn.rollout.setup import run_reward

MAX_STORED = 20_000
"""So many tasks of each file are looked at; of a longer one they are spread evenly."""
MAX_MADE = 32
"""The first so many tasks of a source that makes them are looked at."""


def check_rewards(config: RunConfig) -> None:
    """Raise `ValueError` for a reward or group reward that cannot be had."""
    try:
        run_reward(config)
    except ValueError as error:
        raise ValueError(f"reward: {error}") from error
    try:
        make_group_rewards(config.group_rewards)
    except ValueError as error:
        raise ValueError(f"group_rewards: {error}") from error


def check_tasks(config: RunConfig, source: TaskSource) -> None:
    """Raise `ValueError` for tasks whose label cannot be paid, or whose environment cannot be made.

    The message counts those of the first source that has such, and names the first.
    """
    checks = _Checks(config)
    try:
        for one in source.sources if isinstance(source, MixtureTasks) else (source,):
            _check_source(one, checks)
    finally:
        checks.close()


def _check_source(source: TaskSource, checks: _Checks) -> None:
    first, num_wrong, num_tasks = "", 0, 0
    for index in _looked_at(source):
        num_tasks += 1
        task = source[index]
        try:
            checks.check(task)
        except ValueError as error:
            num_wrong += 1
            where = where_of(source, index)
            named = where if where.startswith("task ") else f"{where}: task {task.task_id!r}"
            first = first or f"{named}: {error}"
    if num_wrong:
        others = (
            f"; so it is with {num_wrong:,} of the {num_tasks:,} tasks looked at" if num_wrong > 1 else ""
        )
        raise ValueError(first + others)


def _looked_at(source: TaskSource) -> Iterator[int]:
    """The positions of the tasks to check."""
    inner = source.source if isinstance(source, SlicedTasks) else source
    if not isinstance(inner, FileTasks | ListTasks):
        yield from range(min(MAX_MADE, len(source)))
        return
    num_checked = getattr(inner, "num_checked", None)
    size = len(source) if num_checked is None else min(num_checked, len(source))
    step = max(1, -(-size // MAX_STORED))
    yield from range(0, size, step)


class _Checks:
    """Checks tasks against what grades them; equal labels and environments once. Close it at the end."""

    def __init__(self, config: RunConfig) -> None:
        self._reward = run_reward(config)
        self._usual = EnvironmentChoice(env_id=config.environment.id, options=config.environment.options)
        self._environments: dict[str, ToolEnv] = {}
        self._found: dict[Any, str | None] = {}

    def check(self, task: Task) -> None:
        """Raise `ValueError` for a task that cannot be played or paid."""
        environment = self._environment(task.environment or self._usual)
        reward = task.reward if task.reward is not None else self._reward
        key = (id(environment), id(reward), type(task.label), task.label)
        try:
            problem = self._found[key]
        except (KeyError, TypeError):  # a label that is a list or a mapping has no hash
            problem = self._problem(environment, reward, task.label)
            if isinstance(task.label, str | int | float):
                self._found[key] = problem
        if problem is not None:
            raise ValueError(problem)

    def close(self) -> None:
        """Close the environments."""
        for environment in self._environments.values():
            environment.close()

    def _problem(self, environment: ToolEnv, reward: Any, label: Any) -> str | None:
        try:
            if reward is not None:
                check_label(reward, label)
            if reward is None or getattr(reward, "uses_environment_grade", False):
                environment.check_label(label)
        except ValueError as error:
            return str(error)
        return None

    def _environment(self, choice: EnvironmentChoice) -> ToolEnv:
        key = f"{choice.env_id} {choice.options!r}"
        if key not in self._environments:
            self._environments[key] = make(choice.env_id, **choice.options)
        return self._environments[key]
