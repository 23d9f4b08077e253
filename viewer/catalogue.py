"""Which runs and evaluations there are, and how each stands."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any, Literal

from polyturn.configs.errors import ConfigError
from polyturn.configs.models import resolve_model_path
from polyturn.rollout.evaluation.directory import EVALUATIONS, PLAN, is_evaluation, read_evaluation
from polyturn.rollout.evaluation.records import Evaluation
from polyturn.viewer.episode_sets import EpisodeSets, StepCache
from polyturn.viewer.parameters import NotThere
from polyturn.viewer.plain_json import Json, finite, text_of
from polyturn.viewer.run_files import MetricRows, alarms_of, at, read_config, read_object
from polyturn.viewer.tokenizers import TokenTexts

Kind = Literal["training", "rollout", "evaluation"]
MARKS = ("config.yaml", "metrics.jsonl", "trajectories", "journal", PLAN)
"""What a directory has that is a run or an evaluation: one of these."""
STILL_S = 300.0
"""A run without a summary in which nothing was written for so long has stopped, or waits."""
HEADLINE = ("reward/mean", "success/mean", "heldout/mean", "episode/turns", "seconds/step")
MAX_RUNS = 500


@dataclass(kw_only=True)
class ViewedRun:
    """One run or evaluation that is shown."""

    id: str
    path: Path
    kind: Kind
    sets: EpisodeSets
    metrics: MetricRows
    _texts: TokenTexts | None = field(default=None)

    def config(self) -> tuple[str | None, dict[str, Any]]:
        """Of an evaluation, what was asked for."""
        return read_config(self.path / (PLAN if self.kind == "evaluation" else "config.yaml"))

    def texts(self) -> TokenTexts:
        """The tokenizer of the run's model, loaded once."""
        if self._texts is None:
            self._texts = TokenTexts(self._model())
        return self._texts

    def _model(self) -> Path | None:
        config = self.config()[1]
        named = at(config, "player", "model") if self.kind == "evaluation" else at(config, "model", "path")
        if not isinstance(named, str):
            return None
        try:
            return resolve_model_path(named, needs_weights=False)
        except (ConfigError, OSError, ValueError):
            return Path(named)

    def evaluation(self) -> Evaluation:
        """Raises `ValueError` where its files cannot be read."""
        return read_evaluation(self.path)

    def changed_at(self) -> tuple[float, int]:
        """When anything in it was last written, and how many bytes its files have."""
        newest, size = 0.0, 0
        for path in self._files():
            try:
                found = path.stat()
            except OSError:
                continue
            newest, size = max(newest, found.st_mtime), size + found.st_size
        return newest, size

    def _files(self) -> Iterator[Path]:
        stores = [self.path]
        if self.kind == "evaluation":
            stores += [one.directory for one in self.sets.sets()]
        for name in ("metrics.jsonl", "summary.json", "failed_check.json", "config.yaml", "episodes.jsonl"):
            yield self.path / name
        folders = [store / name for store in stores for name in ("trajectories", "journal", "failed")]
        for folder in [*folders, self.path / "evaluation"]:
            try:
                yield from folder.iterdir()
            except OSError:
                continue


class Catalogue:
    """The runs among some directories: each is one, or holds some. What comes later is found by `refresh`."""

    def __init__(self, directories: Sequence[Path]) -> None:
        self._directories = [path.absolute() for path in directories]
        self.cache = StepCache()
        self._runs: dict[str, ViewedRun] = {}
        self.problems: list[str] = []
        self.refresh()

    def refresh(self) -> None:
        """Look again for runs; those that are known keep their ids."""
        known = {run.path: run for run in self._runs.values()}
        self.problems = []
        found: dict[str, ViewedRun] = {}
        for path in dict.fromkeys(self._find()):
            run = known.get(path) or self._open(path, taken={*found, *self._runs})
            found[run.id] = run
        self._runs = found

    def runs(self) -> list[ViewedRun]:
        return list(self._runs.values())

    def run(self, identity: str) -> ViewedRun:
        """Raises `NotThere`."""
        if identity not in self._runs:
            self.refresh()
        if identity not in self._runs:
            raise NotThere(f"there is no run {identity[:200]!r}")
        return self._runs[identity]

    def _find(self) -> Iterator[Path]:
        for directory in self._directories:
            if is_run(directory):
                yield directory
                continue
            try:
                runs = _runs_in(directory)
            except OSError as fault:
                self.problems.append(f"{directory} cannot be read: {fault.strerror}")
                continue
            if not runs:
                self.problems.append(f"{directory} is no run or evaluation, and holds none")
            if len(runs) > MAX_RUNS:
                self.problems.append(
                    f"{directory} holds {len(runs)} runs; the last {MAX_RUNS} by name are shown"
                )
            yield from runs[-MAX_RUNS:]

    def _open(self, path: Path, *, taken: Iterable[str]) -> ViewedRun:
        names = set(taken)
        identity, number = path.name, 1
        while identity in names:
            number += 1
            identity = f"{path.name}~{number}"
        kind = kind_of(path)
        return ViewedRun(
            id=identity,
            path=path,
            kind=kind,
            sets=EpisodeSets(path, self.cache, is_evaluation=kind == "evaluation"),
            metrics=MetricRows(path / "metrics.jsonl"),
        )


def is_run(directory: Path) -> bool:
    """Whether a directory is a run or an evaluation."""
    try:
        return any((directory / name).exists() for name in MARKS)
    except OSError:
        return False


def kind_of(directory: Path) -> Kind:
    """What a run is."""
    if is_evaluation(directory):
        return "evaluation"
    return "rollout" if (directory / "rollout.json").exists() else "training"


def summary_of(run: ViewedRun) -> Json:
    """`RunSummary`."""
    config = run.config()[1]
    updated, size = run.changed_at()
    sets = run.sets.sets()
    rows = run.metrics.rows()
    alarms = alarms_of(rows)
    state, reason = _state(run, updated)
    made = {
        "id": run.id,
        "name": run.path.name,
        "path": str(run.path),
        "kind": run.kind,
        "state": state,
        "reason": reason,
        "step": rows[-1]["step"] if rows else None,
        "num_steps": _whole(at(config, "trainer", "num_steps")),
        "started": _started(run),
        "updated": updated if size else None,
        "environments": _environments(run, config),
        "policy": _policy(run, config),
        "headline": {name: finite(rows[-1][name]) for name in HEADLINE if rows and name in rows[-1]},
        "alarms": [alarm for alarm in alarms if alarm["until"] is None],
        "sets": [
            {"name": one.name, "title": one.title, "kind": one.kind, "steps": list(one.steps)} for one in sets
        ],
    }
    if run.kind == "evaluation":
        made |= _of_evaluation(run)
    return made


def _of_evaluation(run: ViewedRun) -> Json:
    try:
        found = run.evaluation()
    except (OSError, ValueError) as fault:
        return {"reason": str(fault)}
    asked = sum(entry.num_asked for entry in found.entries)
    scores = [
        [episode.score for episode in entry.episodes if episode.score is not None] for entry in found.entries
    ]
    means = [sum(of_entry) / len(of_entry) for of_entry in scores if of_entry]
    num_scored = sum(len(of_entry) for of_entry in scores)
    headline: dict[str, float | None] = {"coverage": num_scored / asked if asked else None}
    if means:
        headline = {"score": finite(sum(means) / len(means)), **headline}
    return {"headline": headline, "policy": found.policy}


def _state(run: ViewedRun, updated: float) -> tuple[str, str | None]:
    summary = read_object(run.path / "summary.json")
    status = summary.get("status")
    failure = read_object(run.path / "failed_check.json")
    if isinstance(failure.get("sentence"), str):
        return "failed", failure["sentence"][:2_000]
    if status in ("finished", "interrupted"):
        return status, None
    if run.kind == "evaluation" and (run.path / "report.json").exists():
        return "finished", None
    if time.time() - updated > STILL_S:
        return "stopped", "nothing was written for some minutes, and there is no summary"
    return "running", None


def _started(run: ViewedRun) -> float | None:
    stamp = run.path.name[-15:]
    try:
        return datetime.strptime(stamp, "%Y%m%d-%H%M%S").timestamp()
    except (ValueError, OverflowError, OSError):
        pass
    for name in (PLAN, "config.yaml", "metrics.jsonl"):
        try:
            return (run.path / name).stat().st_mtime
        except OSError:
            continue
    return None


def _environments(run: ViewedRun, config: dict[str, Any]) -> list[str]:
    if run.kind == "evaluation":
        entries = config.get("entries")
        named = [at(entry, "environment") for entry in entries] if isinstance(entries, list) else []
    else:
        named = [at(config, "environment", "id")]
    return list(dict.fromkeys(text_of(name)[:200] for name in named if name))


def _policy(run: ViewedRun, config: dict[str, Any]) -> str | None:
    named = at(config, "player", "label") if run.kind == "evaluation" else at(config, "model", "path")
    return None if named is None else text_of(named)[:300]


def _whole(value: Any) -> int | None:
    return value if isinstance(value, int) and not isinstance(value, bool) and abs(value) < 2**53 else None


def _runs_in(directory: Path) -> list[Path]:
    """What a folder holds, and its folder of evaluations. Raises `OSError` where it cannot be read."""
    below = directory / EVALUATIONS
    folders = [directory, below] if below.is_dir() else [directory]
    inside = [path for folder in folders for path in sorted(folder.iterdir()) if path.is_dir()]
    return sorted((path for path in inside if is_run(path)), key=lambda path: path.name)
