"""Training and evaluation from Python; what the command line starts is the same."""

from __future__ import annotations

import json
import logging
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from polyturn import evaluations
from polyturn.configs.errors import ConfigError, RunFailure, as_config_error
from polyturn.configs.loading import loader
from polyturn.configs.models import resolve_model_path
from polyturn.configs.schema.run import RunConfig
from polyturn.packages import SERVING, require
from polyturn.trainer.run.supervised import supervised_run

if TYPE_CHECKING:
    from polyturn.evaluations import Asked
    from polyturn.rollout.evaluation.conduct import Conducted
    from polyturn.rollout.evaluation.held_out import EvaluationResult
    from polyturn.rollout.fine_tuning.source import TaughtRows
    from polyturn.rollout.probe import ProbeResult

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True, slots=True)
class EvaluationReport:
    """How a policy did on the held-out tasks of one environment."""

    environment: str
    """Its id."""
    options: Mapping[str, Any]
    """Arguments of its constructor."""
    split: str
    model_path: Path | None
    """The Hugging Face directory of the policy; None: no model was served."""
    name: str
    """Of the entry of the suite."""
    result: EvaluationResult
    """The mean reward with its 95 % interval, and what was counted."""


def load_config(recipe: str | Path | RunConfig, /, *overrides: str, **options: Any) -> RunConfig:
    """The config of a run.

    Args:
        recipe: A YAML file, or the name of a shipped recipe. A config that is loaded already comes back as it is.
        overrides: `"trainer.num_steps=20"`, as on the command line.
        options: The same as values: `seed=1`, `trainer={"num_steps": 20}`; other options of a section stay.

    Raises:
        ConfigError: one line for each thing that is wrong, with the file and line where it is written.
    """
    given = tuple(_as_overrides(options))
    if not isinstance(recipe, RunConfig):
        return loader.load_config(recipe, overrides, options=given)
    if overrides or given:
        raise ConfigError(
            f"{(*overrides, *given)[0]}: a config that is loaded takes no options; load it with them"
        )
    return recipe


def train(recipe: str | Path | RunConfig, /, *overrides: str, **options: Any) -> Path:
    """Train a policy: `polyturn.train("quickstart", seed=1)`.

    The arguments are those of `load_config`. The program that calls it must be safe to import (`if __name__ ==
    "__main__":`), because Ray starts processes of it. Ctrl-C saves the finished steps.

    Returns:
        The run directory: config, metrics, trajectories, checkpoints, and the policy under `policy`.

    Raises:
        ConfigError: a config that cannot be run, or packages that are missing; nothing has been started.
        RunFailure: the run ended before its last step; `resume=True, run_dir=...` goes on.
        Interrupted: Ctrl-C; the same goes on.
    """
    config = load_config(recipe, *overrides, **options)
    from polyturn.trainer.run.preflight import preflight

    warnings = preflight(config)
    require()
    from polyturn.trainer.run import train as run
    from polyturn.trainer.run.failures import FAILURES, sentence_of

    try:
        return run.train(config, warnings=warnings)
    except RunFailure:
        raise
    except FAILURES as failure:
        raise RunFailure(sentence_of(failure)) from failure


def evaluate(
    recipe: str | Path | RunConfig,
    /,
    *overrides: str,
    model_path: str | Path | None = None,
    policy: str = "model",
    policy_options: Mapping[str, Any] | None = None,
    on_warning: Callable[[str], object] = logger.warning,
    on_report: Callable[[EvaluationReport], object] | None = None,
    directory: Path | None = None,
    **options: Any,
) -> list[EvaluationReport]:
    """Score a policy on held-out tasks: `[report] = polyturn.evaluate("quickstart")`, then `report.result.mean`.

    Args:
        recipe: As of `load_config`, or a suite, which has several environments.
        overrides: As of `load_config`.
        model_path: A Hugging Face directory or `builtin:NAME`; None: the policy of the newest finished run.
        policy: Who plays, by name (docs/policies.md). No engine starts for one that is not made of the model.
        policy_options: Of the policy.
        on_warning: Is told what may be wrong, such as of the chat template.
        on_report: Is told of each environment at the end.
        directory: A new directory, in which all that is played is kept, and `polyturn eval resume` can go on; None:
            nothing is kept.
        options: As of `load_config`.

    Returns:
        A report for each environment, in the order of the suite.

    Raises:
        ConfigError: a config or model that cannot be evaluated, or missing packages; nothing has been started.
        RunFailure: an engine did not come up or died, or every episode failed.
    """
    with evaluations.asked(
        recipe,
        (*overrides, *_as_overrides(options)),
        model_path=model_path,
        policy=policy,
        policy_options=policy_options,
        on_warning=on_warning,
    ) as asked:
        with tempfile.TemporaryDirectory(prefix="polyturn-evaluation-") as scratch:
            kept = evaluations.begin(asked, Path(scratch) / "evaluation" if directory is None else directory)
            with evaluations.shown(asked.suite) as watching:
                conducted = evaluations.play(kept, asked, watching, is_interruptible=directory is not None)
        reports = reports_of(asked, conducted)
    for report in reports:
        if on_report is not None:
            on_report(report)
    return reports


def reports_of(asked: Asked, conducted: Conducted) -> list[EvaluationReport]:
    """A report for each entry. Raises `RunFailure` where one has no scored episode."""
    from polyturn.rollout.evaluation.conduct import result_of
    from polyturn.rollout.evaluation.who_plays import MODEL

    who = asked.who
    policy = MODEL if who.name == MODEL and who.url is None else conducted.evaluation.policy
    reports = []
    for loaded, entry in zip(asked.suite.entries, conducted.evaluation.entries, strict=True):
        try:
            result = result_of(entry, policy=policy, tally=conducted.tallies.get(entry.name))
        except ValueError as failure:
            raise RunFailure(str(failure)) from failure
        environment = loaded.config.environment
        reports.append(
            EvaluationReport(
                environment=environment.id,
                options=environment.options,
                split=entry.split,
                model_path=None if asked.plan.player.model is None else Path(asked.plan.player.model),
                result=result,
                name=entry.name,
            )
        )
    return reports


def roll_out(
    recipe: str | Path | RunConfig,
    /,
    *overrides: str,
    on_warning: Callable[[str], object] = logger.warning,
    **options: Any,
) -> Path:
    """Play the episodes of a recipe's steps by the weights of `model.path`, and store them; the run directory.

    `train(recipe, rollout={"replay": path})` trains on it. Arguments and exceptions are those of `evaluate`, and
    `Interrupted` is.
    """
    config = load_config(recipe, *overrides, **options)
    from polyturn.trainer.run.rollout_only import check_rollout_only
    from polyturn.trainer.run.rollout_only import roll_out as run

    for warning in check_rollout_only(config):
        on_warning(warning)
    require()
    return run(config)


def fine_tune(
    recipe: str | Path | RunConfig,
    /,
    *overrides: str,
    on_warning: Callable[[str], object] = logger.warning,
    **options: Any,
) -> Path:
    """Fine-tune a recipe's policy on rows: `fine_tune("quickstart", supervised={"data": ["rows.jsonl"]})`.

    Arguments are those of `load_config`, and what comes of them is that of `train`, but that the steps follow from the
    rows and the epochs; `trainer.num_steps` among the overrides ends the run earlier.

    Raises:
        ConfigError: also where a row is not as it should be, with file, line and key.
        RunFailure: as of `train`.
        Interrupted: as of `train`.
    """
    require()
    config, rows = fine_tuning(recipe, *overrides, on_message=on_warning, **options)
    from polyturn.trainer.run.preflight import preflight

    warnings = preflight(config)
    from polyturn.trainer.run import train as run
    from polyturn.trainer.run.failures import FAILURES, sentence_of

    try:
        return run.train(config, warnings=warnings, rows=rows)
    except RunFailure:
        raise
    except FAILURES as failure:
        raise RunFailure(sentence_of(failure)) from failure


def fine_tuning(
    recipe: str | Path | RunConfig,
    /,
    *overrides: str,
    on_message: Callable[[str], object] = logger.warning,
    **options: Any,
) -> tuple[RunConfig, TaughtRows]:
    """The config of a run that is fine-tuned, and its rows. Arguments are those of `fine_tune`.

    Raises `ConfigError` where there are none, or one is not as it should be.
    """
    written = (*overrides, *_as_overrides(options))
    config = load_config(recipe, *written)
    if config.supervised is None:
        raise ConfigError("supervised.data: name the rows to fine-tune on: --data FILE")
    from polyturn.rollout.fine_tuning.source import load_rows
    from polyturn.trainer.run.progress import make_progress

    progress = make_progress(config.logging.progress, num_steps=1)
    progress.phase("reading the rows")
    try:
        rows = load_rows(config, on_row=progress.advance)
    finally:
        progress.close()
    on_message(rows.summary())
    ends_early = any(override.startswith("trainer.num_steps=") for override in written)
    num_steps = config.trainer.num_steps if ends_early else None
    return supervised_run(config, len(rows.train), num_steps=num_steps), rows


MAX_PROBED = 1_000_000
"""A source of more tasks, or without an end, is not probed whole."""


def probe(
    recipe: str | Path | RunConfig,
    /,
    *overrides: str,
    output: Path,
    model_path: str | Path | None = None,
    num_tasks: int | None = None,
    samples_per_task: int = 8,
    on_warning: Callable[[str], object] = logger.warning,
    **options: Any,
) -> ProbeResult:
    """Play the tasks that a recipe trains on, and write how difficult each is: `curriculum.difficulties` takes that.

    Args:
        recipe: As of `load_config`.
        overrides: As of `load_config`.
        output: A JSONL file, one line for each task. What it has already is not played again.
        model_path: A Hugging Face directory or `builtin:NAME`; None: the policy that the training begins with.
        num_tasks: The first so many tasks; None: all.
        samples_per_task: Episodes of each task, at the temperature of the training.
        on_warning: As of `evaluate`.
        options: As of `load_config`.

    Raises:
        ConfigError: as of `evaluate`, or a file that is none of difficulties, or too many tasks.
        RunFailure: as of `evaluate`.
    """
    config = load_config(recipe, *overrides, **options)
    named = config.model.path if model_path is None else model_path
    model = resolve_model_path(named, key="model_path") if isinstance(named, str) else named
    from polyturn.rollout.factory import tasks_of
    from polyturn.rollout.probe import left_to_probe
    from polyturn.trainer.run.preflight import preflight

    split = config.environment.train_split
    for warning in preflight(config, evaluated=model, splits=(split,)):
        on_warning(warning)
    with as_config_error():
        tasks = tasks_of(config, split)
        num_tasks = min(num_tasks or len(tasks), len(tasks))
        if num_tasks > MAX_PROBED:
            raise ValueError(
                f"the split {split!r} has more than {MAX_PROBED:,} tasks, or no end: say how many to play (--tasks N)"
            )
        left_to_probe(tasks, 0, output)
    require(SERVING)
    return _probe(config, model, output, num_tasks, samples_per_task)


def _probe(
    config: RunConfig, model_path: Path, output: Path, num_tasks: int, samples_per_task: int
) -> ProbeResult:
    from polyturn.rollout.probe import probe_model
    from polyturn.trainer.run.progress import make_progress

    progress = make_progress(config.logging.progress, num_steps=1)
    try:
        with _serving():
            return probe_model(
                config,
                model_path=model_path,
                output=output,
                num_tasks=num_tasks,
                samples_per_task=samples_per_task,
                on_begin=lambda count: progress.phase(
                    f"probing {count:,} tasks", total=count * samples_per_task
                ),
                on_episode=lambda _: progress.advance(),
            )
    finally:
        progress.close()


@contextmanager
def _serving() -> Iterator[None]:
    """Raise what ends the serving of a model as `RunFailure`."""
    from polyturn.rollout.engines.process import EngineError
    from polyturn.rollout.player import RolloutError

    try:
        yield
    except EngineError as failure:
        raise RunFailure(failure.sentence) from failure
    except RolloutError as failure:
        raise RunFailure(str(failure)) from failure


def _as_overrides(options: Mapping[str, Any], prefix: str = "") -> Iterator[str]:
    """`{"trainer": {"num_steps": 20}}` as `trainer.num_steps=20`. JSON is YAML, and what it has no form for is text."""
    for name, value in options.items():
        if isinstance(value, Mapping) and value:
            yield from _as_overrides(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}={json.dumps(value, default=str)}"
