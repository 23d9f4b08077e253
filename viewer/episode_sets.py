"""Which episodes a run or an evaluation has: its sets, their steps, and where each step's episodes stand."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from polyturn.agents.episode import Episode, Outcome
from polyturn.rollout.evaluation.directory import ENTRIES
from polyturn.rollout.store import TrajectoryStore
from polyturn.viewer.parameters import NotThere
from polyturn.viewer.step_rows import (
    EpisodeRows,
    StepRows,
    rows_of_file,
    rows_of_journal,
    sound_rows_of_file,
)

MAX_STEPS_LATER = 16
"""How many steps after the one that it was drawn for an episode is looked for."""
MAX_IN_MEMORY = 8
"""Journals and damaged files whose episodes are kept; others are read again."""
LEFT_OUT = "in no step: its group was filtered or left over, or waits for a later step"

Fingerprint = tuple[int, int] | None


@dataclass(frozen=True, kw_only=True, slots=True)
class EpisodeSet:
    """Episodes that are listed together."""

    name: str
    title: str
    kind: Literal["train", "heldout", "entry"]
    directory: Path
    """Of a store; of a held-out evaluation its one file."""
    steps: tuple[int, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class StepPart:
    """Episodes of a step that stand in one file."""

    step: int
    rows: StepRows
    dropped: Sequence[str | None] = ()
    """Of each, why no step was trained on it; empty: one was trained on all of them."""
    is_live: bool = False

    def why_dropped(self, place: int) -> str | None:
        return self.dropped[place] if self.dropped else None


def fingerprint(path: Path) -> Fingerprint:
    """What changes when a file does; None where it is not there."""
    try:
        found = os.stat(path)
    except OSError:
        return None
    return found.st_mtime_ns, found.st_size


@dataclass(kw_only=True)
class _Kept:
    mark: Fingerprint
    rows: StepRows


@dataclass
class StepCache:
    """The rows of files that were read, as long as the files are as they were."""

    _kept: dict[Path, _Kept] = field(default_factory=dict)
    _damaged: dict[Path, Fingerprint] = field(default_factory=dict)

    def file(self, path: Path) -> StepRows:
        """Of a columnar file."""
        is_damaged = path in self._damaged and self._damaged[path] == fingerprint(path)
        return self._rows(path, sound_rows_of_file if is_damaged else rows_of_file)

    def journal(self, path: Path) -> StepRows:
        """Of a journal."""
        return self._rows(path, rows_of_journal)

    def distrust(self, path: Path) -> None:
        """A file is damaged: read its sound rows alone from now on."""
        self._kept.pop(path, None)
        self._damaged[path] = fingerprint(path)

    def _rows(self, path: Path, read: Callable[[Path], StepRows]) -> StepRows:
        mark = fingerprint(path)
        kept = self._kept.pop(path, None)
        if kept is None or kept.mark != mark:
            kept = _Kept(mark=mark, rows=read(path))
        self._kept[path] = kept  # behind the others: the newest used
        in_memory = [name for name, one in self._kept.items() if isinstance(one.rows, EpisodeRows)]
        for name in in_memory[:-MAX_IN_MEMORY]:
            del self._kept[name]
        return kept.rows


class EpisodeSets:
    """The sets of one directory. Files come and go while it is looked at: what is gone has no episodes."""

    def __init__(self, directory: Path, cache: StepCache, *, is_evaluation: bool) -> None:
        self._directory = directory
        self._cache = cache
        self._is_evaluation = is_evaluation

    def sets(self) -> list[EpisodeSet]:
        """All of them, the first being that which is shown unless another is asked for."""
        if self._is_evaluation:
            return [
                EpisodeSet(name=path.name, title=path.name, kind="entry", directory=path, steps=_steps(path))
                for path in _folders(self._directory / ENTRIES)
            ]
        train = EpisodeSet(
            name="train",
            title="training",
            kind="train",
            directory=self._directory,
            steps=_steps(self._directory),
        )
        return [train, *self._heldout()]

    def _heldout(self) -> Iterator[EpisodeSet]:
        for path in _files(self._directory / "evaluation", ".parquet"):
            title = f"held-out, {path.stem.replace('_', ' ')}"
            yield EpisodeSet(
                name=f"heldout:{path.stem}", title=title, kind="heldout", directory=path, steps=(0,)
            )

    def find(self, name: str | None) -> EpisodeSet:
        """The set of that name, or the first one. Raises `NotThere`."""
        for one in self.sets():
            if name is None or one.name == name:
                return one
        raise NotThere(
            "there are no episodes" if name is None else f"there are no episodes called {name[:200]!r}"
        )

    def parts(self, one: EpisodeSet, step: int) -> list[StepPart]:
        """The episodes of a step; none where there are none."""
        if one.kind == "heldout":
            return [StepPart(step=0, rows=self._cache.file(one.directory))] if step == 0 else []
        store = TrajectoryStore(one.directory)
        parts = []
        has_file = store.path(step).exists()
        if has_file:
            parts.append(StepPart(step=step, rows=self._cache.file(store.path(step))))
        paths = (store.journal_path(step), store.failures_path(step))
        journals = [self._cache.journal(path) for path in paths if path.exists()]
        if journals:
            left = self._not_in_a_file(one, step, journals)
            problems = [sentence for journal in journals for sentence in journal.problems]
            if left or problems:
                rows = EpisodeRows([episode for episode, _ in left], problems)
                why = [reason for _, reason in left]
                parts.append(StepPart(step=step, rows=rows, dropped=why, is_live=not has_file))
        return parts

    def _not_in_a_file(
        self, one: EpisodeSet, step: int, journals: Sequence[StepRows]
    ) -> list[tuple[Episode, str | None]]:
        """The episodes of journals that no columnar file has, and why, where that is known."""
        store = TrajectoryStore(one.directory)
        later = [number for number in one.steps if step <= number <= step + MAX_STEPS_LATER]
        files = [store.path(number) for number in later if store.path(number).exists()]
        written = {name for path in files for name in self._cache.file(path).column("episode_id").to_pylist()}
        found: list[tuple[Episode, str | None]] = []
        attempts = (journal.episode(place) for journal in journals for place in range(len(journal)))
        for episode in attempts:
            if episode is None or episode.episode_id in written:
                continue
            written.add(episode.episode_id)
            if episode.outcome is Outcome.FAILED:
                found.append((episode, f"failed: {episode.stop_reason}"))
            else:
                found.append((episode, LEFT_OUT if store.path(step).exists() else None))
        return found


def _steps(directory: Path) -> tuple[int, ...]:
    found = {
        int(digits)
        for folder, ending in (("trajectories", ".parquet"), ("journal", ".journal"), ("failed", ".journal"))
        for path in _files(directory / folder, ending)
        if (digits := path.stem.removeprefix("step_")).isascii() and digits.isdigit() and len(digits) < 10
    }
    return tuple(sorted(found)) or (0,)


def _files(folder: Path, ending: str) -> list[Path]:
    try:
        return sorted(path for path in folder.iterdir() if path.name.endswith(ending))
    except OSError:
        return []


def _folders(folder: Path) -> list[Path]:
    try:
        return sorted(path for path in folder.iterdir() if path.is_dir())
    except OSError:
        return []
