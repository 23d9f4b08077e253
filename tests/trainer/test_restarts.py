"""How often a trainer that dies is started again, and what ends a run; tests/test_end_to_end.py has the real one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from ray.exceptions import ActorDiedError

from polyturn.configs.errors import RunFailure
from polyturn.configs.loading.loader import load_config
from polyturn.trainer.run.directory import RunDirectory, RunState
from polyturn.trainer.run.loop import RunParts
from polyturn.trainer.run.restarts import TrainerRestarts
from polyturn.trainer.run.stopwatch import Stopwatch


@dataclass
class Dying:
    """A trainer whose ranks die so many times while they start again."""

    num_deaths: int = 0
    loaded: list[Path] = field(default_factory=list)

    def death_behind(self, failure: BaseException) -> ActorDiedError | None:
        return failure if isinstance(failure, ActorDiedError) else None

    def restart(self) -> None:
        if self.num_deaths:
            self.num_deaths -= 1
            raise ActorDiedError

    def find_checkpoint_faults(self, directory: Path) -> Sequence[str]:
        return ()

    def load_checkpoint(self, directory: Path) -> None:
        self.loaded.append(directory)


@dataclass
class Screen:
    lines: list[str] = field(default_factory=list)

    def message(self, text: str) -> None:
        self.lines.append(text)


def restarts_of(
    trainer: Dying, path: Path, *overrides: str, turns: Any = None
) -> tuple[TrainerRestarts, Screen]:
    screen: Any = Screen()
    stand_in: Any = trainer
    nothing: Any = None
    parts = RunParts(
        config=load_config("quickstart", list(overrides)),
        directory=RunDirectory(path),
        trainer=stand_in,
        keeper=None,
        turns=turns,
        worker=nothing,
        evaluation=None,
        progress=screen,
        guard=nothing,
        stopwatch=Stopwatch(),
    )
    return TrainerRestarts(parts, lambda: None), screen


def checkpoint(path: Path, step: int) -> None:
    directory = RunDirectory(path)
    directory.begin_checkpoint(step).mkdir(parents=True)
    directory.commit_checkpoint(RunState(step=step, policy_version=step, prompt_position=step), keep_last=9)


def test_deaths_in_a_row_are_bounded_and_a_new_checkpoint_begins_the_count_anew(tmp_path: Path) -> None:
    trainer = Dying()
    restarts, screen = restarts_of(trainer, tmp_path, "trainer.max_restarts=2")
    assert restarts.restart(ActorDiedError()).step == 0, "without a checkpoint from the beginning"
    checkpoint(tmp_path, 3)
    assert restarts.restart(ActorDiedError()).step == 3
    assert [path.name for path in trainer.loaded] == ["step_000003"]
    trainer.num_deaths = 5
    with pytest.raises(RunFailure) as ended:
        restarts.restart(ActorDiedError())
    assert str(ended.value) == (
        "a process of the run was killed or crashed, after 2 restarts of the trainer without a new checkpoint "
        "(trainer.max_restarts=2)"
    )
    assert restarts.num == 3
    assert "(1 of at most 2 times in a row)" in screen.lines[0] and "after step 3" in screen.lines[3]


def test_what_is_no_death_is_raised_as_it_was(tmp_path: Path) -> None:
    restarts, screen = restarts_of(Dying(), tmp_path)
    with pytest.raises(RuntimeError, match="a check failed"):
        restarts.restart(RuntimeError("a check failed"))
    assert not screen.lines and restarts.num == 0


def test_where_no_trainer_is_started_again_the_run_ends(tmp_path: Path) -> None:
    restarts, _ = restarts_of(Dying(), tmp_path, "trainer.max_restarts=0")
    with pytest.raises(RunFailure, match=r"trainer\.max_restarts=0"):
        restarts.restart(ActorDiedError())
