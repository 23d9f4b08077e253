"""Evaluations in directories of their own, from Python: begun, gone on with, and scored again."""

from __future__ import annotations

import json
import logging
import shutil
import subprocess
import sys
import tempfile
import threading
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from datetime import date, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from polyturn.configs.errors import ConfigError, Interrupted, RunFailure, as_config_error
from polyturn.configs.loading.suites import (
    ON_CPU,
    LoadedEntry,
    LoadedSuite,
    is_suite,
    load_evaluation,
    suite_of,
)
from polyturn.configs.models import BUILTIN, resolve_model_path
from polyturn.configs.schema.run import RunConfig
from polyturn.configs.schema.suite import Budget
from polyturn.packages import SERVING, require
from polyturn.tools.interruption import InterruptGuard
from polyturn.tools.secrets import literal_secrets
from polyturn.version import __version__

if TYPE_CHECKING:
    from polyturn.rollout.evaluation.conduct import Conducted, Watching
    from polyturn.rollout.evaluation.plan import EvaluationPlan
    from polyturn.rollout.evaluation.scoring import Prices
    from polyturn.rollout.evaluation.who_plays import WhoPlays

logger = logging.getLogger(__name__)
ASK_S = 10.0
"""How long a server may take to say which model it serves."""
Warn = Callable[[str], object]


class EvaluationInterrupted(Interrupted):
    """An evaluation was asked to stop; what has ended is written."""

    def __init__(self, directory: Path, num_left: int) -> None:
        Exception.__init__(
            self,
            f"stopped with {num_left} episodes to go; `polyturn eval resume {directory}` goes on from there",
        )
        self.directory = directory


@dataclass(frozen=True, kw_only=True, slots=True)
class Asked:
    """An evaluation that nothing speaks against: what is played, and by whom."""

    plan: EvaluationPlan
    suite: LoadedSuite
    who: WhoPlays


@contextmanager
def asked(
    recipe_or_suite: str | Path | RunConfig,
    overrides: Sequence[str],
    *,
    model_path: str | Path | None,
    policy: str,
    policy_options: Mapping[str, Any] | None,
    prices: Prices | None = None,
    on_warning: Warn = logger.warning,
) -> Iterator[Asked]:
    """Check all that an evaluation needs, and plan it; what was unpacked for it is removed at the end.

    Raises ConfigError.
    """
    if isinstance(recipe_or_suite, RunConfig):
        if overrides:
            raise ConfigError(f"{overrides[0]}: a config that is loaded takes no options; load it with them")
        suite = suite_of(recipe_or_suite)
    else:
        suite = load_evaluation(recipe_or_suite, overrides)
    suite = pinned(suite, date.today())
    if policy.startswith(BUILTIN) or ("/" in policy and Path(policy).is_dir()):
        policy, model_path = "model", policy
    with ExitStack() as stack:
        named, who = _who(
            suite,
            stack,
            model_path=model_path,
            policy=policy,
            options=policy_options or {},
            on_warning=on_warning,
        )
        if suite.is_on_cpu and who.model_path is not None and who.url is None:
            on_warning(
                f"this machine has no GPU, so that the model is served by its CPU ({' '.join(ON_CPU)})"
            )
        from polyturn.rollout.evaluation.conduct import plan_of

        with as_config_error():
            plan = plan_of(
                suite,
                who,
                package=__version__,
                policy=policy,
                options=policy_options or {},
                model=named,
                prices=prices,
                source=None if isinstance(recipe_or_suite, RunConfig) else _source(recipe_or_suite),
                overrides=overrides,
            )
        yield Asked(plan=plan, suite=suite, who=who)


def new_directory(suite: LoadedSuite) -> Path:
    """Where an evaluation is made that nobody named a directory for: `evaluations/SUITE-DATE` in `output_dir`."""
    from polyturn.rollout.evaluation.directory import EVALUATIONS

    root = suite.entries[0].config.output_dir / EVALUATIONS
    stamp = f"{suite.name}-{datetime.now():%Y%m%d-%H%M%S}"
    path, number = root / stamp, 1
    while path.exists():
        number += 1
        path = root / f"{stamp}-{number}"
    return path


def begin(asked: Asked, directory: Path | None = None) -> Path:
    """Make the directory of an evaluation, with its plan. Raises ConfigError where there is one already."""
    from polyturn.rollout.evaluation.directory import write_plan

    path = directory or new_directory(asked.suite)
    try:
        write_plan(path, asked.plan)
    except FileExistsError as error:
        raise ConfigError(
            f"{path} holds an evaluation already; `polyturn eval resume {path}` goes on with it"
        ) from error
    return path


def play(
    directory: Path,
    asked: Asked,
    watching: Watching | None = None,
    *,
    is_interruptible: bool = True,
    grades_first: bool = False,
) -> Conducted:
    """Play what an evaluation lacks. Ctrl-C drains and saves, where it is interruptible.

    Args:
        grades_first: Grade stored episodes whose scorer failed before anything is played: what can be graded now is
            not played again.

    Raises:
        RunFailure: an engine did not come up or died, or too much failed.
        EvaluationInterrupted: Ctrl-C.
        ConfigError: another process plays it.
    """
    from polyturn.rollout.engines.process import EngineError
    from polyturn.rollout.evaluation.conduct import Watching, conduct
    from polyturn.rollout.evaluation.rescore import rescore
    from polyturn.rollout.player import RolloutError

    configs = [entry.config for entry in asked.suite.entries]
    watching = watching or Watching()
    try:
        with ExitStack() as stack, as_config_error():
            if is_interruptible and threading.current_thread() is threading.main_thread():
                guard = stack.enter_context(InterruptGuard())
                watching = replace(watching, on_stop=guard.subscribe)
            if grades_first:
                rescore(directory, asked.plan, configs, everything=False)
            conducted = conduct(directory, asked.plan, configs, asked.who, watching=watching)
    except EngineError as failure:
        raise RunFailure(f"{failure.sentence}; {_way_on(directory)}") from failure
    except RolloutError as failure:
        raise RunFailure(f"{failure}; {_way_on(directory)}") from failure
    if conducted.was_stopped and conducted.num_left:
        raise EvaluationInterrupted(directory, conducted.num_left)
    return conducted


@contextmanager
def shown(suite: LoadedSuite, *, told: Callable[[str], object] | None = None) -> Iterator[Watching]:
    """Progress on the terminal while an evaluation is played; `told` gets sentences in place of it."""
    from polyturn.rollout.evaluation.conduct import Watching
    from polyturn.trainer.run.progress import make_progress

    progress = make_progress(suite.entries[0].config.logging.progress, num_steps=1)
    try:
        yield Watching(
            begin=lambda count: progress.phase(f"evaluating {suite.name}", total=count),
            line=lambda _: progress.advance(),
            tell=told or progress.message,
        )
    finally:
        progress.close()


def _way_on(directory: Path) -> str:
    return f"what has ended is in {directory}, and `polyturn eval resume {directory}` goes on"


@contextmanager
def to_resume(
    directory: Path, overrides: Sequence[str] = (), *, on_warning: Warn = logger.warning
) -> Iterator[Asked]:
    """An evaluation that was begun, to go on with.

    Args:
        overrides: Of what does not decide the result, such as `engines.num_engines=4`.

    Raises ConfigError where there is none, and where anything that decides the result is not what it was.
    """
    from polyturn.rollout.evaluation.directory import read_plan
    from polyturn.rollout.evaluation.fingerprint import changed_files, named_files

    with as_config_error(), ExitStack() as stack:
        plan = read_plan(directory)
        suite = _suite_again(plan, overrides)
        if changes := list(_changes(plan, suite)):
            raise ConfigError("\n".join(_refused(directory, change) for change in changes))
        if plan.package != __version__:
            on_warning(f"{directory} was begun by Polyturn {plan.package}, and this is {__version__}")
        player = plan.player
        _, who = _who(
            suite,
            stack,
            model_path=player.model,
            policy=player.name,
            options=player.options,
            on_warning=on_warning,
        )
        from polyturn.rollout.evaluation.fingerprint import model_files

        files = named_files(player.name, player.options)
        if who.model_path is not None:
            files |= model_files(who.model_path)
        for change in changed_files(player.files, files):
            raise ConfigError(_refused(directory, f"{player.label}: {change}"))
        yield Asked(plan=_with_budgets(plan, suite), suite=suite, who=who)


def _with_budgets(plan: EvaluationPlan, suite: LoadedSuite) -> EvaluationPlan:
    """The plan with what may be spent as the suite says now: that decides how much is played, and no result."""
    entries = [
        entry.model_copy(update={"budget": loaded.budget.model_dump()})
        for entry, loaded in zip(plan.entries, suite.entries, strict=True)
    ]
    return plan.model_copy(update={"entries": entries})


def to_rescore(directory: Path, overrides: Sequence[str] = ()) -> tuple[EvaluationPlan, LoadedSuite]:
    """An evaluation whose stored episodes are to be graded, by its reward or by another one that `overrides` say.

    Raises ConfigError where there is none, and where anything else than the reward is not what it was.
    """
    from polyturn.rollout.checks import check_rewards
    from polyturn.rollout.evaluation.conduct import planned
    from polyturn.rollout.evaluation.directory import read_plan

    with as_config_error():
        plan = read_plan(directory)
        suite = _suite_again(plan, overrides)
        for change in _changes(plan, suite, but=("reward", "judges", "success_score")):
            raise ConfigError(_refused(directory, change))
        for entry in suite.entries:
            check_rewards(entry.config)
        entries = [planned(entry) for entry in suite.entries]
    return plan.model_copy(
        update={
            "entries": entries,
            "overrides": [*plan.overrides, *overrides],
            "scored_from": str(directory.resolve()),
        }
    ), suite


def rescored_copy(directory: Path, plan: EvaluationPlan, suite: LoadedSuite, target: Path | None) -> Path:
    """A new evaluation with the trajectories and lines of another one, to be graded by its own plan.

    Raises ConfigError where there is one already.
    """
    from polyturn.rollout.evaluation.directory import ENTRIES, EPISODES, write_plan

    path = target or new_directory(suite)
    try:
        write_plan(path, plan)
    except FileExistsError as error:
        raise ConfigError(f"{path} holds an evaluation already; name a new directory") from error
    shutil.copytree(directory / ENTRIES, path / ENTRIES)
    shutil.copy2(directory / EPISODES, path / EPISODES)
    return path


def _refused(directory: Path, change: str) -> str:
    return f"{directory} cannot go on: {change}. Undo that, or begin another one with `polyturn eval run`"


def _changes(plan: EvaluationPlan, suite: LoadedSuite, *, but: Sequence[str] = ()) -> Iterator[str]:
    """A sentence for all that decides the result and is not what it was; `but` are sections that may be another."""
    from polyturn.rollout.evaluation.conduct import planned
    from polyturn.rollout.evaluation.fingerprint import changed_files, changed_values, deciding

    was, now = [entry.name for entry in plan.entries], [entry.name for entry in suite.entries]
    if was != now:
        yield f"its entries were {', '.join(was)} and are {', '.join(now)}"
        return
    for before, entry in zip(plan.entries, suite.entries, strict=True):
        was_decided, decides = deciding(_config(before.config)), deciding(entry.config)
        for name in but:
            was_decided.pop(name, None)
            decides.pop(name, None)
        yield from changed_values(was_decided, decides, before.name)
        after = planned(entry)
        if before.success_score != after.success_score and "success_score" not in but:
            yield f"{before.name}.success_score was {before.success_score:g} and is {after.success_score:g}"
        files = [] if but else list(changed_files(before.files, after.files))
        yield from (f"{before.name}: the file {change}" for change in files)
        if before.num_tasks != after.num_tasks and not files:
            yield f"{before.name}: there were {before.num_tasks} tasks to play and are {after.num_tasks}"
        elif before.tasks_digest != after.tasks_digest and not files:
            yield f"{before.name}: its tasks are not what they were"


def _suite_again(plan: EvaluationPlan, overrides: Sequence[str]) -> LoadedSuite:
    """The suite as it is written now; as it was written where its file is not there any more."""
    days = [_config(entry.config).model.template_date for entry in plan.entries]
    if plan.source is not None and _is_there(plan.source):
        suite = load_evaluation(plan.source, [*plan.overrides, *overrides])
        return pinned(suite, days[0] or date.today())
    if overrides:
        raise ConfigError(
            f"{overrides[0]}: {plan.source or 'the config'} is not there any more to be changed"
        )
    return LoadedSuite(
        name=plan.suite,
        entries=tuple(
            LoadedEntry(
                name=entry.name,
                config=_config(entry.config),
                success_score=entry.success_score,
                budget=Budget.model_validate(entry.budget),
            )
            for entry in plan.entries
        ),
    )


def _is_there(source: str) -> bool:
    try:
        is_suite(source)
    except ConfigError:
        return False
    return True


def _config(written: Mapping[str, Any]) -> RunConfig:
    return RunConfig.model_validate_json(json.dumps(written), strict=True)


def _source(recipe_or_suite: str | Path) -> str:
    path = Path(recipe_or_suite)
    return str(path.resolve()) if path.is_file() else str(recipe_or_suite)


def pinned(suite: LoadedSuite, day: date) -> LoadedSuite:
    """The suite with the day that chat templates are told, where it says none: a resume tells the same one."""

    def with_day(config: RunConfig) -> RunConfig:
        if config.model.template_date is not None:
            return config
        return config.model_copy(update={"model": config.model.model_copy(update={"template_date": day})})

    entries = (replace(entry, config=with_day(entry.config)) for entry in suite.entries)
    return replace(suite, entries=tuple(entries))


def _who(
    suite: LoadedSuite,
    stack: ExitStack,
    *,
    model_path: str | Path | None,
    policy: str,
    options: Mapping[str, Any],
    on_warning: Warn,
) -> tuple[Path | None, WhoPlays]:
    """What was named as the model, and who plays, when all that it needs is there. Raises ConfigError."""
    from polyturn.agents.policies.named import make_policy, serves_model
    from polyturn.rollout.checks import check_named_policy
    from polyturn.rollout.evaluation.who_plays import WhoPlays, served_elsewhere

    for key, why in literal_secrets(dict(options)):
        raise ConfigError(
            f"policy: the option {key} {why}, and what is evaluated is stored; name a file of it"
        )
    configs = [entry.config for entry in suite.entries]
    with as_config_error("policy: "):
        name, inner, url = served_elsewhere(policy, options)
        is_served = serves_model(name, inner)
        named = None if is_served else make_policy(name, inner)
    if named is not None:
        with as_config_error():
            for config in configs:
                check_named_policy(config, named)
        if model_path is not None:
            raise ConfigError(
                f"policy: {policy!r} is not made of a model, so that model_path={model_path} is not played"
            )
        return None, WhoPlays(name=name, options=inner)
    if url is not None:
        source = _model_at(url) if model_path is None else _named_model(model_path)
    else:
        source = newest_policy(configs[0]) if model_path is None else _named_model(model_path)
    model = stack.enter_context(hf_directory(source))
    _preflight(configs, model, url, on_warning)
    return source, WhoPlays(name=name, options=inner, model_path=model, url=url)


def _preflight(configs: Sequence[RunConfig], model: Path, url: str | None, on_warning: Warn) -> None:
    from polyturn.trainer.run import preflight

    for config in configs:
        if url is None:
            warnings = preflight.preflight(config, evaluated=model)
        else:
            warnings = preflight.preflight_of_tokens(config, model)
        for warning in warnings:
            on_warning(warning)
    if url is None:
        require(SERVING)


def newest_policy(config: RunConfig) -> Path:
    """The final policy of `run_dir`, or of the newest finished run of this name. Raises ConfigError."""
    from polyturn.trainer.run.directory import runs_of

    runs = runs_of(config.name, config.output_dir) if config.run_dir is None else [config.run_dir]
    for run in runs:
        if (run / "policy" / "config.json").is_file():
            return run / "policy"
    where = config.run_dir or config.output_dir
    raise ConfigError(
        f"there is no finished run of '{config.name}' in {where}; name a model with --model PATH"
    )


def _named_model(named: str | Path) -> Path:
    """A Hugging Face directory, that of a run's policy, or a checkpoint. Raises ConfigError."""
    path = Path(named)
    if (path / "policy" / "config.json").is_file():
        return path / "policy"
    if (path / "checkpoints").is_dir() and not (path / "config.json").is_file():
        from polyturn.trainer.run.directory import RunDirectory

        steps = RunDirectory(path).complete_steps()
        if not steps:
            raise ConfigError(f"{path} has neither a final policy nor a checkpoint yet")
        return path / "checkpoints" / f"step_{max(steps):06d}"
    if _is_checkpoint(path):
        return path
    return resolve_model_path(named, key="model_path") if isinstance(named, str) else path


def _is_checkpoint(path: Path) -> bool:
    return (path / "state.json").is_file() and not (path / "config.json").is_file()


@contextmanager
def hf_directory(source: Path) -> Iterator[Path]:
    """The Hugging Face directory of a model: itself, or what a checkpoint is converted into meanwhile.

    Raises ConfigError where it cannot be converted.
    """
    if not _is_checkpoint(source):
        yield source
        return
    require()
    with tempfile.TemporaryDirectory(prefix="polyturn-evaluated-") as folder:
        target = Path(folder) / "policy"
        command = [sys.executable, "-m", "polyturn", "convert", str(source), str(target)]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            lines = (done.stderr.strip() or f"convert ended with {done.returncode}").splitlines()
            raise ConfigError(f"{source}: {lines[-1].removeprefix('error: ')}")
        yield target


def _model_at(url: str) -> Path:
    """The directory of the model that an SGLang server serves, for its tokenizer. Raises ConfigError."""
    way_out = "name a directory with its tokenizer (--model DIR)"
    try:
        with urllib.request.urlopen(f"{url.rstrip('/')}/get_model_info", timeout=ASK_S) as answer:
            served = json.load(answer)
        path = Path(served["model_path"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigError(f"policy: no SGLang server answers at {url}: {error}; or {way_out}") from error
    if not (path / "config.json").is_file():
        raise ConfigError(f"policy: {url} serves {path}, which is not there; {way_out}")
    return path
