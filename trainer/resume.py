"""What is found out before an interrupted run goes on: whether it may, and what is missing of what it had."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import orjson

from polyturn.agents.episode import Episode
from polyturn.configs.schema.run import ChecksConfig, RunConfig
from polyturn.envs.tasks import TaskSource, draw_order
from polyturn.envs.tasks.digest import task_digest
from polyturn.rollout.collector import other_task
from polyturn.rollout.groups import PromptCursor
from polyturn.rollout.store import TrajectoryStore
from polyturn.rollout.task_sources import tasks_of
from polyturn.trainer.identity import compare, identify, refusal
from polyturn.trainer.megatron.checkpoints.manifest import find_faults
from polyturn.trainer.metrics import num_damaged_rows
from polyturn.trainer.run_directory import FailedStep, RunDirectory

Tell = Callable[[str], None]
MAX_FAILURES = 2
"""A step that failed so often in a row is not played again without a change."""


def check_resume(config: RunConfig, directory: RunDirectory, tell: Tell) -> None:
    """Compare the run with what the config makes of it, and read what is stored of its unfinished steps.

    Args:
        tell: is told of everything that differs or is damaged.

    Raises:
        ValueError: the run cannot go on so; one sentence with the way out.
    """
    differences = compare(directory.recorded(), identify(config), config)
    if differences.refused:
        raise ValueError(refusal(differences, directory.path))
    for text in differences.told:
        tell(f"resume: {text}")
    # Marker and sizes only; the ranks compare the checksums, each of some files.
    found = directory.sound_checkpoint(partial(find_faults, read=False), tell)
    last_step = 0 if found is None else found[1].step
    _refuse_what_fails_again(directory, last_step, config.checks)
    _check_stored(config, TrajectoryStore(directory.path), last_step, tell)
    if num_damaged := num_damaged_rows(directory.metrics):
        tell(
            f"resume: {directory.metrics} is damaged: {num_damaged} of its rows cannot be read and are left out"
        )


def _refuse_what_fails_again(directory: RunDirectory, last_step: int, checks: ChecksConfig) -> None:
    failed = FailedStep.read(directory.failure)
    if failed is None or failed.step <= last_step or failed.count < MAX_FAILURES:
        return
    if failed.checks != checks.model_dump(mode="json"):
        return
    raise ValueError(
        f"resume: step {failed.step} failed {failed.count} times in a row, the last time so: {failed.sentence}. It "
        "might be played and fail for ever: change the `checks` that it failed, or mend what made it fail and delete "
        f"{directory.failure} to try again"
    )


def _check_stored(config: RunConfig, store: TrajectoryStore, last_step: int, tell: Tell) -> None:
    """Raise for episodes of other tasks than the run has; tell of those that are damaged."""
    tasks = tasks_of(config, config.environment.train_split)
    seed = config.seed
    order = draw_order(tasks, seed=seed)
    for step in store.begun_after(last_step):
        stored = store.stored(step)
        for fault in stored.damage:
            tell(f"resume: {fault}; what it held is played again")
        checked: set[str] = set()
        for episode in stored.episodes:
            if episode.group_id not in checked:
                checked.add(episode.group_id)
                prompt = PromptCursor(len(tasks), seed=seed, position=_position(episode), order=order).peek(
                    1
                )[0]
                _check_task(episode, tasks, prompt.task_index, store, step)


def _position(episode: Episode) -> int:
    digits = episode.group_id.removeprefix("g")
    if not digits.isdigit():
        raise ValueError(f"resume: the stored episode {episode.episode_id} is of no group of a training run")
    return int(digits)


def _check_task(episode: Episode, tasks: TaskSource, index: int, store: TrajectoryStore, step: int) -> None:
    task = tasks[index]
    if episode.task_digest and episode.task_digest != task_digest(task):
        raise ValueError(
            f"resume: {other_task(episode, task)}. Give the run the tasks, the seed and the options that it began "
            f"with, or delete {store.journal_path(step)} and {store.path(step)} to have the step played anew"
        )


def note_failure(
    directory: RunDirectory, store: TrajectoryStore, *, step: int, sentence: str, checks: ChecksConfig
) -> str:
    """Remember that a step failed by what was played, and put that aside; the sentence with the way out.

    Left where it is, the next session would train on the same episodes and fail as this one did.
    """
    before = FailedStep.read(directory.failure)
    count = 1 if before is None or before.step != step else before.count + 1
    failed = FailedStep(step=step, count=count, sentence=sentence, checks=checks.model_dump(mode="json"))
    aside = store.set_aside(step)
    directory.failure.write_bytes(orjson.dumps(failed.as_json()))
    where = f"; its episodes are in {aside}" if aside else ""
    return f"{sentence}{where}; resume=true plays the step anew"


def forget_failure(directory: RunDirectory, step: int) -> None:
    """Once a checkpoint has a step, it is of no account that it failed before."""
    failed = FailedStep.read(directory.failure)
    if failed is not None and failed.step <= step:
        directory.failure.unlink()
