"""The directory of an evaluation, as it is read by whoever looks at one, also where its writer was killed."""

from __future__ import annotations

from contextlib import closing
from dataclasses import replace
from pathlib import Path

import pytest

from polyturn.rollout.evaluation.directory import (
    EPISODES,
    PLAN,
    EpisodeLog,
    line_of,
    read_evaluation,
    write_plan,
)
from polyturn.rollout.evaluation.plan import EvaluationPlan, PlannedEntry, Player
from polyturn.rollout.evaluation.records import Failure, ScoredEpisode

PLANNED = EvaluationPlan(
    suite="two",
    player=Player(name="oracle", label="the oracle"),
    package="1.0",
    created="2026-01-31T12:00:00Z",
    entries=[
        PlannedEntry(
            name="one", environment="E-v0", split="test", num_tasks=2, samples_per_task=2, success_score=1.0
        )
    ],
)
SCORED = ScoredEpisode(
    entry="one",
    task_index=0,
    sample=0,
    task_id="t0",
    task_digest="d0",
    seed=1,
    episode_id="eval000000.0.0",
    failure=Failure.NONE,
    score=1.0,
    answer="42\r\n\u2028é",
    outcome="completed",
    stop_reason="terminated",
    num_turns=1,
    num_prompt_tokens=3,
    num_completion_tokens=2,
    num_tool_calls=0,
    num_tool_errors=0,
    generate_s=0.1,
    tools_s=0.0,
    queue_s=0.0,
    total_s=0.1,
    metrics={"hops": 2.0},
)
FAILED = replace(SCORED, failure=Failure.SCORER, score=None, answer=None, error="the judge was away")


def test_episodes_come_back_as_they_were_and_the_last_of_each_holds(tmp_path: Path) -> None:
    write_plan(tmp_path, PLANNED)
    other = replace(SCORED, task_index=1, sample=1)
    with closing(EpisodeLog(tmp_path)) as log:
        for episode in (other, FAILED, SCORED, replace(SCORED, entry="unknown"), replace(SCORED, sample=7)):
            log.append(episode)
    read = read_evaluation(tmp_path)
    assert (read.suite, read.policy) == ("two", "the oracle")
    [entry] = read.entries
    assert entry.episodes == (SCORED, other)
    assert (entry.num_asked, entry.success_score) == (4, 1.0)


def test_a_line_that_was_not_finished_is_no_episode_and_the_next_one_is_whole(tmp_path: Path) -> None:
    write_plan(tmp_path, PLANNED)
    whole = line_of(SCORED)
    for cut in (1, len(whole) // 2, len(whole) - 1):
        (tmp_path / EPISODES).write_bytes(whole + line_of(FAILED)[:cut])
        assert read_evaluation(tmp_path).entries[0].episodes == (SCORED,)
        with closing(EpisodeLog(tmp_path)) as log:
            log.append(replace(SCORED, sample=1))
        assert [episode.sample for episode in read_evaluation(tmp_path).entries[0].episodes] == [0, 1]


def test_what_is_no_evaluation_is_refused_in_a_sentence(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"is no evaluation: it has no evaluation.yaml"):
        read_evaluation(tmp_path)
    for text, complaint in (
        ("name: smoke\n", "has no 'format'"),
        ("format: 99\n", "format 99 is of a later release"),
        ("format: 1\nsuite: two\n", "is damaged: player: Field required"),
        ("- a list\n", "expected `key: value` lines"),
    ):
        (tmp_path / PLAN).write_text(text)
        with pytest.raises(ValueError, match=complaint) as refused:
            read_evaluation(tmp_path)
        assert "\n" not in str(refused.value)
    with pytest.raises(FileExistsError, match="holds an evaluation already"):
        write_plan(tmp_path, PLANNED)
