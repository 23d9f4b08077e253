"""Journal and columnar store: what is read is what was written, whatever happened to the writer."""

import os
import signal
import subprocess
import sys
import time

import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from polyturn.agents.episode import Episode, EpisodeTimings, Outcome, TurnRecord
from polyturn.agents.ledger import Segment
from polyturn.rollout.journal import Journal, decode_episode, encode_episode, read_journal
from polyturn.rollout.store import SCHEMA, TrajectoryStore
from polyturn.tools.metrics import ToolUsage

FLOAT32 = st.floats(width=32, allow_nan=False, allow_infinity=False, min_value=-(2.0**60), max_value=0.0)
FLOATS = st.floats(allow_nan=False, allow_infinity=False)
TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=20)
SECONDS = st.floats(0, 1e6)


@st.composite
def segments(draw):
    rows = draw(
        st.lists(
            st.tuples(
                st.integers(0, 2**31 - 1),
                st.booleans(),
                FLOAT32,
                st.integers(-1, 2**31 - 1),
                st.integers(0, 2**15 - 1),
            ),
            max_size=8,
        )
    )
    columns = list(zip(*rows, strict=True)) or [()] * 5
    names = ("token_ids", "sampled", "logprobs", "policy_versions", "turns")
    return Segment(**{name: tuple(column) for name, column in zip(names, columns, strict=True)})


def usages():
    counts = dict.fromkeys(("num_calls", "num_failures", "num_timeouts", "num_truncated"), st.integers(0, 99))
    return st.builds(ToolUsage, **counts, seconds=SECONDS, max_seconds=SECONDS, queue_s=SECONDS, cost=FLOATS)


@st.composite
def episodes(draw, identity=None):
    outcome = draw(st.sampled_from(list(Outcome)))
    failed = outcome is Outcome.FAILED
    message = st.fixed_dictionaries({"role": st.sampled_from(["user", "assistant", "tool"]), "content": TEXT})
    return Episode(
        episode_id=identity or draw(st.uuids().map(str)),
        group_id=draw(TEXT),
        env_id=draw(TEXT),
        task_id=draw(TEXT),
        seed=draw(st.integers(0, 2**48 - 1)),
        outcome=outcome,
        stop_reason=draw(TEXT),
        reward=None if failed else draw(FLOATS),
        reward_parts=draw(st.dictionaries(TEXT, FLOATS, max_size=3)),
        metrics=draw(st.dictionaries(TEXT, FLOATS, max_size=3)),
        num_turns=draw(st.integers(0, 99)),
        turn_records=tuple(
            draw(st.lists(st.builds(TurnRecord, role=TEXT, reward=FLOATS, anchor=TEXT), max_size=3))
        ),
        num_tool_calls=draw(st.integers(0, 99)),
        num_tool_errors=draw(st.integers(0, 99)),
        tools=draw(st.dictionaries(TEXT, usages(), max_size=2)),
        messages=tuple(draw(st.lists(message, max_size=3))),
        segments=tuple(draw(st.lists(segments(), max_size=3))),
        timings=EpisodeTimings(
            generate_s=draw(SECONDS), tools_s=draw(SECONDS), queue_s=draw(SECONDS), total_s=draw(SECONDS)
        ),
        error=draw(st.none() | TEXT),
    )


def simple_episode(identity="g00000000.0.0", reward=1.0, logprobs=(0.0, -0.125)):
    outcome = Outcome.FAILED if reward is None else Outcome.COMPLETED
    segment = Segment(
        token_ids=(5, 6), sampled=(False, True), logprobs=logprobs, policy_versions=(-1, 3), turns=(0, 0)
    )
    return Episode(
        episode_id=identity,
        group_id=identity.split(".")[0],
        env_id="env",
        task_id="task",
        seed=1,
        outcome=outcome,
        stop_reason="terminated",
        reward=reward,
        segments=(segment,),
    )


@given(episodes())
@settings(deadline=None)
def test_journal_line_round_trip(episode):
    line = encode_episode(episode)
    assert b"\n" not in line
    assert decode_episode(line) == episode


@given(st.lists(episodes(), max_size=5, unique_by=lambda episode: episode.episode_id))
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=50, deadline=None)
def test_columnar_round_trip(tmp_path, written):
    store = TrajectoryStore(tmp_path)
    store.write_step(7, written, advantages={e.episode_id: 0.5 for e in written[:2]})
    assert store.read_step(7) == written
    table = pq.read_table(store.path(7))
    assert table.schema.equals(SCHEMA)
    assert table.num_rows == sum(max(1, len(episode.segments)) for episode in written)
    with_advantage = {row["episode_id"] for row in table.to_pylist() if row["advantage"] is not None}
    assert with_advantage == {episode.episode_id for episode in written[:2]}


def test_write_step_replaces_the_journal(tmp_path):
    store = TrajectoryStore(tmp_path)
    store.journal(1, simple_episode())
    assert store.journaled(1) == [simple_episode()]
    store.write_step(1, [simple_episode()])
    assert not list((tmp_path / "journal").iterdir())
    assert store.journaled(1) == [simple_episode()], "a step that got as far as its file counts as played"
    assert store.steps() == [1]
    assert store.journaled(2) == []


def test_discard_after_removes_later_steps_only(tmp_path):
    store = TrajectoryStore(tmp_path)
    for step in (1, 2, 3):
        store.write_step(step, [simple_episode()])
    store.journal(4, simple_episode())
    store.discard_after(2)
    assert store.steps() == [1, 2]
    assert store.journaled(4) == []


@pytest.mark.parametrize("num_lost", [1, 30])
def test_truncated_last_line_is_tolerated_counted_and_overwritten(tmp_path, num_lost):
    path = tmp_path / "journal.jsonl"
    journal = Journal(path)
    for sample in range(3):
        journal.append(simple_episode(f"g00000000.{sample}.0"))
    journal.close()
    path.write_bytes(path.read_bytes()[:-num_lost])
    contents = read_journal(path)
    assert [episode.episode_id for episode in contents.episodes] == ["g00000000.0.0", "g00000000.1.0"]
    assert contents.num_truncated == 1
    journal = Journal(path)
    journal.append(simple_episode("g00000000.9.0"))
    journal.close()
    contents = read_journal(path)
    assert [episode.episode_id[-3] for episode in contents.episodes] == ["0", "1", "9"]
    assert contents.num_truncated == 0


def test_damaged_line_names_file_and_line(tmp_path):
    path = tmp_path / "journal.jsonl"
    journal = Journal(path)
    journal.append(simple_episode())
    journal.close()
    path.write_bytes(path.read_bytes() + b"{}\n")
    with pytest.raises(ValueError, match=r"journal\.jsonl:2"):
        read_journal(path)


def test_a_logprob_that_is_not_finite_is_our_own_fault():
    with pytest.raises(AssertionError, match="not finite"):
        encode_episode(simple_episode(logprobs=(0.0, float("-inf"))))


def test_interrupted_write_leaves_no_half_file(tmp_path, monkeypatch):
    store = TrajectoryStore(tmp_path)
    store.journal(1, simple_episode())

    def fail(*args):
        raise OSError("disk full")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OSError, match="disk full"):
        store.write_step(1, [simple_episode()])
    assert store.steps() == []
    assert store.journaled(1) == [simple_episode()]


WRITER = """
import sys
from pathlib import Path
from polyturn.agents.episode import Episode, Outcome
from polyturn.rollout.store import TrajectoryStore
store = TrajectoryStore(Path(sys.argv[1]))
number = 0
while True:
    store.journal(1, Episode(episode_id=f"g0.{number}.0", group_id="g0", env_id="e", task_id="t", seed=number,
                             outcome=Outcome.COMPLETED, stop_reason="terminated", reward=1.0,
                             messages=({"role": "user", "content": "x" * 3000},)))
    number += 1
    print(number, flush=True)
"""


def test_every_journaled_episode_survives_kill_9(tmp_path):
    writer = subprocess.Popen(
        [sys.executable, "-c", WRITER, str(tmp_path)], stdout=subprocess.PIPE, text=True
    )
    time.sleep(0.2)
    assert writer.stdout is not None
    first = int(writer.stdout.readline())
    writer.send_signal(signal.SIGKILL)
    confirmed = max([first, *(int(line) for line in writer.stdout.read().splitlines() if line)])
    writer.wait()
    seeds = [episode.seed for episode in TrajectoryStore(tmp_path).journaled(1)]
    assert seeds == list(range(len(seeds)))
    assert len(seeds) >= confirmed >= 1
