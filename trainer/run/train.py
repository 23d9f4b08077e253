"""A training run from start to end: start the parts, train, evaluate, leave everything in the run directory."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import ray

from polyturn.configs.errors import Interrupted
from polyturn.configs.models import resolve_model_path
from polyturn.configs.schema.run import RunConfig
from polyturn.rollout.engines.launch import Engines
from polyturn.rollout.engines.ray_launcher import RayLauncher
from polyturn.rollout.engines.server import EngineSpec
from polyturn.rollout.evaluation import EvaluationResult
from polyturn.trainer.checkpoints.manifest import CheckpointError
from polyturn.trainer.player import RolloutPlayer
from polyturn.trainer.ranks.trainer import Trainer
from polyturn.trainer.run.cluster import start_ray
from polyturn.trainer.run.directory import RunDirectory, RunState, write_json
from polyturn.trainer.run.failures import InterruptGuard, as_run_failure, sentence_of
from polyturn.trainer.run.loop import Stopwatch, TrainingLoop
from polyturn.trainer.run.preflight import preflight
from polyturn.trainer.run.progress import (
    JsonLinesSink,
    MetricSink,
    ProgressDisplay,
    TensorBoardSink,
    make_progress,
)
from polyturn.trainer.run.ray_reaper import start_reaper
from polyturn.trainer.run.resume import as_json, identify, installed_versions

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True, slots=True)
class Stack:
    """The parts of a run that are processes."""

    trainer: Trainer
    engines: Engines


def train(config: RunConfig, *, warnings: Sequence[str] | None = None) -> Path:
    """Train as the config says; the run directory.

    Nothing in a run directory is changed before it is known that the run can begin or go on: until then all that is
    written there is logs.

    Args:
        warnings: of the preflight, where it has been passed; None: it is passed first.

    Raises:
        ValueError: the config cannot be run; nothing has been started.
        RunFailure: the run ended before its last step; what is finished is saved.
        Interrupted: Ctrl-C; the finished steps are saved.
    """
    if warnings is None:
        warnings = preflight(config)
    identity = as_json(identify(config))
    directory = RunDirectory.to_resume(config) if config.resume else RunDirectory.create(config)
    progress = make_progress(config.logging.progress, num_steps=config.trainer.num_steps)
    stopwatch = Stopwatch()
    started = time.perf_counter()
    progress.message(f"run directory: {directory.path}")
    for warning in warnings:
        progress.message(f"warning: {warning}")
    try:
        with ExitStack() as stack:
            stack.enter_context(as_run_failure(directory))
            parts = stack.enter_context(_running_stack(config, directory, progress, stopwatch))
            # From here on Ctrl-C drains; before, there is nothing to save.
            guard = stack.enter_context(InterruptGuard())
            guard.subscribe(lambda: progress.message("stopping: what is under way is finished and saved"))
            player = stack.enter_context(
                RolloutPlayer(
                    config,
                    model_path=resolve_model_path(config.model.path),
                    url=parts.engines.engine_urls if config.engines.routing_replay else parts.engines.url,
                    guard=guard,
                )
            )
            run = _Run(config, directory, parts, player, progress, guard, stopwatch, started)
            run.execute(identity)
    finally:
        progress.close()
    return directory.path


class _Run:
    """What happens once everything is up."""

    def __init__(
        self,
        config: RunConfig,
        directory: RunDirectory,
        parts: Stack,
        player: RolloutPlayer,
        progress: ProgressDisplay,
        guard: InterruptGuard,
        stopwatch: Stopwatch,
        started: float,
    ) -> None:
        self._config = config
        self._directory = directory
        self._parts = parts
        self._player = player
        self._progress = progress
        self._guard = guard
        self._stopwatch = stopwatch
        self._started = started
        self._earlier_seconds = 0.0

    def execute(self, identity: Mapping[str, Any]) -> None:
        """Evaluate, train, evaluate, save. Raises `Interrupted` when asked to stop.

        `identity` is kept in the run directory, once the run stands where it goes on from.
        """
        trainer = self._parts.trainer
        state = self._resume(trainer)
        trainer.connect(
            self._parts.engines.engine_urls, self._directory.weights, self._directory.engine_model
        )
        self._directory.record(self._config, identity)
        sinks: list[MetricSink] = [JsonLinesSink(self._directory.metrics, last_step=state.step)]
        if self._config.logging.tensorboard:
            sinks.append(TensorBoardSink(self._directory.tensorboard, last_step=state.step))
        loop = TrainingLoop(
            self._config,
            directory=self._directory,
            trainer=trainer,
            engine_urls=self._parts.engines.engine_urls,
            player=self._player,
            sinks=sinks,
            progress=self._progress,
            guard=self._guard,
            state=state,
            stopwatch=self._stopwatch,
            evaluate=self._evaluate,
        )
        try:
            # The engines began with the weights on disk, or with those of a run that died.
            loop.sync(state.policy_version, self._stopwatch)
            if self._config.evaluation.before and loop.state.heldout_before is None:
                before = self._evaluate("before", loop.state.step)
                if before is not None:
                    loop.state = replace(loop.state, heldout_before=before)
                    loop.save()
            try:
                loop.run()
            finally:
                # Whatever ended the steps, what they saved is to be complete.
                loop.complete_checkpoint(wait=True)
            self._stop_if_asked(loop)
            after = self._evaluate("after", loop.state.step) if self._config.evaluation.after else None
            trainer.save_hf(self._directory.policy)
            self._summarise("finished", loop, after)
            self._stop_if_asked(loop)
        finally:
            loop.close()
            for sink in sinks:
                sink.close()

    def _resume(self, trainer: Trainer) -> RunState:
        """Restore the ranks from the newest sound checkpoint, if the run is to go on; where it stands."""
        found = None
        if self._config.resume:
            try:
                found = self._directory.sound_checkpoint(trainer.find_checkpoint_faults, self._warn)
            except ValueError as error:
                raise CheckpointError(str(error)) from error
        if found is None:
            if self._config.resume:
                self._progress.message(
                    "no checkpoint was finished: from step 1, with the episodes that were kept of it"
                )
            return RunState(step=0, policy_version=0, prompt_position=0)
        checkpoint, state = found
        trainer.load_checkpoint(checkpoint)
        self._progress.message(f"resumed after step {state.step}")
        for phase, seconds in state.seconds.items():
            self._stopwatch.add(phase, seconds)
        self._earlier_seconds = state.seconds.get("total", 0.0)
        return state

    def _warn(self, text: str) -> None:
        self._progress.message(f"warning: {text}")

    def _stop_if_asked(self, loop: TrainingLoop) -> None:
        if self._guard.requested:
            self._summarise("interrupted", loop, None)
            raise Interrupted(self._directory.path, loop.state.step)

    def _evaluate(self, when: str, step: int) -> Mapping[str, Any] | None:
        """The held-out evaluation, as `summary.json` has it; None when it was interrupted.

        Its trajectories go to a file named after `when`: `before`, `after`, or the step.
        """
        config = self._config.evaluation
        moment = f"{when} training" if when in ("before", "after") else "during training"
        self._progress.phase(
            f"held-out evaluation {moment}", total=config.num_tasks * config.samples_per_task
        )
        with self._stopwatch.measure("evaluate"):
            result = self._player.evaluate(
                step=step,
                on_episode=lambda _: self._progress.advance(),
                trajectories=self._directory.evaluation / f"{when}.parquet",
            )
        if result is None:
            return None
        self._progress.message(describe(result, moment, step))
        return asdict(result)

    def _summarise(self, status: str, loop: TrainingLoop, after: Mapping[str, Any] | None) -> None:
        total = self._earlier_seconds + time.perf_counter() - self._started
        summary = {
            "status": status,
            "name": self._config.name,
            "seed": self._config.seed,
            "steps": loop.state.step,
            "policy_version": loop.state.policy_version,
            "heldout": {"before": loop.state.heldout_before, "after": after},
            "seconds": {**self._stopwatch.seconds, "total": total},
            "checks": dict(loop.maxima),
            "versions": installed_versions(),
        }
        write_json(self._directory.summary, summary)


@contextmanager
def _running_stack(
    config: RunConfig, directory: RunDirectory, progress: ProgressDisplay, stopwatch: Stopwatch
) -> Iterator[Stack]:
    """Start Ray, the trainer's ranks, the engines and the router; end them all on the way out."""
    model_path = resolve_model_path(config.model.path)
    directory.logs.mkdir(exist_ok=True)
    with ExitStack() as stack, stopwatch.measure("start") as _:
        progress.phase("starting Ray, the trainer's ranks and the engines")
        start_ray(config)
        if config.cluster.address is None:
            stack.callback(start_reaper(directory.logs / "reaper.log").stop)
        stack.callback(ray.shutdown)
        served = model_path if config.weight_sync.dtype == "same" else _fp8_model(model_path, directory)
        spec = EngineSpec.from_config(config, model_path=served, log_directory=directory.logs)
        engines = Engines(spec, RayLauncher(spec))
        stack.callback(engines.stop)
        engines.start()
        trainer = Trainer(config, model_path=model_path)
        stack.callback(_ignoring_dead_actors(trainer.close))
        trainer.build()
        engines.wait_ready()
        running = stack.pop_all()
    with running:
        yield Stack(trainer=trainer, engines=engines)


def _fp8_model(model_path: Path, directory: RunDirectory) -> Path:
    """The model as engines must be started to take FP8 weights; made once a run."""
    from polyturn.trainer.models.hf_directory import FP8Cast

    if not directory.engine_model.exists():
        FP8Cast(model_path).write(directory.engine_model)
    return directory.engine_model


def _ignoring_dead_actors(close: Callable[[], None]) -> Callable[[], None]:
    """On the way out an actor may have died already: that must not hide why."""

    def attempt() -> None:
        try:
            close()
        except (ray.exceptions.RayError, RuntimeError) as fault:
            logger.info("closing: %s", sentence_of(fault))

    return attempt


def describe(result: EvaluationResult, moment: str, step: int) -> str:
    """One line about an evaluation."""
    return (
        f"held-out {moment} (step {step}): {result.mean:.3f} "
        f"[{result.low:.3f}, {result.high:.3f}] on {result.num_tasks} tasks"
    )
