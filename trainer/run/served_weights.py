"""The engines of the policy as the loop sees them: what weights they serve, when they rest or get new ones."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from functools import partial

from polyturn.configs.schema.run import RunConfig
from polyturn.rollout.engines.control import EngineControl, PauseMode
from polyturn.rollout.source import StepSource
from polyturn.trainer.ranks.trainer import Trainer
from polyturn.trainer.run.checks import RunChecks
from polyturn.trainer.run.heldout import HeldOut
from polyturn.trainer.run.progress import ProgressDisplay
from polyturn.trainer.run.stopwatch import Stopwatch
from polyturn.trainer.run.turns import Turns
from polyturn.trainer.weight_sync import SyncReport

MIN_CORRELATION = 0.9
"""Between what LoRA's adapters add and what of it the engines get, below which a run says so."""


class ServedWeights:
    """Takes the trainer's weights to the engines of a run."""

    def __init__(
        self,
        config: RunConfig,
        *,
        engines: Sequence[EngineControl],
        turns: Turns | None,
        trainer: Trainer,
        worker: StepSource,
        heldout: HeldOut,
        checks: RunChecks,
        progress: ProgressDisplay,
        step: int,
        version: int,
    ) -> None:
        """
        Args:
            engines: there may be none.
            turns: where they share the trainer's GPUs.
            step: at which the run goes on, as `version`.
        """
        self._config = config
        self._trainer = trainer
        self._worker = worker
        self._heldout = heldout
        self._checks = checks
        self._progress = progress
        self._engines = engines
        self._turns = turns
        self._warned_of_rounding = False
        self.step = step
        """After which the engines got their weights."""
        self.version = version
        """Of these."""
        self.are_whole = True
        """Whether the engines serve one version's weights, and not a part of the next one's, too."""

    def begin(self, watch: Stopwatch) -> None:
        """Send the weights at which the run goes on: the engines have those on disk, or those of a trainer that died,
        perhaps while it sent some."""
        if not self._engines:
            return
        if self._turns is None:
            for engine in self._engines:
                engine.give_up_weight_update()
        self._sync(self.version, watch)
        for engine in self._engines:
            engine.go_on()

    def sync_if_due(self, step: int, version: int, watch: Stopwatch) -> SyncReport | None:
        """Send the weights after every so many steps, and after the last; None: not after this one, or to nobody."""
        is_due = step % self._config.weight_sync.every_steps == 0 or step == self._config.trainer.num_steps
        if not is_due or not self._engines:
            return None
        if self._config.evaluation.training_waits == "before_sync":
            self._heldout.wait()
        report = self._sync(version, watch)
        self.step, self.version = step, version
        return report

    @contextmanager
    def resting(self, watch: Stopwatch) -> Iterator[None]:
        """Have the engines rest, if they are to while the trainer trains: answers are cut off, and go on afterwards, by
        the new weights where those are due.
        """
        if self._turns is None and self._config.rollout.play_while_training:
            yield
            return
        self._worker.rest()
        try:
            if self._turns is not None:
                self._turns.to_trainer(watch)
                yield
                return
            with self._paused("abort"):
                yield
        finally:
            self._worker.go_on()

    @contextmanager
    def trainer_at_work(self, watch: Stopwatch) -> Iterator[None]:
        """Have the trainer's state on its devices, for what is not part of a step: nothing is played meanwhile."""
        if self._turns is None or not self._turns.are_engines_on:
            yield
            return
        self._worker.rest()
        try:
            self._turns.to_trainer(watch)
            yield
        finally:
            self._worker.go_on()

    def engines_at_work(self, watch: Stopwatch) -> None:
        """Have the engines answer, by the weights that they got last; from the trainer, if it has had their GPUs."""
        if self._turns is not None and not self._turns.are_engines_on:
            self._sync(self.version, watch)

    @property
    def can_answer(self) -> bool:
        """Whether what is under way can end."""
        return self.are_whole and (self._turns is None or self._turns.are_engines_on)

    @property
    def figures(self) -> dict[str, float]:
        """Metrics of the turns, where there are any."""
        return {} if self._turns is None else {"turns/offloaded_bytes": float(self._turns.offloaded_bytes)}

    @contextmanager
    def _paused(self, mode: PauseMode) -> Iterator[None]:
        """No engine goes on with a request meanwhile."""
        for engine in self._engines:
            engine.pause(mode)
        try:
            yield
        finally:
            # What was drawn from half an update would be of no policy.
            for engine in self._engines if self.are_whole else ():
                engine.go_on()

    def _sync(self, version: int, watch: Stopwatch) -> SyncReport:
        """Send the weights to the engines and compare them on both sides, while no request goes on."""
        mode: PauseMode = "retract" if self._config.rollout.kv_after_update == "recompute" else "in_place"
        with ExitStack() as stack:
            rollout = self._config.rollout
            if self._turns is not None:
                late = self._config.weight_sync.gathers_in_activate
                prepare = partial(self._trainer.prepare_weights, version)
                stack.enter_context(self._turns.to_engines(watch, prepare=prepare, sends_late=late))
                started = time.perf_counter()
            else:
                with watch.measure("sync"):
                    self._trainer.prepare_weights(version)
                started = time.perf_counter()
                if (rollout.max_staleness and rollout.play_while_training) or self._heldout.is_playing:
                    stack.enter_context(self._paused(mode))
            with watch.measure("sync"):
                self.are_whole = False
                report = self._trainer.activate_weights()
                self.are_whole = True
                if self._config.checks.compares_weights:
                    for engine in self._engines:
                        self._checks.weights_equal(
                            report.checksums, engine.weight_checksums(), version=version, url=engine.url
                        )
        self._warn_of_rounding(report.adapter_correlation)
        return replace(report, pause_seconds=time.perf_counter() - started)

    def _warn_of_rounding(self, arrived: float | None) -> None:
        """Once a run: that engines get little of what adapters have learnt."""
        if arrived is None or arrived >= MIN_CORRELATION or self._warned_of_rounding:
            return
        self._warned_of_rounding = True
        self._progress.message(
            f"what the adapters have learnt reaches the engines at a correlation of {arrived:.2f}: they serve the "
            f"merged weights rounded to {self._config.model.dtype}, and the update is smaller than its steps. It "
            "arrives as updates add up; a larger trainer.optimizer.learning_rate (LoRA takes ten times that of "
            "full training) or model.dtype=float32 brings it there sooner (sync/adapter_correlation in the metrics)"
        )
