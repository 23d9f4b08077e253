"""The held-out evaluations of a run, before, beside and after its steps, and the checkpoint that they call best."""

from __future__ import annotations

from collections.abc import Mapping
from concurrent.futures import Future
from dataclasses import asdict
from pathlib import Path
from typing import Any

from polyturn.configs.schema.run import RunConfig
from polyturn.rollout.evaluation.held_out import EvaluationResult
from polyturn.rollout.source import StepSource
from polyturn.rollout.suites import Suite, suites_of
from polyturn.rollout.waiting import Meanwhile, awaited, nothing
from polyturn.trainer.run.best import BestCheckpoint
from polyturn.trainer.run.directory import RunDirectory
from polyturn.trainer.run.evaluation_engines import EvaluationEngines
from polyturn.trainer.run.evaluations import Evaluations
from polyturn.trainer.run.progress import ProgressDisplay
from polyturn.trainer.run.stopwatch import Stopwatch

Results = Mapping[str, Mapping[str, Any]]
"""By name of the suite, of which that of the section `evaluation` itself is empty."""


class HeldOut:
    """Plays the evaluations, and tells what came of them."""

    def __init__(
        self,
        config: RunConfig,
        *,
        worker: StepSource | EvaluationEngines,
        directory: RunDirectory,
        progress: ProgressDisplay,
        stopwatch: Stopwatch,
    ) -> None:
        """`worker` plays them: on the run's engines, or on those that are for evaluations alone."""
        self.best = BestCheckpoint(config.checkpoint.keep_best, directory.best)
        self.suites = suites_of(config)
        self.meanwhile: Meanwhile = nothing
        """Done again and again while an evaluation is waited for."""
        self._config = config.evaluation
        self._worker = worker
        self._directory = directory
        self._progress = progress
        self._stopwatch = stopwatch
        self._beside = Evaluations(self.suites, self._play, directory.evaluation / "results.jsonl")

    def play(self, when: str, step: int) -> Results | None:
        """All evaluations `before` or `after` training, as `summary.json` has them; None where one was interrupted."""
        found: dict[str, Mapping[str, Any]] = {}
        for suite in self.suites:
            self._progress.phase(f"{suite.title} evaluation {when} training", total=suite.num_episodes)
            with self._stopwatch.measure("evaluate"):
                playing = self._worker.evaluate(
                    suite,
                    step=step,
                    on_episode=lambda _: self._progress.advance(),
                    trajectories=self._trajectories(suite, when),
                )
                result = awaited(playing, self.meanwhile)
            if result is None:
                return None
            self._progress.message(f"{suite.title} {when} training (step {step}): {result.sentence}")
            found[suite.name] = asdict(result)
        return found

    def begin(self, step: int, *, engine_step: int, version: int) -> None:
        """Begin what is due after a step, by the weights that the engines that play got after `engine_step`."""
        begun = self._beside.begin(step, engine_step=engine_step, version=version)
        if any(self.best.is_by(suite.prefix) for suite in begun):
            self.best.expect(engine_step)

    def is_due(self, step: int) -> bool:
        """Whether any evaluation is to be played after a step."""
        return self._beside.is_due(step)

    def skip(self, step: int) -> None:
        """Count what is due after a step, and is not begun."""
        self._beside.skip(step)

    @property
    def is_playing(self) -> bool:
        """Whether an evaluation is under way."""
        return self._beside.are_under_way

    def wait(self) -> None:
        """Wait for the evaluations that are under way."""
        if self.is_playing:
            self._progress.phase("held-out evaluation during training")
            with self._stopwatch.measure("evaluate"):
                self._beside.wait(self.meanwhile)

    def tell(self, step: int) -> dict[str, float]:
        """Show the evaluations that have ended, once a step is finished; their figures for its row."""
        row = self._beside.figures
        for ended in self._beside.collect(step):
            self.best.report(ended.step, ended.figures)
            row |= ended.figures
            self._progress.message(ended.sentence)
        self.note_best()
        return row

    def note_best(self) -> None:
        """Write down which checkpoint is best, if it is another than it was."""
        found = self.best.record(self._directory.complete_steps())
        if found is not None:
            self._progress.message(
                f"the best checkpoint so far is that of step {found.step} ({found.metric} {found.value:.4g})"
            )

    def summary(self, *, before: Results, after: Results) -> dict[str, Any]:
        """Of the suites and the best checkpoint, for `summary.json`."""
        best = self.best.best
        return {
            "suites": {
                suite.name: {"before": before.get(suite.name), "after": after.get(suite.name)}
                for suite in self.suites
                if suite.name
            },
            "best": None if best is None else asdict(best),
        }

    def _play(self, suite: Suite, step: int) -> Future[EvaluationResult | None]:
        trajectories = self._trajectories(suite, f"step_{step:06d}")
        return self._worker.evaluate(suite, step=step, trajectories=trajectories)

    def _trajectories(self, suite: Suite, when: str) -> Path:
        name = f"{suite.name}_{when}" if suite.name else when
        return self._directory.evaluation / f"{name}.parquet"
