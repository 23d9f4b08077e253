"""Journal and columnar store: what is read is what was written, whatever happened to the writer."""

import asyncio
import os
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import numpy as np
import orjson
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from polyturn.agents.episode import Episode, EpisodeTimings, Outcome, TurnRecord
from polyturn.agents.ledger import Segment
from polyturn.rollout.journal import (
    JSON_LENGTH,
    MARK,
    Journal,
    decode_episode,
    encode_episode,
    read_journal,
)
from polyturn.rollout.store import (
    BRANCH_COLUMNS,
    OPTIONAL_COLUMNS,
    ROWS_PER_GROUP,
    SCHEMA,
    TrajectoryStore,
    read_episodes,
    read_sound_episodes,
    write_episodes,
)
from polyturn.tools.types import ToolUsage

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
    taught = draw(st.none() | st.lists(FLOAT32, min_size=len(rows), max_size=len(rows)))
    return Segment(
        **{name: tuple(column) for name, column in zip(names, columns, strict=True)},
        teacher_logprobs=None if taught is None else np.array(taught, dtype=np.float32),
    )


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
        task_digest=draw(TEXT),
        group_reward=None if failed else draw(st.none() | FLOATS),
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
        num_drawn_tokens=draw(st.integers(0, 2**40)),
        failed_part=draw(st.sampled_from(["", "tool 'search'"])) if failed else "",
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
def test_what_is_encoded_comes_back_as_arrays_of_its_own(episode):
    content = encode_episode(episode)
    found = decode_episode(content)
    assert found == episode
    for segment in found.segments:
        assert segment.token_ids.flags.writeable and segment.token_ids.flags.owndata


@given(st.lists(episodes(), max_size=5, unique_by=lambda episode: episode.episode_id))
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=50, deadline=None)
def test_columnar_round_trip(tmp_path, written):
    store = TrajectoryStore(tmp_path)
    store.write_step(7, written, advantages={e.episode_id: 0.5 for e in written[:2]})
    assert store.read_step(7) == written
    table = pq.read_table(store.path(7))
    optional = set(OPTIONAL_COLUMNS) & set(table.column_names)
    assert table.drop_columns(sorted(optional)).schema.equals(SCHEMA)
    assert table.num_rows == sum(max(1, len(episode.segments)) for episode in written)
    with_advantage = {row["episode_id"] for row in table.to_pylist() if row["advantage"] is not None}
    assert with_advantage == {episode.episode_id for episode in written[:2]}


def test_when_an_episode_waited_for_what_is_kept(tmp_path):
    spans = (("queue", 0.0, 0.25), ("generate", 0.25, 1.5), ("tools", 1.5, 2.0))
    episode = simple_episode()
    waited = replace(episode, episode_id="g00000000.1.0", timings=replace(episode.timings, spans=spans))
    write_episodes(tmp_path / "step.parquet", [episode, waited], step=1)
    assert [one.timings.spans for one in read_episodes(tmp_path / "step.parquet")] == [(), spans]


def test_the_journal_is_kept_until_the_step_is_trained(tmp_path):
    store = TrajectoryStore(tmp_path)
    failed = simple_episode("g00000000.0.0", None)
    for episode in (failed, simple_episode("g00000000.0.1")):
        store.journal(1, episode)
    store.write_step(1, [simple_episode("g00000000.0.1")])
    assert store.journaled(1) == [failed, simple_episode("g00000000.0.1")], (
        "failed attempts are not made again"
    )
    assert store.steps() == [1]
    assert store.journaled(2) == []
    store.journal(2, simple_episode())
    store.forget(1)
    assert [path.name for path in (tmp_path / "journal").iterdir()] == ["step_000002.journal"]
    assert store.journaled(1) == [simple_episode("g00000000.0.1")]
    store.forget(2)
    store.journal(2, simple_episode())
    assert store.journaled(2) == [simple_episode()], "a journal that was forgotten begins anew"


def test_a_step_that_is_set_aside_is_played_anew_and_nothing_is_lost(tmp_path):
    store = TrajectoryStore(tmp_path)
    assert store.set_aside(1) is None
    for number in (1, 2):
        store.journal(1, simple_episode())
        store.write_step(1, [simple_episode()])
        aside = store.set_aside(1)
        assert aside == tmp_path / "set_aside" / f"step_000001-{number}"
        assert sorted(path.name for path in aside.iterdir()) == ["step_000001.journal", "step_000001.parquet"]
        assert store.journaled(1) == [] and store.steps() == []


def test_branches_have_columns_of_their_own_and_files_without_any_are_as_before(tmp_path):
    trunk, branch, refused = FOUR[0], replace(FOUR[1], parent_id=FOUR[0].episode_id, branch_turn=2), FOUR[2]
    refused = replace(refused, parent_id=FOUR[0].episode_id)
    store = TrajectoryStore(tmp_path)
    for step, written in ((1, [trunk]), (2, [trunk, branch, refused])):
        store.write_step(step, written)
        assert store.read_step(step) == written
    assert not set(BRANCH_COLUMNS) & set(pq.read_schema(store.path(1)).names)
    assert pq.read_table(store.path(2)).column("parent_id").to_pylist() == [
        None,
        "g00000000.0.0",
        "g00000000.0.0",
    ]
    assert pq.read_table(store.path(2)).column("branch_turn").to_pylist() == [None, 2, 0]
    assert branch.is_branch and not refused.is_branch and not trunk.is_branch


def test_recovered_calls_have_a_column_of_their_own_and_files_without_any_are_as_before(tmp_path):
    recovered = replace(FOUR[0], num_recovered_calls=3)
    store = TrajectoryStore(tmp_path)
    for step, written in ((1, [FOUR[0]]), (2, [recovered, FOUR[1]])):
        store.write_step(step, written)
        assert store.read_step(step) == written
        assert ("num_recovered_calls" in pq.read_schema(store.path(step)).names) == (step == 2)
    assert decode_episode(encode_episode(recovered)) == recovered


def test_what_teachers_said_has_a_column_of_its_own_and_files_without_any_are_as_before(tmp_path):
    (segment, *rest) = FOUR[0].segments
    said = np.linspace(-2, 0, len(segment), dtype=np.float32)
    taught = replace(FOUR[0], segments=(replace(segment, teacher_logprobs=said), *rest))
    store = TrajectoryStore(tmp_path)
    for step, written in ((1, [FOUR[0]]), (2, [taught, FOUR[1]])):
        store.write_step(step, written)
        assert store.read_step(step) == written
        assert ("teacher_logprobs" in pq.read_schema(store.path(step)).names) == (step == 2)
    assert taught != FOUR[0] and decode_episode(encode_episode(taught)) == taught


def test_a_journal_from_before_episodes_branched_or_had_teachers_is_read():
    content = encode_episode(FOUR[0])
    (length,) = JSON_LENGTH.unpack_from(content)
    values = orjson.loads(content[JSON_LENGTH.size : JSON_LENGTH.size + length])
    del values["parent_id"], values["branch_turn"], values["num_recovered_calls"]
    for segment in values["segments"]:
        del segment["is_taught"]
    text = orjson.dumps(values)
    assert (
        decode_episode(JSON_LENGTH.pack(len(text)) + text + content[JSON_LENGTH.size + length :]) == FOUR[0]
    )


@pytest.mark.parametrize("num_lost", [2, 300])
def test_a_torn_record_is_tolerated_counted_and_overwritten(tmp_path, num_lost):
    path = tmp_path / "journal"
    write_journal(path, FOUR[:3])
    path.write_bytes(path.read_bytes()[:-num_lost])
    contents = read_journal(path)
    assert list(contents.episodes) == FOUR[:2]
    assert contents.num_truncated == 1 and not contents.damage
    write_journal(path, FOUR[3:])
    contents = read_journal(path)
    assert list(contents.episodes) == [*FOUR[:2], FOUR[3]]
    assert contents.num_truncated == 0 and not contents.damage


def write_journal(path, written):
    journal = Journal(path)
    for episode in written:
        journal.append(episode)
    journal.close()


FOUR = [simple_episode(f"g00000000.{sample}.0", float(sample)) for sample in range(4)]


def test_what_is_no_record_is_damage_and_costs_nothing_else(tmp_path):
    path = tmp_path / "journal"
    pieces = []
    for episode in FOUR:
        write_journal(path, [episode])
        pieces.append(path.read_bytes())
        path.unlink()
    path.write_bytes(b"".join([pieces[0], b"junk" * 20, pieces[1], MARK * 9, *pieces[2:]]))
    contents = read_journal(path)
    assert list(contents.episodes) == FOUR
    assert len(contents.damage) == 2
    assert f"{path}: record 2" in contents.damage[0] and "damaged" in contents.damage[0]


def flipped(content: bytes, bit: int) -> bytes:
    changed = bytearray(content)
    changed[bit // 8] ^= 1 << bit % 8
    return bytes(changed)


def test_every_flipped_bit_of_a_journal_is_found_and_costs_its_episode_alone(tmp_path):
    path = tmp_path / "journal"
    write_journal(path, FOUR)
    content = path.read_bytes()
    for bit in range(0, 8 * len(content), 3):
        path.write_bytes(flipped(content, bit))
        contents = read_journal(path)
        lost = [episode for episode in FOUR if episode not in contents.episodes]
        assert len(lost) == 1 and len(contents.episodes) == 3, bit
        assert len(contents.damage) == 1 and not contents.num_truncated, bit


def test_wherever_a_journal_is_cut_what_is_before_comes_back_and_what_is_written_behind(tmp_path):
    path = tmp_path / "journal"
    ends = [0]
    for episode in FOUR:
        write_journal(path, [episode])
        ends.append(path.stat().st_size)
    content = path.read_bytes()
    for length in range(0, len(content), 7):
        path.write_bytes(content[:length])
        num_whole = sum(end <= length for end in ends) - 1
        contents = read_journal(path)
        assert list(contents.episodes) == FOUR[:num_whole], length
        assert contents.num_truncated == (length not in ends) and not contents.damage, length
        write_journal(path, [simple_episode("later")])
        assert list(read_journal(path).episodes) == [*FOUR[:num_whole], simple_episode("later")], length


@given(written=st.lists(episodes(), min_size=1, max_size=4), data=st.data())
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=60, deadline=None)
def test_a_changed_byte_of_any_journal_costs_one_episode(tmp_path, written, data):
    path = tmp_path / "journal"
    path.unlink(missing_ok=True)
    write_journal(path, written)
    content = bytearray(path.read_bytes())
    content[data.draw(st.integers(0, len(content) - 1))] ^= data.draw(st.integers(1, 255))
    path.write_bytes(content)
    contents = read_journal(path)
    kept = iter(written)
    assert all(any(episode == found for episode in kept) for found in contents.episodes), "in their order"
    assert len(contents.episodes) == len(written) - 1
    assert len(contents.damage) == 1 and not contents.num_truncated


async def test_an_episode_whose_waiter_is_cancelled_is_written_all_the_same(tmp_path):
    store = TrajectoryStore(tmp_path)
    waiting = [asyncio.create_task(store.keep(1, episode)) for episode in FOUR]
    await asyncio.sleep(0)
    for task in waiting:
        task.cancel()
    await asyncio.gather(*waiting, return_exceptions=True)
    store.close()
    assert store.journaled(1) == FOUR


def test_threads_write_whole_records(tmp_path):
    path = tmp_path / "journal"
    journal = Journal(path)
    written = [simple_episode(f"g{number:08d}.0.0", float(number)) for number in range(200)]
    with ThreadPoolExecutor(8) as threads:
        list(threads.map(journal.append, written))
    journal.close()
    contents = read_journal(path)
    assert sorted(contents.episodes, key=lambda episode: episode.episode_id) == written
    assert not contents.damage


@given(data=st.data())
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=60, deadline=None)
def test_a_flipped_bit_of_a_columnar_file_is_found_or_changes_nothing(tmp_path, data):
    """Where the journal is there, too, not even the damaged episode is lost."""
    store = TrajectoryStore(tmp_path)
    path = store.path(1)
    if not path.exists():
        store.write_step(1, FOUR)
        path.with_suffix(".whole").write_bytes(path.read_bytes())
    content = path.with_suffix(".whole").read_bytes()
    path.write_bytes(flipped(content, data.draw(st.integers(0, 8 * len(content) - 1))))
    try:
        stored = read_sound_episodes(path)
    except ValueError as error:
        assert "columns of a trajectory file of any release" in str(error)
        return
    assert list(stored.episodes) == FOUR or stored.damage
    assert all(episode in FOUR for episode in stored.episodes)
    if stored.damage:
        assert str(path) in stored.damage[0]
        with pytest.raises(ValueError, match="damaged"):
            read_episodes(path)


def test_a_file_of_another_release_is_refused_and_its_step_is_played_again(tmp_path):
    store = TrajectoryStore(tmp_path)
    store.write_step(1, FOUR)
    table = pq.read_table(store.path(1)).drop_columns(["checksum"])
    pq.write_table(table, store.path(1))
    with pytest.raises(ValueError, match="does not have the columns"):
        read_episodes(store.path(1))
    assert store.journaled(1) == [] and "does not have the columns" in store.stored(1).damage[0]
    with pytest.raises(FileNotFoundError):
        read_episodes(store.path(2))


def test_damage_costs_the_rows_that_it_is_in(tmp_path):
    written = [simple_episode(f"g{sample:08d}.0.0", float(sample)) for sample in range(4 * ROWS_PER_GROUP)]
    path = tmp_path / "step.parquet"
    write_episodes(path, written, step=1)
    column = pq.ParquetFile(path).metadata.row_group(1).column(SCHEMA.get_field_index("env_id"))
    content = bytearray(path.read_bytes())
    content[column.data_page_offset + column.total_compressed_size // 2] ^= 1
    path.write_bytes(content)
    stored = read_sound_episodes(path)
    assert list(stored.episodes) == written[:ROWS_PER_GROUP] + written[2 * ROWS_PER_GROUP :]
    assert len(stored.damage) == 1 and "row group 1" in stored.damage[0]


def test_journal_and_columnar_file_make_up_for_each_other(tmp_path):
    store = TrajectoryStore(tmp_path)
    for episode in FOUR:
        store.journal(1, episode)
    store.write_step(1, FOUR)
    journal = tmp_path / "journal" / "step_000001.journal"
    content = journal.read_bytes()
    journal.write_bytes(flipped(content, 4 * len(content)))
    assert sorted(store.journaled(1), key=lambda episode: episode.episode_id) == FOUR
    assert len(store.stored(1).damage) == 1
    store.path(1).write_bytes(b"PAR1 and so on")
    assert len(store.journaled(1)) == 3 and len(store.stored(1).damage) == 2


def test_a_full_disk_leaves_the_journal_as_it_was(tmp_path):
    """The kernel's limit on a file's size stands in for the disk."""
    script = """
import random, resource, signal, string, sys
from pathlib import Path
from polyturn.agents.episode import Episode, Outcome
from polyturn.rollout.store import TrajectoryStore
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
def episode(number):
    return Episode(episode_id=f"g0.{number}.0", group_id="g0", env_id="e", task_id="t", seed=number, reward=1.0,
                   outcome=Outcome.COMPLETED, stop_reason="terminated",
                   messages=({"role": "user", "content": "".join(random.choices(string.printable, k=5000))},))
store = TrajectoryStore(Path(sys.argv[1]))
resource.setrlimit(resource.RLIMIT_FSIZE, (10000, resource.RLIM_INFINITY))
written = []
for number in range(5):
    try:
        store.journal(1, episode(number))
        written.append(number)
    except OSError:
        pass
assert written == [0, 1], written
assert [found.seed for found in store.journaled(1)] == written
resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
store.journal(1, episode(7))
assert [found.seed for found in store.journaled(1)] == [0, 1, 7] and not store.stored(1).damage
resource.setrlimit(resource.RLIMIT_FSIZE, (2000, resource.RLIM_INFINITY))
try:
    store.write_step(1, [episode(0)])
    raise SystemExit("it was written")
except OSError:
    pass
assert not list(Path(sys.argv[1]).glob("trajectories/*")), "what could not be finished is removed"
"""
    done = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path)], capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr


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
