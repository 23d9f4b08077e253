"""What must hold for a run that replays another: the stored steps are there, and were played for a run like it."""

from __future__ import annotations

from collections.abc import Callable

from polyturn.configs.errors import ConfigError
from polyturn.configs.schema.run import RunConfig
from polyturn.rollout.store import TrajectoryStore, check_format
from polyturn.trainer.run.directory import RunDirectory
from polyturn.trainer.run.resume import Differences, compare, identify, with_template_date

KEY = "rollout.replay"
BEGINS_WITH = ("load", "load_optimizer")
"""Options of the section `checkpoint` that say which weights a run begins with."""


def check_replay(config: RunConfig, warn: Callable[[str], None]) -> None:
    """Whether the config can be trained on what `rollout.replay` names, which it does.

    Args:
        warn: is told of what makes it learn other weights than the run that is replayed.

    Raises:
        ConfigError: steps are missing or in a format that is not read, they are of another model, tokenizer, tasks or
            batch shape, or something is asked for that needs engines.
    """
    source = config.rollout.replay
    assert source is not None
    _refuse_what_needs_engines(config)
    directory, store = RunDirectory(source), TrajectoryStore(source)
    if not directory.config.exists():
        raise ConfigError(f"{KEY}: {source} is no run directory: it has no {directory.config.name}")
    if config.run_dir is not None and config.run_dir.resolve() == source.resolve():
        raise ConfigError(
            f"{KEY}: {source} is also run_dir; a replay is a run of its own, in a directory of its own"
        )
    steps = set(store.steps())
    missing = [step for step in range(1, config.trainer.num_steps + 1) if step not in steps]
    if missing:
        raise ConfigError(
            f"{KEY}: {source} has {len(steps)} steps, and trainer.num_steps is {config.trainer.num_steps}: the first "
            f"that is missing is step {missing[0]}"
        )
    try:
        for step in range(1, config.trainer.num_steps + 1):
            check_format(store.path(step))
        recorded = directory.recorded()
        config = with_template_date(config)
        differences = compare(recorded, identify(config), config)
    except ValueError as error:
        raise ConfigError(f"{KEY}: {error}") from error
    if differences.refused:
        raise ConfigError(
            f"{KEY}: what {source} holds was not played for this config: {'; '.join(differences.refused)}. Take that "
            "back, or replay another run"
        )
    for sentence in _other_weights(recorded, differences, config):
        warn(f"{KEY}: {sentence}")


def _refuse_what_needs_engines(config: RunConfig) -> None:
    evaluation = config.evaluation
    asked = {
        "evaluation.before=false": evaluation.before,
        "evaluation.after=false": evaluation.after,
        "evaluation.every_steps=0": evaluation.every_steps,
        "evaluation.suites=[]": evaluation.suites,
    }
    changes = [change for change, is_asked in asked.items() if is_asked]
    if changes:
        raise ConfigError(
            f"{KEY}: no engines are started, so that nothing can be evaluated: set {' '.join(changes)}, and evaluate "
            "the policy afterwards with `polyturn eval`"
        )


def _other_weights(recorded: dict[str, object], differences: Differences, config: RunConfig) -> list[str]:
    """Sentences of what differs from the run that is replayed, and decides what is learnt."""
    told = [line for line in differences.reported if line.startswith("trainer.")]
    before = recorded.get("config", {})
    began = before.get("checkpoint", {}) if isinstance(before, dict) else {}
    now = config.checkpoint.model_dump(mode="json")
    told += [
        f"checkpoint.{name} is {now[name]}, the run began with {began[name]}"
        for name in BEGINS_WITH
        if name in began and began[name] != now[name]
    ]
    return [f"{line}: its weights will be others than those of that run" for line in told]
