"""Which tasks a run's config means for a split."""

from __future__ import annotations

from polyturn.configs.schema.run import RunConfig
from polyturn.configs.schema.tasks import TaskSourceConfig
from polyturn.envs.messages import TaskSource
from polyturn.envs.registry import make
from polyturn.envs.tasks.sources import open_tasks

HELDOUT_NAMES = frozenset(
    (
        "heldout",
        "held_out",
        "held-out",
        "test",
        "testing",
        "validation",
        "valid",
        "val",
        "dev",
        "eval",
        "evaluation",
    )
)


def check_train_split(config: RunConfig) -> None:
    """Raise `ValueError` for a split to train on that is held out, unless the config says that this is meant."""
    environment, split = config.environment, config.environment.train_split
    if environment.train_on_heldout:
        return
    if split.lower() in HELDOUT_NAMES:
        why = "is held out by its name"
    elif split == config.evaluation.split:
        why = "is the one that evaluation.split plays"
    else:
        return
    raise ValueError(
        f"environment.train_split: '{split}' {why}; train on another split, or say environment.train_on_heldout=true"
    )


def task_configs(config: RunConfig, split: str) -> list[TaskSourceConfig] | None:
    """What the config names as the tasks of a split; None: they are the environment's own.

    Raises:
        ValueError: held-out tasks whose split is the one that is trained on.
    """
    environment, evaluation = config.environment, config.evaluation
    if evaluation.tasks is not None:
        if evaluation.split == environment.train_split:
            raise ValueError(
                f"evaluation.tasks: evaluation.split and environment.train_split are both '{split}'; give the held-out "
                "tasks a split of another name"
            )
        if split == evaluation.split:
            return evaluation.tasks
    return environment.tasks


def tasks_of(config: RunConfig, split: str) -> TaskSource:
    """The tasks of a split: those that the config names, or else the environment's own.

    Raises:
        ValueError: they cannot be had, or there are none.
    """
    environment = config.environment
    given = task_configs(config, split)
    if given is not None:
        return open_tasks(given)
    env = make(environment.id, **environment.options)
    try:
        source = env.tasks(split)
    finally:
        env.close()
    if len(source) == 0:
        raise ValueError(f"{environment.id} has no tasks in the split '{split}'")
    return source
