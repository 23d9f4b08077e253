"""The engines of the policy as the loop sees them: what weights they serve, when they rest or get new ones.

Engines come and go meanwhile. One that came takes the weights of the others before it is asked: from a directory that
has them at once, else from the trainer as soon as that has nothing else to do, or with the next version.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from functools import partial

from polyturn.agents.sglang_policy import UNVERSIONED
from polyturn.configs.schema.run import RunConfig
from polyturn.rollout.engines.control import EngineControl, PauseMode
from polyturn.rollout.engines.keeper import EngineKeeper
from polyturn.rollout.engines.process import EngineError
from polyturn.rollout.source import StepSource
from polyturn.trainer.ranks.trainer import Trainer
from polyturn.trainer.run.checks import RunChecks
from polyturn.trainer.run.heldout import HeldOut
from polyturn.trainer.run.progress import ProgressDisplay
from polyturn.trainer.run.stopwatch import Stopwatch
from polyturn.trainer.run.turns import Turns
from polyturn.trainer.weight_sync import SyncReport, WeightSyncError
from polyturn.trainer.weight_sync.barrier import frozen
from polyturn.trainer.weight_sync.engine_calls import LONGEST_SUM_S, EngineCalls

MIN_CORRELATION = 0.9
"""Between what LoRA's adapters add and what of it the engines get, below which a run says so."""


class ServedWeights:
    """Takes the trainer's weights to the engines of a run.

    Its methods are for the run's own thread, but for `bring`.
    """

    def __init__(
        self,
        config: RunConfig,
        *,
        keeper: EngineKeeper | None,
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
            keeper: of the engines; None: there are none.
            turns: where they share the trainer's GPUs.
            step: at which the run goes on, as `version`.
        """
        self._config = config
        self._trainer = trainer
        self._worker = worker
        self._heldout = heldout
        self._checks = checks
        self._progress = progress
        self._keeper = keeper
        self._turns = turns
        self._updates_elsewhere = config.engines.updates == "external"
        self._controls: dict[str, EngineControl] = {}
        self._connected: list[str] | None = None
        """Where the trainer publishes to; None: as `Trainer.connect` was told."""
        self._trained = version
        """The version that the trainer has."""
        self._report: SyncReport | None = None
        """Of the weights that the engines serve; None: none was told to take them."""
        self._lacking: set[tuple[str, int]] = set()
        """Engines that do not have a version, which only the trainer can bring them."""
        self._lock = threading.RLock()
        """Held while weights are published, and while an engine is admitted with those that the others serve."""
        self._bringing = threading.Lock()
        """Held by whoever sends weights to engines that wait for some: one of the two threads at a time."""
        self._warned_of_rounding = False
        self.step = step
        """After which the engines got their weights."""
        self.version = version
        """Of these."""
        self.are_whole = True
        """Whether the engines serve one version's weights, and not a part of the next one's, too."""

    def begin(self, watch: Stopwatch) -> None:
        """Look after the engines, and send the weights at which the run goes on: they have those on disk, or those of a
        trainer that died, perhaps while it sent some."""
        if self._keeper is None:
            return
        if self._turns is None and not self._updates_elsewhere:
            self._on_each(lambda engine: engine.give_up_weight_update())
        self._keeper.begin(self)
        self._sync(self.version, watch)
        self._on_each(lambda engine: engine.go_on())

    def sync_if_due(self, step: int, version: int, watch: Stopwatch) -> SyncReport | None:
        """Send the weights after every so many steps, and after the last; None: not after this one, or to nobody."""
        is_due = step % self._config.weight_sync.every_steps == 0 or step == self._config.trainer.num_steps
        self._trained = version
        if not is_due or self._keeper is None:
            return None
        if self._config.evaluation.waits == "before_sync":
            self._heldout.wait()
        report = self._sync(version, watch)
        self.step = step
        return report

    def tend(self) -> None:
        """At a moment when the trainer has nothing to do: bring weights to engines that wait for its own.

        Raises:
            EngineError: the engines cannot be kept going.
        """
        if self._keeper is None:
            return
        self._keeper.check()
        waiting = self._keeper.behind
        is_on_disk = self._report is not None and self._report.directory is not None
        if not waiting or is_on_disk or self._updates_elsewhere or self._trained != self.version:
            return
        if not self._bringing.acquire(blocking=False):
            return
        try:
            with self._lock:
                self._publish(waiting, self.version, Stopwatch(), mode=None)
        finally:
            self._bringing.release()
            self.are_whole = True  # of those that serve

    def bring(self, url: str, admit: Callable[[int], None]) -> bool:
        """See `Weights`. Called by the threads that look after the engines."""
        if not self._bringing.acquire(blocking=False):
            return False
        try:
            return self._bring(url, admit)
        finally:
            self._bringing.release()

    def _bring(self, url: str, admit: Callable[[int], None]) -> bool:
        report = self._report
        if report is None or (url, report.version) in self._lacking:
            return False
        with EngineControl(url) as engine:
            if report.directory is not None and not self._updates_elsewhere:
                try:
                    engine.update_weights_from_disk(
                        model_path=str(report.directory), weight_version=report.version
                    )
                except EngineError:
                    if self._report is report:
                        raise
                    return False  # the directory has given way to the next version's
            if not self._lock.acquire(blocking=False):
                return False
            try:
                if self._report is not report:
                    return False
                if self._has(engine, report):
                    admit(report.version)
                    return True
            finally:
                self._lock.release()
        if self._updates_elsewhere:
            return False
        if report.directory is not None:
            raise EngineError(
                f"{url} has loaded {report.directory}, and has not the weights that were written"
            )
        self._lacking.add((url, report.version))
        return False

    def serves(self, url: str) -> bool:
        """See `Weights`."""
        with EngineControl(url) as engine:
            return _version_of(engine) == self.version

    def _has(self, engine: EngineControl, report: SyncReport) -> bool:
        """Whether an engine serves the weights of a version, which others took."""
        if _version_of(engine) != report.version:
            return False
        if not self._config.checks.compares_weights:
            # Without checksums it is known of what was loaded from the version's own directory alone.
            return report.directory is not None
        return engine.weight_checksums() == dict(report.checksums)

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
                self._progress.phase("the GPUs go to the trainer")
                self._turns.to_trainer(watch)
                yield
                return
            with self._held():
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
    def _plays_evaluations(self) -> bool:
        """Whether one is under way on the engines that are to get weights."""
        return self._heldout.is_playing and self._config.evaluation.engines is None

    @property
    def figures(self) -> dict[str, float]:
        """Metrics of the turns, where there are any."""
        return {} if self._turns is None else {"turns/offloaded_bytes": float(self._turns.offloaded_bytes)}

    @contextmanager
    def _held(self) -> Iterator[None]:
        """Engines answer what they have, and nothing goes on meanwhile. One that is not there any more has nothing to
        go on with."""
        self._on_each(lambda engine: engine.pause("abort"))
        try:
            yield
        finally:
            # What was drawn from half an update would be of no policy.
            if self.are_whole:
                self._on_each(lambda engine: engine.go_on())

    @contextmanager
    def _paused(self, mode: PauseMode) -> Iterator[None]:
        """The barrier of an update. Raises `WeightSyncError`, which names the engines that do not stop or go on."""
        assert self._keeper is not None, "there are engines"
        urls = list(self._keeper.members.serving.values())
        with (
            EngineCalls(urls, timeout_s=self._config.weight_sync.pause_timeout_s) as engines,
            # What was drawn from half an update would be of no policy.
            frozen(engines, mode, may_go_on=lambda: self.are_whole),
        ):
            yield

    def _on_each(self, call: Callable[[EngineControl], None]) -> None:
        """Call every engine that serves; those that do not answer are lost. Raises `EngineError` for a refusal."""
        if self._keeper is None:
            return
        for url in self._keeper.members.serving.values():
            try:
                call(self._control(url))
            except EngineError:
                self._keeper.examine()
                if url in self._keeper.members.serving.values():
                    raise

    def _sync(self, version: int, watch: Stopwatch) -> SyncReport | None:
        """Send the weights to the engines that there are, also to those that wait for some; None: there are none."""
        assert self._keeper is not None, "there are engines"
        rollout = self._config.rollout
        mode: PauseMode | None = "retract" if rollout.kv_after_update == "recompute" else "in_place"
        is_playing = (rollout.max_staleness and rollout.play_while_training) or self._plays_evaluations
        if not is_playing or not self._config.weight_sync.needs_pause:
            mode = None
        with self._lock:
            self.version, self._report = version, None
            self._lacking.clear()
            if self._updates_elsewhere:
                self._keeper.fall_behind()
                self._publish({}, version, watch, mode=None)
                return self._report
            # One that is loading the version before from a disk will load this one next.
            takes_all = self._bringing.acquire(blocking=False)
            try:
                while targets := {
                    **self._keeper.members.serving,
                    **(self._keeper.behind if takes_all else {}),
                }:
                    if self._publish(targets, version, watch, mode=mode):
                        break
            finally:
                if takes_all:
                    self._bringing.release()
            # Of those that are left, if any is.
            self.are_whole = True
        self._keeper.check()
        if self._report is not None:
            self._warn_of_rounding(self._report.adapter_correlation)
        return self._report

    def _publish(
        self, targets: Mapping[int, str], version: int, watch: Stopwatch, *, mode: PauseMode | None
    ) -> bool:
        """Send the weights to some engines, and compare them on both sides; False: some of them are lost.

        Args:
            mode: how requests are held up that are under way; None: there are none.

        Raises what the trainer raises where no engine is to blame.
        """
        assert self._keeper is not None, "there are engines"
        urls = list(targets.values())
        try:
            if self._connected != urls:
                if any(number in targets for number in self._keeper.examine()):
                    return False  # the others would wait for it to join them
                self._connected = None
                with self._keeper.quiet():
                    self._trainer.set_engines(urls)
                self._connected = urls
            report = self._send(urls, version, watch, mode=mode)
        except (EngineError, WeightSyncError) as fault:
            if self._turns is not None:
                raise  # whoever shares GPUs is not replaced
            self._connected = None
            self._blame(targets, fault)
            return False
        self._report = report
        for number in targets:
            self._keeper.admit(number, version)
        return True

    def _send(self, urls: list[str], version: int, watch: Stopwatch, *, mode: PauseMode | None) -> SyncReport:
        assert self._keeper is not None, "there are engines"
        with ExitStack() as stack:
            if self._turns is not None:
                stack.enter_context(self._keeper.quiet())
                self._progress.phase("the GPUs go to the engines")
                late = self._config.weight_sync.gathers_in_activate
                prepare = partial(self._trainer.prepare_weights, version)
                stack.enter_context(self._turns.to_engines(watch, prepare=prepare, sends_late=late))
                started = time.perf_counter()
            else:
                with watch.measure("sync"):
                    self._trainer.prepare_weights(version)
                started = time.perf_counter()
                if mode is not None:
                    # An engine that hangs is noticed and ended while the others wait for it.
                    stack.enter_context(self._paused(mode))
            stack.enter_context(self._keeper.quiet())
            with watch.measure("sync"):
                self.are_whole = False
                report = self._trainer.activate_weights()
                self.are_whole = True
                if self._config.checks.compares_weights:
                    self._compare(urls, report)
        if not self._config.weight_sync.needs_pause:
            return report
        return replace(report, pause_seconds=time.perf_counter() - started)

    def _compare(self, urls: list[str], report: SyncReport) -> None:
        """The checksums of all engines, at once, with the trainer's."""
        found = report.served
        if not found:
            with EngineCalls(urls, timeout_s=LONGEST_SUM_S) as engines:
                found = engines.sums(engines.start_sums())
        for url, checksums in found.items():
            self._checks.weights_equal(report.checksums, checksums, version=report.version, url=url)

    def _blame(self, targets: Mapping[int, str], fault: EngineError | WeightSyncError) -> None:
        """Take out the engines that did not take an update: those that do not answer, else those that are named,
        unless that is all of them. Raises the fault where it is none of theirs."""
        assert self._keeper is not None, "there are engines"
        lost = [number for number in self._keeper.examine() if number in targets]
        if lost:
            return
        named = fault.failures if isinstance(fault, WeightSyncError) else {}
        blamed = [number for number, url in targets.items() if url in named]
        serving = self._keeper.members.serving
        if not blamed or (len(blamed) == len(targets) and any(number in serving for number in blamed)):
            raise fault
        for number in blamed:
            self._keeper.reject(number, named[targets[number]])

    def _control(self, url: str) -> EngineControl:
        if url not in self._controls:
            self._controls[url] = EngineControl(url)
        return self._controls[url]

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

    def close(self) -> None:
        """Close the connections; the engines go on serving."""
        for engine in self._controls.values():
            engine.close()


def _version_of(engine: EngineControl) -> int | None:
    """Which version an engine says that it serves; None: none of ours."""
    said = engine.weight_version()
    if said == UNVERSIONED:
        return 0
    return int(said) if said.isdecimal() else None
