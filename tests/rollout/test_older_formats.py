"""Run directories that earlier releases wrote are read, and of a later one's it is said that it is one."""

from __future__ import annotations

import shutil
import struct
import zlib
from dataclasses import replace
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from polyturn.agents.episode import Episode, EpisodeTimings, Outcome, TurnRecord
from polyturn.agents.ledger import Segment
from polyturn.rollout.journal import HEAD, HEAD_CHECKED, Journal, read_journal
from polyturn.rollout.older_formats import FORMAT, FORMAT_KEY, JOURNAL_FORMAT, LaterFormat
from polyturn.rollout.store import SCHEMA, TrajectoryStore, check_format, write_episodes
from polyturn.tools.types import ToolUsage

WRITTEN = Path(__file__).parent / "older_formats"
"""By releases of these formats: the same episodes, with what each has a place for."""


def segment(*token_ids: int) -> Segment:
    """Drawn by version 7 from the third token on, in a second turn from the fourth on."""
    places = range(len(token_ids))
    return Segment(
        token_ids=token_ids,
        sampled=[place >= 2 for place in places],
        logprobs=[-0.5 if place >= 2 else 0.0 for place in places],
        policy_versions=[7 if place >= 2 else -1 for place in places],
        turns=[int(place >= 3) for place in places],
    )


FIRST = Episode(
    episode_id="g00000001.0.0",
    group_id="g00000001",
    env_id="polyturn/TwoHop-v0",
    task_id="task 1",
    seed=12,
    outcome=Outcome.COMPLETED,
    stop_reason="terminated",
    reward=0.75,
    reward_parts={"correct": 0.5, "format": 0.25},
    num_turns=2,
    num_tool_calls=1,
    messages=({"role": "user", "content": "was früher war"}, {"role": "assistant", "content": "so"}),
    segments=(segment(5, 6, 7, 8), segment(5, 9, 10)),
    timings=EpisodeTimings(generate_s=1.5, tools_s=0.25, queue_s=0.125, total_s=2.0),
)
IN_FORMAT = {
    "format_1_first": FIRST,
    "format_1_last": replace(
        FIRST,
        metrics={"hops": 2.0},
        tools={"search": ToolUsage(num_calls=1, seconds=0.25, max_seconds=0.25)},
        turn_records=(TurnRecord(anchor="a"), TurnRecord(anchor="b", reward=0.5)),
    ),
}
IN_FORMAT["format_2"] = replace(IN_FORMAT["format_1_last"], task_digest="d1", group_reward=0.25)
IN_FORMAT["format_3"] = IN_FORMAT["format_2"]


def stored_in(name: str) -> tuple[Episode, Episode, Episode]:
    """What stands in the run directories; the last one failed, and is in the journal alone."""
    first = IN_FORMAT[name]
    cut_off = replace(
        first,
        episode_id="g00000001.1.0",
        outcome=Outcome.TRUNCATED,
        stop_reason="max_turns",
        reward=0.0,
        reward_parts={},
        segments=(),
    )
    failed = replace(
        first,
        episode_id="g00000002.0.0",
        group_id="g00000002",
        task_id="task 2",
        seed=13,
        outcome=Outcome.FAILED,
        stop_reason="environment_fault",
        reward=None,
        group_reward=None,
        error="it is gone",
        reward_parts={},
        turn_records=(),
        messages=(),
        segments=(),
    )
    return first, cut_off, failed


@pytest.mark.parametrize("name", IN_FORMAT)
def test_what_earlier_releases_wrote_is_read_and_goes_when_it_is_trained(name: str, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(WRITTEN / name, run)
    store = TrajectoryStore(run)
    first, cut_off, failed = stored_in(name)
    assert store.begun_after(0) == [1, 2]
    check_format(store.path(1))
    assert store.read_step(1) == [first, cut_off]
    assert store.stored(2).episodes == (first, cut_off, failed) and store.stored(2).damage == ()
    # What this release plays of the step goes on beside it.
    fresh = replace(first, episode_id="g00000002.0.1", group_id="g00000002")
    store.journal(2, fresh)
    assert store.journaled(2) == [first, cut_off, failed, fresh]
    aside = store.set_aside(2)
    assert aside is not None and list(aside.iterdir()) and not list((run / "journal").iterdir())
    shutil.copytree(WRITTEN / name / "journal", run / "journal", dirs_exist_ok=True)
    store.forget(2)
    assert not list((run / "journal").iterdir())
    store.close()


def test_damage_to_a_journal_of_lines_costs_its_line(tmp_path: Path) -> None:
    shutil.copytree(WRITTEN / "format_2", tmp_path, dirs_exist_ok=True)
    path = tmp_path / "journal" / "step_000002.jsonl"
    content = bytearray(path.read_bytes())
    content[content.index(b"max_turns")] ^= 1
    path.write_bytes(content + b"69f00955 454 f7c9867f {")
    first, _, failed = stored_in("format_2")
    stored = TrajectoryStore(tmp_path).stored(2)
    assert stored.episodes == (first, failed)
    assert stored.damage == (f"{path}: line 2 is damaged: its checksum does not fit",)


def test_a_later_format_is_named_and_left_as_it_is(tmp_path: Path) -> None:
    store = TrajectoryStore(tmp_path)
    write_episodes(store.path(1), [FIRST], step=1)
    schema = SCHEMA.append(pa.field("mood", pa.string())).with_metadata(
        {FORMAT_KEY: str(FORMAT + 1).encode()}
    )
    table = pq.read_table(store.path(1)).append_column("mood", pa.array(["", ""]))
    pq.write_table(table.cast(schema), store.path(1))
    for read in (store.read_step, store.stored, lambda step: check_format(store.path(step))):
        with pytest.raises(
            LaterFormat, match=f"step_000001.parquet is of format {FORMAT + 1}, which a later"
        ):
            read(1)

    store.journal(2, FIRST)
    store.close()
    path = store.journal_path(2)
    content = bytearray(path.read_bytes())
    content[3:4] = b"%d" % (JOURNAL_FORMAT + 1)
    content[HEAD_CHECKED : HEAD.size] = struct.pack("<I", zlib.crc32(content[:HEAD_CHECKED]))
    path.write_bytes(content)
    for open_ in (read_journal, Journal):
        with pytest.raises(LaterFormat, match=f"step_000002.journal is of format {JOURNAL_FORMAT + 1}"):
            open_(path)
    assert path.read_bytes() == content
