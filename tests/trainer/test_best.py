"""The best checkpoint is kept and named, also where its figure comes late; a run stops at a metric."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from pydantic import ValidationError

from polyturn.configs.loading.loader import load_config
from polyturn.configs.schema.trainer import KeepBest, StopAt
from polyturn.trainer.run.best import Best, BestCheckpoint, reached, unknown_metrics
from polyturn.trainer.run.directory import RunDirectory, RunState

HELDOUT = KeepBest(metric="heldout/mean")


class Run:
    """Steps that each have a checkpoint, of which the newest two are kept."""

    def __init__(self, path: Path, config: KeepBest | None = HELDOUT) -> None:
        self.directory = RunDirectory(path)
        self.best = BestCheckpoint(config, self.directory.best)

    def save(self, step: int, value: float | None = None) -> None:
        if value is not None:
            self.best.report(step, {"heldout/mean": value})
        self.directory.begin_checkpoint(step).mkdir(parents=True)
        state = RunState(step=step, policy_version=step, prompt_position=step)
        self.directory.commit_checkpoint(state, keep_last=2, kept=self.best.kept())
        self.best.record(self.directory.complete_steps())

    @property
    def steps(self) -> list[int]:
        return self.directory.complete_steps()


def test_the_best_checkpoint_outlives_the_newest_ones(tmp_path: Path) -> None:
    run = Run(tmp_path)
    for step, value in enumerate((0.1, 0.7, 0.3, 0.7, 0.2, 0.6), start=1):
        run.save(step, value)
    assert run.steps == [2, 5, 6]
    assert json.loads((tmp_path / "best.json").read_text()) == {
        "step": 2,
        "metric": "heldout/mean",
        "mode": "max",
        "value": 0.7,
    }
    run.save(7, 0.8)
    run.save(8, 0.1)
    assert run.steps == [7, 8], "the one that was best before goes"


def test_less_may_be_better_and_what_is_no_number_never_is(tmp_path: Path) -> None:
    run = Run(tmp_path, KeepBest(metric="heldout/mean", mode="min"))
    for step, value in enumerate((0.5, 0.2, float("nan"), float("-inf"), 0.3), start=1):
        run.save(step, value)
    assert run.best.best is not None and (run.best.best.step, run.best.best.value) == (2, 0.2)
    assert run.steps == [2, 4, 5]


def test_a_checkpoint_whose_figure_comes_late_is_kept_until_then(tmp_path: Path) -> None:
    run = Run(tmp_path)
    run.save(1, 0.5)
    run.best.expect(2)
    for step in (2, 3, 4, 5):
        run.save(step)
    assert run.steps == [1, 2, 4, 5]
    run.best.report(2, {"heldout/mean": 0.9})
    assert run.best.record(run.steps) == Best(step=2, metric="heldout/mean", mode="max", value=0.9)
    run.best.expect(5)
    run.save(6)
    assert run.steps == [2, 5, 6]
    run.best.give_up(5)
    run.save(7)
    assert run.steps == [2, 6, 7]


def test_the_best_one_is_not_written_down_before_its_checkpoint_is_complete(tmp_path: Path) -> None:
    run = Run(tmp_path)
    run.save(1, 0.5)
    run.best.report(2, {"heldout/mean": 0.9})
    assert run.best.record(run.steps) is None
    assert Run(tmp_path).best.best == Best(step=1, metric="heldout/mean", mode="max", value=0.5)
    assert run.best.kept() == {1, 2}


def test_a_resumed_run_goes_on_with_its_best_one_and_another_metric_begins_anew(tmp_path: Path) -> None:
    first = Run(tmp_path)
    for step, value in ((1, 0.9), (2, 0.1)):
        first.save(step, value)
    second = Run(tmp_path)
    for step, value in ((3, 0.2), (4, 0.3)):
        second.save(step, value)
    assert second.steps == [1, 3, 4]
    assert Run(tmp_path, KeepBest(metric="reward/mean")).best.best is None
    (tmp_path / "best.json").write_text('{"step": "one"}')
    assert Run(tmp_path).best.best is None


def test_without_the_option_nothing_is_kept(tmp_path: Path) -> None:
    run = Run(tmp_path, None)
    run.best.expect(1)
    for step in (1, 2, 3):
        run.save(step, 1.0 / step)
    assert run.steps == [2, 3] and not (tmp_path / "best.json").exists()


def test_a_run_stops_at_its_metric() -> None:
    at_least = StopAt(metric="heldout/mean", at_least=0.9)
    assert reached(at_least, {"heldout/mean": 0.9}) == "heldout/mean is 0.9, at least 0.9 (trainer.stop_at)"
    assert reached(at_least, {"heldout/mean": 0.89}) is None
    assert reached(at_least, {"heldout/mean": float("nan")}) is None
    assert reached(at_least, {"reward/mean": 1.0}) is None
    at_most = StopAt(metric="train/entropy", at_most=0.1)
    assert reached(at_most, {"train/entropy": 0.05}) == "train/entropy is 0.05, at most 0.1 (trainer.stop_at)"
    assert reached(at_most, {"train/entropy": 0.11}) is None
    assert reached(None, {"heldout/mean": 1.0}) is None
    for bounds in ({}, {"at_least": 1.0, "at_most": 0.0}):
        with pytest.raises(ValidationError, match="either at_least or at_most"):
            StopAt(metric="reward/mean", **bounds)


def test_a_metric_that_nothing_makes_is_told_with_what_is_near() -> None:
    stop = "trainer.stop_at={{metric: {}, at_least: 0.9}}"
    for metric in ("reward/mean", "env/num_searches", "heldout/greedy/mean", "engine/0/kv_use"):
        assert unknown_metrics(load_config("quickstart", [stop.format(metric)])) == []
    (told,) = unknown_metrics(load_config("quickstart", [stop.format("succes/mean")]))
    assert told.startswith(
        "trainer.stop_at.metric: 'succes/mean' is no metric of docs/metrics.md; nothing comes"
    )
    assert told.endswith(", did you mean 'success/mean'?")
