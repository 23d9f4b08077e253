"""Rollout only: the groups of a run's steps are played with the weights as they are, and stored for a run to replay."""

from __future__ import annotations

from contextlib import ExitStack, closing
from dataclasses import asdict
from pathlib import Path

from polyturn.configs.errors import ConfigError, Interrupted, as_config_error
from polyturn.configs.models import resolve_model_path
from polyturn.configs.schema.run import RunConfig
from polyturn.rollout.engines.groups import with_urls
from polyturn.rollout.factory import check_train_split
from polyturn.rollout.filters import make_filter
from polyturn.rollout.groups import journal_of
from polyturn.rollout.order import make_order
from polyturn.rollout.scheduler import Frontier, StepGroups
from polyturn.rollout.source import RolloutStart, StepSource
from polyturn.rollout.store import TrajectoryStore
from polyturn.rollout.waiting import Meanwhile, nothing
from polyturn.tools.interruption import InterruptGuard
from polyturn.trainer.checkpoints.manifest import read_sealed, write_sealed
from polyturn.trainer.run.directory import RunDirectory, RunState
from polyturn.trainer.run.failures import as_run_failure
from polyturn.trainer.run.metrics import episode_metrics
from polyturn.trainer.run.parts import (
    StartingWeights,
    begin_engines,
    begin_groups,
    begin_ray,
    kept_engines,
    naming_what_ended,
    step_source,
)
from polyturn.trainer.run.preflight import check_run_directory, preflight
from polyturn.trainer.run.progress import ProgressDisplay, make_progress
from polyturn.trainer.run.resume import check_resume, identify, with_template_date

VERSION = 0
"""Of the policy: its weights do not change."""


def check_rollout_only(config: RunConfig) -> list[str]:
    """Check all that playing the config's steps needs; warnings. Nothing is started.

    Raises:
        ConfigError: one sentence for the first thing that is wrong.
    """
    for key, given in (
        ("rollout.replay", config.rollout.replay),
        ("checkpoint.load", config.checkpoint.load),
    ):
        if given is not None:
            raise ConfigError(f"{key}: steps are played here, by the weights of model.path; leave it out")
    model = resolve_model_path(config.model.path)
    warnings = preflight(config, evaluated=model, splits=(config.environment.train_split,))
    with as_config_error():
        check_train_split(config)
        make_order(config.rollout)
        make_filter(config.rollout.filter)
    check_run_directory(config)
    if config.resume:
        with as_config_error():
            directory = RunDirectory.to_resume(config)
            check_resume(config, directory, warnings.append)
        if directory.checkpoints.exists():
            raise ConfigError(
                f"resume: {directory.path} is of a training run, which `polyturn train` goes on with"
            )
    return warnings


def roll_out(config: RunConfig) -> Path:
    """Play the groups of `trainer.num_steps` steps by the weights of `model.path`; the run directory.

    It has `config.yaml`, `identity.json` and `trajectories/`, for `rollout.replay`. With `resume` it goes on behind the
    steps that are stored.

    Raises:
        RunFailure: it ended before the last step; what is stored is kept.
        Interrupted: Ctrl-C; the same.
    """
    config = with_template_date(config)
    identity = asdict(identify(config))
    directory = RunDirectory.to_resume(config) if config.resume else RunDirectory.create(config)
    progress = make_progress(config.logging.progress, num_steps=config.trainer.num_steps)
    progress.message(f"run directory: {directory.path}")
    try:
        with ExitStack() as stack:
            stack.enter_context(as_run_failure(directory))
            directory.logs.mkdir(exist_ok=True)
            progress.phase("starting Ray and the engines")
            # Nothing is evaluated.
            evaluation = config.evaluation.model_copy(update={"engines": None})
            playing = config.model_copy(update={"evaluation": evaluation})
            reservation = begin_ray(stack, playing, directory, trains=False)
            engines = begin_engines(stack, playing, directory, reservation)
            groups = begin_groups(stack, playing, directory, reservation)
            engines.wait_ready()
            groups.wait_ready()
            stack.enter_context(naming_what_ended(engines, groups))
            guard = stack.enter_context(InterruptGuard())
            source = stack.enter_context(step_source(with_urls(config, groups.urls), engines))
            guard.subscribe(source.stop)
            keeper = stack.enter_context(kept_engines(config, directory, engines, source, progress.message))
            assert keeper is not None, "there are engines"
            keeper.begin(StartingWeights())
            directory.record(config, identity)
            play_steps(config, directory, source, progress, guard, check_engines=keeper.check)
    finally:
        progress.close()
    return directory.path


def play_steps(
    config: RunConfig,
    directory: RunDirectory,
    source: StepSource,
    progress: ProgressDisplay,
    guard: InterruptGuard,
    *,
    check_engines: Meanwhile = nothing,
) -> None:
    """Store one step after the other, from where the directory stands to the last one.

    Args:
        check_engines: called again and again; what it raises ends the run.

    Raises:
        Interrupted: the guard asked to stop; the steps so far are stored, and the episodes of the one under way kept.
    """
    num_steps, per_step = config.trainer.num_steps, config.rollout.prompts_per_step
    state = _standing(directory)
    with closing(TrajectoryStore(directory.path)) as store:
        source.begin(
            RolloutStart(
                step=state.step,
                version=VERSION,
                frontier=Frontier(position=state.prompt_position, ahead=state.prompts_ahead),
                curriculum=state.curriculum,
            ),
            store,
        )
        for step in range(state.step + 1, num_steps + 1):
            progress.phase(f"step {step}: episodes", total=per_step * config.rollout.samples_per_prompt)
            taken = None
            if not guard.requested:
                taken = source.take(on_episode=lambda _: progress.advance(), meanwhile=check_engines)
            if taken is None:
                source.drain()
                raise Interrupted(directory.path, step - 1)
            store.write_step(step, [episode for group in taken.groups for episode in group.episodes])
            source.advance(version=VERSION, engine_step=step, engine_version=VERSION)
            standing = source.standing()
            state = RunState(
                step=step,
                policy_version=VERSION,
                prompt_position=standing.frontier.position,
                prompts_ahead=standing.frontier.ahead,
                curriculum=standing.curriculum,
            )
            write_sealed(directory.rollout, asdict(state))
            store.forget(journal_of(state.prompt_position, prompts_per_step=per_step) - 1)
            progress.message(f"step {step:>3}/{num_steps}  {_told(taken)}")


def _standing(directory: RunDirectory) -> RunState:
    """The steps that are stored, and where rollout stood behind them."""
    if not directory.rollout.exists():
        return RunState(step=0, policy_version=VERSION, prompt_position=0)
    return RunState(**read_sealed(directory.rollout))


def _told(taken: StepGroups) -> str:
    episodes = [episode for group in taken.groups for episode in group.episodes]
    if not episodes:
        return "nothing to train on"
    figures = episode_metrics(episodes)
    return (
        f"{len(taken.groups)} groups of {len(episodes)} episodes  reward {figures['reward/mean']:.3f}  success "
        f"{figures['success/mean']:.3f}  turns {figures['episode/turns']:.2f}"
    )
