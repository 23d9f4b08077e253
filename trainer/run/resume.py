"""What is found out before an interrupted run goes on: whether it may, and what is missing of what it had.

A run keeps what it is of: its config, tasks, environment, model and packages. What decides which episodes are played,
or what they are worth, may not change within a run: groups would compare answers to different questions, and nobody
could say later what was trained on. All else may change, and is reported.
"""

from __future__ import annotations

import hashlib
import inspect
import platform
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from datetime import date
from fnmatch import fnmatch
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import orjson

from polyturn.agents.chat import asks_for_date, read_template
from polyturn.agents.episode import Episode
from polyturn.configs.models import resolve_model_path
from polyturn.configs.schema.run import ChecksConfig, RunConfig
from polyturn.configs.schema.trainer import ConstantSchedule
from polyturn.envs.messages import TaskSource
from polyturn.envs.registry import make
from polyturn.envs.tasks import make_curriculum
from polyturn.envs.tasks.curriculum import Curriculum
from polyturn.envs.tasks.order import source_digest, task_digest
from polyturn.rollout.factory import tasks_of
from polyturn.rollout.groups import PromptCursor, journal_of, position_of
from polyturn.rollout.player import other_task
from polyturn.rollout.store import TrajectoryStore
from polyturn.trainer.checkpoints.manifest import find_faults
from polyturn.trainer.run.directory import FailedStep, RunDirectory
from polyturn.trainer.run.supervised import data_digest
from polyturn.trainer.sinks.json_lines import num_damaged_rows

Warn = Callable[[str], None]
MAX_FAILURES = 2
"""A step that failed so often in a row is not played again without a change."""


def with_template_date(config: RunConfig) -> RunConfig:
    """The config with the day that the chat template is told, if it asks for it and the config names none.

    That of a run that goes on is the day on which it began, and that of a replay the one of what it replays.
    """
    model = config.model
    if model.template_date is not None or not asks_for_date(
        resolve_model_path(model.path), template=model.template
    ):
        return config
    day, before = date.today(), None
    if config.resume:
        before = RunDirectory.to_resume(config)
    elif config.rollout.replay is not None:
        before = RunDirectory(config.rollout.replay)
    if before is not None:
        recorded = before.recorded().get("config", {}).get("model", {})
        if isinstance(recorded, Mapping) and recorded.get("template_date"):
            day = date.fromisoformat(recorded["template_date"])
    return config.model_copy(update={"model": model.model_copy(update={"template_date": day})})


def check_resume(config: RunConfig, directory: RunDirectory, warn: Warn) -> None:
    """Compare the run with what the config makes of it, and read what is stored of its unfinished steps.

    Args:
        warn: is called with everything that differs or is damaged.

    Raises:
        ValueError: the run cannot go on so; one sentence with the way out.
    """
    config = with_template_date(config)
    differences = compare(directory.recorded(), identify(config), config)
    if differences.refused:
        raise ValueError(refusal(differences, directory.path))
    for text in differences.reported:
        warn(f"resume: {text}")
    # Marker and sizes only; the ranks compare the checksums, each of some files.
    found = directory.sound_checkpoint(partial(find_faults, read=False), warn)
    last_step, frontier = (0, 0) if found is None else (found[1].step, found[1].prompt_position)
    _refuse_what_fails_again(directory, last_step, config.checks)
    if config.supervised is None:
        whole = journal_of(frontier, prompts_per_step=config.rollout.prompts_per_step) - 1
        _check_stored(config, TrajectoryStore(directory.path), whole, warn)
    if num_damaged := num_damaged_rows(directory.metrics):
        warn(
            f"resume: {directory.metrics} is damaged: {num_damaged} of its rows cannot be read and are left out"
        )


def _refuse_what_fails_again(directory: RunDirectory, last_step: int, checks: ChecksConfig) -> None:
    failed = FailedStep.read(directory.failure)
    if failed is None or failed.step <= last_step or failed.count < MAX_FAILURES:
        return
    if failed.checks != checks.model_dump(mode="json"):
        return
    raise ValueError(
        f"resume: step {failed.step} failed {failed.count} times in a row, the last time so: {failed.sentence}. It "
        "might be played and fail for ever: change the `checks` that it failed, or mend what made it fail and delete "
        f"{directory.failure} to try again"
    )


def _check_stored(config: RunConfig, store: TrajectoryStore, last_step: int, warn: Warn) -> None:
    """Raise for episodes of other tasks than the run has; warn of those that are damaged."""
    tasks = tasks_of(config, config.environment.train_split)
    seed = config.seed
    order = make_curriculum(config.curriculum, tasks, seed=seed)
    # Where tasks are drawn by results, what is of another task than its group is played anew.
    is_fixed = not isinstance(order, Curriculum)
    for step in store.begun_after(last_step):
        stored = store.stored(step)
        for fault in stored.damage:
            warn(f"resume: {fault}; what it held is played again")
        checked: set[str] = set()
        for episode in stored.episodes:
            if is_fixed and episode.group_id not in checked:
                checked.add(episode.group_id)
                try:
                    position = position_of(episode.group_id)
                except ValueError as error:
                    raise ValueError(f"resume: the stored episode {episode.episode_id}: {error}") from error
                prompt = PromptCursor(len(tasks), seed=seed, order=order).at(position)
                _check_task(episode, tasks, prompt.task_index, store, step)


def _check_task(episode: Episode, tasks: TaskSource, index: int, store: TrajectoryStore, step: int) -> None:
    task = tasks[index]
    if episode.task_digest and episode.task_digest != task_digest(task):
        raise ValueError(
            f"resume: {other_task(episode, task)}. Give the run the tasks, the seed and the options that it began "
            f"with, or delete {store.journal_path(step)} and {store.path(step)} to have the step played anew"
        )


def note_failure(
    directory: RunDirectory,
    store: TrajectoryStore,
    *,
    step: int,
    journals: Iterable[int],
    sentence: str,
    checks: ChecksConfig,
) -> str:
    """Remember that a step failed by what was played, and put that aside; the sentence with the way out.

    Left where it is, the next session would train on the same episodes and fail as this one did. `journals` are those
    that its episodes stand in.
    """
    before = FailedStep.read(directory.failure)
    count = 1 if before is None or before.step != step else before.count + 1
    failed = FailedStep(step=step, count=count, sentence=sentence, checks=checks.model_dump(mode="json"))
    aside = store.set_aside(step, journals=journals)
    directory.failure.write_bytes(orjson.dumps(asdict(failed)))
    where = f"; its episodes are in {aside}" if aside else ""
    return f"{sentence}{where}; resume=true plays the step anew"


def forget_failure(directory: RunDirectory, step: int) -> None:
    """Once a checkpoint has a step, it is of no account that it failed before."""
    failed = FailedStep.read(directory.failure)
    if failed is not None and failed.step <= step:
        directory.failure.unlink()


RECORDED_PACKAGES = (
    "polyturn",
    "torch",
    "transformers",
    "sglang",
    "sglang-router",
    "megatron-core",
    "ray",
    "gymnasium",
)
DATA = (
    "seed",
    "environment.*",
    "agent*",
    "curriculum.*",
    "reward*",
    "group_rewards*",
    "model.dialect",
    "model.malformed_calls",
    "model.template_date",
    "model.template_options*",
    "model.tool_prompt",
    "model.history",
    "rollout.prompts_per_step",
    "rollout.samples_per_prompt",
    "rollout.sampling.*",
    "rollout.branching.*",
    "supervised.tokens",
    "supervised.heldout_share",
    "supervised.max_tokens",
)
"""Options that decide which episodes a run plays and what they are worth."""
COMPARED_BY_CONTENT = (
    "model.path",
    "model.template",
    "environment.*timeout_s",
    "curriculum.difficulties",
    "supervised.data",
    "supervised.heldout",
)
"""But for these: a model is known by its files, how long machinery may take is no part of a task, and what a file of
difficulties said is in the checkpoint."""
OF_ONE_SESSION = (
    "name",
    "resume",
    "run_dir",
    "output_dir",
    "checkpoint.load*",
    "logging.*",
    "metrics.*",
    "trainer.profile.*",
)
"""Options that say nothing about what a run is of."""
FREE = ("*options", "sglang", "megatron", "megatron.*", "*.weights")
"""Mappings whose keys are the user's, so that a missing one is a change."""
MODEL_FILES = (
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "chat_template.jinja",
)


@dataclass(frozen=True, kw_only=True, slots=True)
class Identity:
    """What a run is of, as the run directory keeps it."""

    config: Mapping[str, Any]
    """Resolved, as JSON."""
    tasks: str
    """Digest of the tasks that are trained on, in their order."""
    tools: str
    """Digest of what the environment tells of its tools."""
    code: str
    """Digest of the file that the environment's class stands in."""
    model: str
    """Digest of the model's config, tokenizer and templates, and of the sizes of its weights."""
    template: str
    """Digest of the file `model.template`; empty without."""
    versions: Mapping[str, str]


@dataclass(frozen=True, kw_only=True, slots=True)
class Differences:
    """What a resume would change."""

    refused: tuple[str, ...]
    """What decides the data."""
    reported: tuple[str, ...]
    """All else, with what follows from it."""


def identify(config: RunConfig) -> Identity:
    """What a run of this config is of. Raises `ValueError` where tasks or environment cannot be had."""
    specs, code = ([], "") if config.supervised is not None else _described(config)
    return Identity(
        config=config.model_dump(mode="json"),
        tasks=data_digest(config)
        if config.supervised is not None
        else source_digest(tasks_of(config, config.environment.train_split)),
        tools=_digest(orjson.dumps(specs, default=str, option=orjson.OPT_SORT_KEYS)),
        code=code,
        model=model_digest(resolve_model_path(config.model.path)),
        template=""
        if config.model.template is None
        else _digest(read_template(config.model.template).encode()),
        versions=installed_versions(),
    )


def _described(config: RunConfig) -> tuple[list[dict[str, Any]], str]:
    """The tools that the environment describes, and the digest of the file that it stands in."""
    env = make(config.environment.id, **config.environment.options)
    try:
        return [spec.to_openai() for spec in env.tools], _source_of(type(env.unwrapped))
    finally:
        env.close()


def compare(old: Mapping[str, Any], new: Identity, config: RunConfig) -> Differences:
    """What differs from what a run directory keeps, which may lack what an earlier release did not write.

    `config` is the one that `new` was made of.
    """
    refused: list[str] = []
    reported: list[str] = []
    changed = dict(sorted(_changed_options(old.get("config", {}), new.config)))
    for path, (was, now) in changed.items():
        line = f"{path} is {_shown(now)}, the run began with {_shown(was)}"
        (refused if _decides_data(path, was, now) else reported).append(line)
    for name, what in (
        ("tasks", _other_data(config)),
        ("tools", f"the environment {config.environment.id} describes other tools than it did"),
        ("model", f"the config, tokenizer or weights in {config.model.path} are others than they were"),
        ("template", f"the chat template, model.template={config.model.template}, is another than it was"),
    ):
        if name in old and old[name] != getattr(new, name):
            refused.append(what)
    if old.get("code", new.code) != new.code:
        reported.append(
            f"the code of the environment {config.environment.id} has changed since the run began"
        )
    reported += [
        f"{package} is {new.versions.get(package, 'not installed')}, the run began with {was}"
        for package, was in old.get("versions", {}).items()
        if new.versions.get(package) != was
    ]
    return Differences(refused=tuple(refused), reported=(*reported, *_consequences(changed, config)))


def _other_data(config: RunConfig) -> str:
    if config.supervised is not None:
        return "the rows of supervised.data or supervised.heldout are others than they were"
    return f"the tasks of the split {config.environment.train_split!r} are others than they were"


def refusal(differences: Differences, directory: Path) -> str:
    """One sentence that names all that may not change, with the way out."""
    return (
        f"resume: {directory} cannot go on with other data: {'; '.join(differences.refused)}. Take that back, or begin "
        f"a new run from its weights: resume=false checkpoint.load={directory} and another run_dir"
    )


def model_digest(directory: Path) -> str:
    """What tells one model directory from another without reading its weights."""
    found = hashlib.sha256()
    for name in MODEL_FILES:
        path = directory / name
        found.update(f"{name}:{_digest(path.read_bytes()) if path.is_file() else None};".encode())
    for path in sorted(directory.glob("*.safetensors")):
        found.update(f"{path.name}:{path.stat().st_size};".encode())
    return found.hexdigest()[:16]


def installed_versions() -> dict[str, str]:
    """Versions of what a run depends on."""
    found = {"python": platform.python_version()}
    for package in RECORDED_PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def _source_of(kind: type) -> str:
    """Digest of the file that a class stands in; nothing for one that was made elsewhere."""
    try:
        path = inspect.getsourcefile(kind)
    except TypeError:
        return ""
    return _digest(Path(path).read_bytes()) if path is not None and Path(path).is_file() else ""


def _changed_options(old: Any, new: Any, path: str = "") -> Iterator[tuple[str, tuple[Any, Any]]]:
    """Each option with another value: before, and as it is. What only one release knows is passed over."""
    if any(fnmatch(path, pattern) for pattern in OF_ONE_SESSION):
        return
    if not isinstance(old, Mapping) or not isinstance(new, Mapping):
        if old != new:
            yield path, (old, new)
        return
    if old.get("kind") != new.get("kind"):
        yield f"{path}.kind", (old.get("kind"), new.get("kind"))
        return
    is_free = any(fnmatch(path, pattern) for pattern in FREE)
    for key in old.keys() | new.keys() if is_free else old.keys() & new.keys():
        yield from _changed_options(old.get(key), new.get(key), f"{path}.{key}" if path else key)


def _decides_data(path: str, was: Any, now: Any) -> bool:
    if path == "environment.tasks":
        return _without_places(was) != _without_places(now)
    if any(fnmatch(path, pattern) for pattern in COMPARED_BY_CONTENT):
        return False
    return any(fnmatch(path, pattern) for pattern in DATA)


def _without_places(sources: Any) -> Any:
    """Task sources as they read and grade their tasks, wherever those lie."""
    return [{**source, "path": None} for source in sources or ()]


def _consequences(changed: Mapping[str, tuple[Any, Any]], config: RunConfig) -> Iterator[str]:
    """What follows from changes that are allowed, where it is easily overlooked."""
    optimizers = {"trainer.optimizer": config.trainer.optimizer}
    if config.trainer.uses_critic:
        optimizers["trainer.critic.optimizer"] = config.trainer.critic.optimizer
    stretched = {"trainer.num_steps", "trainer.updates_per_step"} & changed.keys()
    for name, optimizer in optimizers.items():
        schedule = optimizer.schedule
        if stretched and not isinstance(schedule, ConstantSchedule) and schedule.num_updates is None:
            yield (
                f"the {schedule.kind} schedule of {name} ends with the run, so that its learning rates are others from "
                f"here on: {name}.schedule.num_updates=N keeps the end that it had"
            )
    if any(path.startswith(("trainer.algorithm.", "trainer.algorithm_by_environment")) for path in changed):
        yield "the steps before were trained with another trainer.algorithm than those that follow"
    if any(path.startswith("evaluation.") for path in changed):
        yield "evaluations before and after this point are of other episodes and cannot be compared"


def _shown(value: Any) -> str:
    text = orjson.dumps(value).decode() if not isinstance(value, str) else value
    return text if len(text) <= 60 else f"{text[:57]}..."


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:16]
