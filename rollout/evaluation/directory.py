"""The directory of an evaluation, which `records` describes: written as episodes end, read at any time."""

from __future__ import annotations

import contextlib
import errno
import os
import threading
from collections.abc import Iterator, Mapping
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import orjson
from pydantic import ValidationError

from polyturn.configs.loading import yaml_tree
from polyturn.rollout.evaluation.plan import FORMAT, EvaluationPlan, PlannedEntry
from polyturn.rollout.evaluation.records import EvaluatedEntry, Evaluation, Failure, ScoredEpisode
from polyturn.rollout.whole_file import sync_directory, whole_file

EVALUATIONS = "evaluations"
"""The folder of evaluations in `output_dir`."""
PLAN = "evaluation.yaml"
EPISODES = "episodes.jsonl"
ENTRIES = "entries"
REPORT = "report.json"


def is_evaluation(directory: Path) -> bool:
    """Whether an evaluation was begun there."""
    return (directory / PLAN).is_file()


def entry_directory(directory: Path, name: str) -> Path:
    """Where an entry has its trajectories and logs."""
    return directory / ENTRIES / name


def write_plan(directory: Path, plan: EvaluationPlan) -> None:
    """Begin an evaluation in a new directory. Raises `FileExistsError` where one was begun there."""
    directory.mkdir(parents=True, exist_ok=True)
    path = directory / PLAN
    if path.exists():
        raise FileExistsError(f"{directory} holds an evaluation already")
    with whole_file(path) as file:
        file.write(yaml_tree.write(plan.model_dump(mode="json")).encode())


def read_plan(directory: Path) -> EvaluationPlan:
    """What an evaluation was asked for.

    Raises:
        ValueError: no evaluation was begun there, a later release began it, or its file is damaged; one sentence.
    """
    path = directory / PLAN
    if not path.is_file():
        raise ValueError(f"{directory} is no evaluation: it has no {PLAN}; `polyturn eval run` makes one")
    written: Any = yaml_tree.read_file(path).plain()
    number = written.get("format")
    if not isinstance(number, int):
        raise ValueError(f"{directory} is no evaluation: its {PLAN} has no 'format', as ours have")
    if number > FORMAT:
        raise ValueError(
            f"{path}: format {number} is of a later release of Polyturn, and this one reads {FORMAT}; install that"
        )
    try:
        return EvaluationPlan.model_validate(written)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        where = ".".join(str(part) for part in first["loc"])
        raise ValueError(f"{path} is damaged: {where}: {first['msg']}") from error


def read_evaluation(directory: Path) -> Evaluation:
    """The evaluation as far as it has got, whether or not it is being played.

    Raises `ValueError` as `read_plan`.
    """
    plan = read_plan(directory)
    newest = newest_lines(directory)
    return Evaluation(
        suite=plan.suite,
        policy=plan.player.label,
        entries=tuple(_entry(entry, newest) for entry in plan.entries),
    )


Place = tuple[str, int, int]
"""Entry, task index and sample."""


def newest_lines(directory: Path) -> dict[Place, ScoredEpisode]:
    """Of each entry, task and sample the line that holds, in the order in which they were first written."""
    newest: dict[Place, ScoredEpisode] = {}
    for episode in read_lines(directory / EPISODES):
        newest[place_of(episode)] = episode
    return newest


def place_of(episode: ScoredEpisode) -> Place:
    """What an evaluation has one episode for."""
    return episode.entry, episode.task_index, episode.sample


def read_lines(path: Path) -> Iterator[ScoredEpisode]:
    """The lines of `episodes.jsonl`, in order; none where it is not there.

    A line that is not whole, as the last one is where the writer was killed, is passed over: its episode counts as one
    that has not been played.
    """
    with contextlib.suppress(FileNotFoundError), path.open("rb") as file:
        for line in file:
            with contextlib.suppress(ValueError, TypeError, KeyError):
                yield episode_of(orjson.loads(line))


def line_of(episode: ScoredEpisode) -> bytes:
    """The episode as one line of JSON, with its end."""
    return orjson.dumps(asdict(episode), option=orjson.OPT_APPEND_NEWLINE)


_FIELDS = frozenset(field.name for field in fields(ScoredEpisode))


def episode_of(values: Mapping[str, Any]) -> ScoredEpisode:
    """The episode of a line. Raises `ValueError`, `TypeError` or `KeyError` for what is none."""
    known = {name: value for name, value in values.items() if name in _FIELDS}
    return ScoredEpisode(**{**known, "failure": Failure(values["failure"])})


class EpisodeLog:
    """`episodes.jsonl`, open for appending, by several threads; a context manager.

    What an earlier writer did not finish is removed.
    """

    def __init__(self, directory: Path) -> None:
        self._path = directory / EPISODES
        self._lock = threading.Lock()
        is_new = not self._path.exists()
        self._file = self._path.open("ab", buffering=0)
        content = self._path.read_bytes()
        if content and not content.endswith(b"\n"):
            self._file.truncate(content.rfind(b"\n") + 1)
        if is_new:
            sync_directory(directory)

    def append(self, episode: ScoredEpisode) -> None:
        """Write one line. It is with the operating system when this returns.

        Raises:
            OSError: the disk is full, or does not take it; nothing of the line is left.
        """
        line = line_of(episode)
        with self._lock:
            end = os.fstat(self._file.fileno()).st_size
            if self._file.write(line) != len(line):
                self._file.truncate(end)
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(self._path))

    def close(self) -> None:
        """Close the file."""
        self._file.close()


def _entry(entry: PlannedEntry, newest: Mapping[Place, ScoredEpisode]) -> EvaluatedEntry:
    places = (
        (entry.name, task, sample)
        for task in range(entry.num_tasks)
        for sample in range(entry.samples_per_task)
    )
    return EvaluatedEntry(
        name=entry.name,
        environment=entry.environment,
        split=entry.split,
        num_tasks=entry.num_tasks,
        samples_per_task=entry.samples_per_task,
        success_score=entry.success_score,
        episodes=tuple(newest[place] for place in places if place in newest),
        sampling=_sampling(entry),
        scorer=_scorer(entry),
    )


def _sampling(entry: PlannedEntry) -> dict[str, object]:
    """What of the entry's config changes how its tasks are played, beside who plays."""
    environment, evaluation = entry.config.get("environment", {}), entry.config.get("evaluation", {})
    limits = {key: value for key, value in environment.items() if key == "options" or key.startswith("max_")}
    sampled = {
        key: evaluation[key] for key in ("temperature", "top_p", "top_k", "min_p") if key in evaluation
    }
    return limits | sampled


def _scorer(entry: PlannedEntry) -> str:
    """What grades, with the digests of the files that it names; empty where nobody wrote it down."""
    if "reward" not in entry.config:
        return ""
    reward = orjson.dumps(entry.config["reward"], option=orjson.OPT_SORT_KEYS).decode()
    files = [f"{path} {digest}" for path, digest in sorted(entry.files.items()) if path in reward]
    return " ".join([reward, *files])
