"""Whether a run's rewards can grade its tasks, found out before anything starts."""

from __future__ import annotations

import json

from polyturn.configs.schema import RunConfig
from polyturn.envs.registry import make
from polyturn.envs.rewards.factory import make_group_rewards
from polyturn.envs.rewards.rules import check_label
from polyturn.envs.tasks import EnvironmentChoice, MixtureTasks, Task, TaskSource
from polyturn.rollout.setup import run_reward

NUM_TASKS = 32
"""The first so many tasks of each source are looked at."""


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
    """Raise `ValueError` for a task whose label its reward cannot use, or whose environment cannot be made."""
    reward = run_reward(config)
    made: set[str] = set()
    for task in _first_tasks(source):
        try:
            check_label(task.reward if task.reward is not None else reward, task.label)
            if task.environment is not None:
                _check_environment(task.environment, made)
        except ValueError as error:
            raise ValueError(f"task {task.task_id!r}: {error}") from error


def _first_tasks(source: TaskSource) -> list[Task]:
    sources = source.sources if isinstance(source, MixtureTasks) else (source,)
    return [one[index] for one in sources for index in range(min(NUM_TASKS, len(one)))]


def _check_environment(choice: EnvironmentChoice, made: set[str]) -> None:
    key = json.dumps([choice.env_id, choice.options], sort_keys=True)
    if key not in made:
        make(choice.env_id, **choice.options).close()
        made.add(key)
