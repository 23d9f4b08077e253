"""A training run from start to end: start the parts, train, evaluate, leave everything in the run directory."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

from polyturn.configs.models import resolve_model_path
from polyturn.configs.schema.run import RunConfig
from polyturn.rollout.engines.control import EngineControl
from polyturn.rollout.engines.groups import ServedGroups, with_urls
from polyturn.rollout.engines.launch import Engines
from polyturn.rollout.engines.memory import EngineMemory
from polyturn.rollout.fine_tuning.source import TaughtRows
from polyturn.tools.interruption import InterruptGuard
from polyturn.trainer.ranks.trainer import Trainer
from polyturn.trainer.run.directory import RunDirectory, RunState
from polyturn.trainer.run.evaluation_engines import evaluation_engines
from polyturn.trainer.run.failures import as_run_failure
from polyturn.trainer.run.loop import RunParts
from polyturn.trainer.run.parts import (
    begin_engines,
    begin_groups,
    begin_ray,
    ignoring_dead_actors,
    kept_engines,
    naming_what_ended,
    step_source,
)
from polyturn.trainer.run.preflight import preflight
from polyturn.trainer.run.progress import ProgressDisplay, make_progress
from polyturn.trainer.run.restarts import BEGINNING, newest_state, take_all_steps
from polyturn.trainer.run.resume import identify, with_template_date
from polyturn.trainer.run.stopwatch import Stopwatch
from polyturn.trainer.run.turns import Turns


def train(
    config: RunConfig, *, warnings: Sequence[str] | None = None, rows: TaughtRows | None = None
) -> Path:
    """Train as the config says; the run directory.

    Nothing in a run directory is changed before it is known that the run can begin or go on: until then all that is
    written there is logs.

    Args:
        warnings: of the preflight, where it has been passed; None: it is passed first.
        rows: that it is fine-tuned on, where they have been read; None: they are read if there are any.

    Raises:
        ValueError: the config cannot be run; nothing has been started.
        RunFailure: the run ended before its last step; what is finished is saved.
        Interrupted: Ctrl-C; the finished steps are saved.
    """
    if warnings is None:
        warnings = preflight(config)
    config = with_template_date(config)
    identity = asdict(identify(config))
    directory = RunDirectory.to_resume(config) if config.resume else RunDirectory.create(config)
    progress = make_progress(config.logging.progress, num_steps=config.trainer.num_steps)
    stopwatch = Stopwatch()
    progress.message(f"run directory: {directory.path}")
    for warning in warnings:
        progress.message(f"warning: {warning}")
    try:
        with ExitStack() as stack:
            stack.enter_context(as_run_failure(directory))
            processes = stack.enter_context(_running_stack(config, directory, progress, stopwatch))
            trainer, engines = processes.trainer, processes.engines
            stack.enter_context(naming_what_ended(engines, processes.groups))
            running = with_urls(config, processes.groups.urls)
            # From here on Ctrl-C drains; before, there is nothing to save.
            guard = stack.enter_context(InterruptGuard())
            guard.subscribe(lambda: progress.message("stopping: what is under way is finished and saved"))
            worker = stack.enter_context(step_source(running, engines, rows))
            guard.subscribe(worker.stop)
            evaluation = stack.enter_context(
                evaluation_engines(running, processes.groups.urls, written_to=directory.evaluated.parent)
            )
            if evaluation is not None:
                guard.subscribe(evaluation.stop)
            keeper = stack.enter_context(kept_engines(running, directory, engines, worker, progress.message))
            parts = RunParts(
                config=running,
                directory=directory,
                trainer=trainer,
                keeper=keeper,
                turns=processes.turns,
                worker=worker,
                evaluation=evaluation,
                progress=progress,
                guard=guard,
                stopwatch=stopwatch,
            )

            def connect() -> None:
                if keeper is not None:
                    urls = list(keeper.members.serving.values())
                    trainer.connect(urls, directory.weights, directory.engine_model)

            state = _restore(parts)
            connect()
            # Once the run stands where it goes on from.
            directory.record(config, identity)
            take_all_steps(parts, state, connect)
    finally:
        progress.close()
    return directory.path


def _restore(parts: RunParts) -> RunState:
    """Restore the ranks from the newest sound checkpoint, if the run is to go on; where it stands."""
    if not parts.config.resume:
        return BEGINNING
    state = newest_state(parts)
    if state is None:
        parts.progress.message(
            "no checkpoint was finished: from step 1, with the episodes that were kept of it"
        )
        return BEGINNING
    parts.progress.message(f"resumed after step {state.step}")
    for phase, seconds in state.seconds.items():
        parts.stopwatch.add(phase, seconds)
    return state


@dataclass(frozen=True, kw_only=True, slots=True)
class _Processes:
    """Those of a run, all ready."""

    trainer: Trainer
    engines: Engines | None
    """None where nothing is played."""
    groups: ServedGroups
    turns: Turns | None
    """Where engines and trainer share GPUs, which are the trainer's now."""


@contextmanager
def _running_stack(
    config: RunConfig, directory: RunDirectory, progress: ProgressDisplay, stopwatch: Stopwatch
) -> Iterator[_Processes]:
    """Start Ray, the trainer's ranks, the models beside the policy and, unless the run replays another, its engines;
    end all on the way out."""
    directory.logs.mkdir(exist_ok=True)
    replays = not config.plays
    with ExitStack() as stack, stopwatch.measure("start") as _:
        progress.phase("starting Ray and the trainer's ranks" + ("" if replays else ", and the engines"))
        reservation = begin_ray(stack, config, directory)
        engines = None if replays else begin_engines(stack, config, directory, reservation)
        groups = begin_groups(stack, config, directory, reservation)
        memory: EngineMemory | None = None
        if engines is not None and config.shares_gpus:
            # What they find free of the GPUs decides about their KV: they are first, and give all up again.
            engines.wait_ready()
            controls = [stack.enter_context(EngineControl(url)) for url in engines.engine_urls]
            memory = EngineMemory(
                controls,
                num_sharing=config.engines.num_sharing,
                timeout_s=config.engines.turn_timeout_s,
            )
            memory.release()
        model_path = resolve_model_path(config.model.path)
        trainer = Trainer(config, model_path=model_path, reservation=reservation)
        stack.callback(ignoring_dead_actors(trainer.close))
        trainer.build()
        if engines is not None and memory is None:
            engines.wait_ready()
        groups.wait_ready()
        running = stack.pop_all()
    turns = None if memory is None else Turns(memory, trainer, timeout_s=config.engines.turn_timeout_s)
    with running:
        yield _Processes(trainer=trainer, engines=engines, groups=groups, turns=turns)
