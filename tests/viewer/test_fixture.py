"""The files that the page's tests look at are files that the readers of runs and evaluations take."""

from __future__ import annotations

from pathlib import Path

import pytest

from polyturn.agents.episode import Outcome
from polyturn.rollout.evaluation.directory import read_evaluation
from polyturn.rollout.store import TrajectoryStore

pytest.importorskip("tokenizers")

from tests.viewer.fixture import NUM_STEPS, write_fixture


def test_the_files_are_those_of_runs_and_evaluations(tmp_path: Path) -> None:
    made = write_fixture(tmp_path)
    store = TrajectoryStore(made.run)
    assert store.steps() == list(range(1, NUM_STEPS))
    live = store.stored(NUM_STEPS)
    assert not live.damage and {episode.outcome for episode in live.episodes} == set(Outcome)
    assert any(len(episode.segments) > 1 for episode in store.read_step(1))
    assert any(episode.is_branch for episode in store.read_step(1))
    entries = {entry.name: entry for entry in read_evaluation(made.evaluation).entries}
    assert [(entry.num_asked, len(entry.episodes)) for entry in entries.values()] == [(16, 16), (8, 7)]
