"""What is stored of episodes is found and summed, whether it stands in columns, in journals or in an earlier form."""

from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from polyturn.rollout.store import TrajectoryStore, read_summary, write_episodes
from polyturn.rollout.traces.files import TraceFiles
from polyturn.rollout.traces.selection import Pattern, Range, Selection, select, selected
from polyturn.rollout.traces.statistics import COLUMNS, histogram, summarize, summarize_by, tool_usage
from tests.support.stored_run import conversation, episode, make_evaluation, make_run, segment

OLDER = Path(__file__).parent / "older_formats"


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return make_run(tmp_path_factory.mktemp("stored") / "run")


def ids(directory, **wanted):
    return selected(TraceFiles(directory), Selection(**wanted), ("episode_id",))["episode_id"].to_pylist()


def test_each_episode_of_a_run_is_found_once_with_where_it_stands(run):
    files = TraceFiles(run)
    table = selected(files, Selection(), ("step", "episode_id", "state", "advantage", "error"))
    rows = {row.pop("episode_id"): row for row in table.to_pylist()}
    assert len(rows) == table.num_rows == 10
    assert rows["g00000002.0.0"] == {"step": 2, "state": "kept", "advantage": -0.5, "error": None}
    assert rows["g00000004.0.0"]["state"] == "failed" and rows["g00000004.0.1"]["state"] == "waiting"
    assert rows["g00000004.0.1"]["step"] == 3
    assert files.parts == ["train", "evaluation/after"] and not files.damage


@pytest.mark.parametrize(
    ("wanted", "expected"),
    [
        ({"steps": Range.read("1"), "reward": Range.read("1")}, ["g00000000.1.0", "g00000001.1.0"]),
        ({"steps": Range.read("3:")}, ["g00000004.0.0", "g00000004.0.1"]),
        ({"episode": "g00000003"}, ["g00000003.0.0", "g00000003.1.0"]),
        ({"group": "g00000003", "tool_errors": True}, ["g00000003.1.0"]),
        ({"task": "task-1", "environment": "polyturn/TwoHop-v0"}, ["g00000001.0.0", "g00000001.1.0"]),
        ({"task": "task-1", "environment": "polyturn/Other-v0"}, []),
        ({"outcome": "failed"}, ["g00000004.0.0"]),
        ({"outcome": "no_engine"}, ["g00000004.0.0"]),
        ({"dropped": True}, ["g00000004.0.0"]),
        ({"tool": "search", "steps": Range.read("3")}, ["g00000004.0.0"]),
        ({"parts": ("evaluation/after",)}, ["g00000000.0.0"]),
        ({"reward": Range.read(":0.3"), "pattern": Pattern(text="owned")}, ["g00000004.0.1"]),
        ({"pattern": Pattern(text=r"Answer [02]\.1", is_regex=True)}, ["g00000000.1.0", "g00000002.1.0"]),
        ({"pattern": Pattern(text="no ENGINE")}, []),
        ({"pattern": Pattern(text="no engine")}, ["g00000004.0.0"]),
    ],
)
def test_episodes_are_chosen_by_what_is_known_of_them(run, wanted, expected):
    assert ids(run, **wanted) == expected


def test_a_text_is_found_where_it_was_thought_called_and_answered(run):
    found = {}
    for text in ("LOOK", "look it", "capital of", "is the capital"):
        wanted = Selection(episode="g00000001.0", pattern=Pattern(text=text))
        found[text] = [
            (match.message, match.where, match.role, match.text[match.start : match.end])
            for _, matches in select(TraceFiles(run), wanted, ())
            for of_one in matches.values()
            for match in of_one
        ]
    assert found == {
        "LOOK": [],
        "look it": [(2, "reasoning", "assistant", "look it")],
        "capital of": [(2, "call", "assistant", "capital of")],
        "is the capital": [(3, "content", "tool", "is the capital")],
    }


@pytest.mark.parametrize(
    "text", ["É", "naïve", 'say "no"', "a\\b", "x\ny", "search({", "ß", "straße 7", "7.5", "(", "'"]
)
def test_a_text_is_found_however_it_is_written_in_the_file(tmp_path, text):
    """What is looked for in the stored JSON first must never be missed."""
    for said, wanted in ((text, text), (text, text.lower()), (text.upper(), text.upper().lower())):
        path = tmp_path / "step_000001.parquet"
        write_episodes(path, [episode(0, 0, messages=conversation(said, query=f"... {said} ..."))], step=1)
        assert ids(path, pattern=Pattern(text=wanted)) == ["g00000000.0.0"]
        assert ids(path, pattern=Pattern(text=f"{wanted}nowhere")) == []


def test_a_summary_says_what_the_columns_say(run, tmp_path):
    path = run / "trajectories" / "step_000001.parquet"
    summary = read_summary(path)
    assert summary is not None
    names = [name for name in summary.column_names if name in pq.read_schema(path).names]
    assert {"episode_id", "reward", "tools", "advantage", "metrics"} <= set(names)
    assert summary.select(names).to_pylist() == pq.read_table(path, columns=names).to_pylist()
    # One of several segments has one row in it, and a changed byte is not believed.
    long = episode(0, 0, segments=(segment(), segment()))
    write_episodes(tmp_path / "long.parquet", [long], step=4)
    assert read_summary(tmp_path / "long.parquet").num_rows == 1
    content = bytearray(path.read_bytes())
    start = content.rindex(b"polyturn_summary") + 200
    content[start : start + 8] = bytes(byte ^ 0xFF for byte in content[start : start + 8])
    (tmp_path / "step_000001.parquet").write_bytes(content)
    assert read_summary(tmp_path / "step_000001.parquet") is None
    assert ids(tmp_path / "step_000001.parquet") == ids(run, steps=Range.read("1"))


@pytest.mark.parametrize("older", ["format_1_first", "format_2", "format_3"])
def test_earlier_releases_runs_are_read(older):
    files = TraceFiles(OLDER / older)
    table = selected(files, Selection(), ("episode_id", "reward", "state", "num_drawn_tokens"))
    stored = TrajectoryStore(OLDER / older)
    whole = {one.episode_id: one for step in stored.steps() for one in stored.read_step(step)}
    rows = {row["episode_id"]: row for row in table.to_pylist() if row["state"] == "kept"}
    assert {name: row["reward"] for name, row in rows.items()} == {
        name: one.reward for name, one in whole.items()
    }
    assert rows and not files.damage


def test_the_entries_of_an_evaluation_are_parts_whether_or_not_they_are_done(tmp_path):
    files = TraceFiles(make_evaluation(tmp_path / "evaluation"))
    assert files.parts == ["qa", "sums"]
    table = selected(files, Selection(), ("part", "state"))
    assert table.to_pylist() == [
        {"part": "qa", "state": "kept"},
        {"part": "qa", "state": "kept"},
        {"part": "sums", "state": "waiting"},
    ]
    with pytest.raises(ValueError, match=r"no part 'code' is stored in .*; there are qa, sums"):
        ids(tmp_path / "evaluation", parts=("code",))


def test_whole_episodes_come_with_their_advantages_by_role(tmp_path):
    two = episode(0, 0, segments=(segment(), segment()), role_rewards={"a": 1.0})
    two = two.__class__(
        **{name: getattr(two, name) for name in two.__slots__ if name != "segments"},
        segments=tuple(
            one.__class__(**{name: getattr(one, name) for name in one.__slots__ if name != "role"}, role=role)
            for one, role in zip(two.segments, ("a", "b"), strict=True)
        ),
    )
    others = [episode(number, 0) for number in range(1, 20)]
    path = tmp_path / "step_000003.parquet"
    write_episodes(path, [*others, two], step=3, advantages={f"{two.episode_id}/a": 0.5})
    [found] = TraceFiles(path).read_episodes(0, [two.episode_id])
    assert found.episode == two and found.advantages == {"a": 0.5} and found.file.step == 3


def test_a_journal_that_grows_is_read_again_and_what_is_damaged_is_said(tmp_path):
    store = TrajectoryStore(tmp_path)
    store.journal(1, episode(0, 0))
    files = TraceFiles(tmp_path)
    assert selected(files, Selection(), ("episode_id",)).num_rows == 1
    store.journal(1, episode(0, 1))
    assert selected(files, Selection(), ("episode_id",)).num_rows == 2
    store.close()
    path = store.journal_path(1)
    content = bytearray(path.read_bytes())
    content[40] ^= 0xFF
    path.write_bytes(content)
    damaged = TraceFiles(tmp_path)
    assert selected(damaged, Selection(), ("episode_id",))["episode_id"].to_pylist() == ["g00000000.1.0"]
    assert len(damaged.damage) == 1 and "record 1" in damaged.damage[0]


def test_what_is_no_run_is_told_with_what_is_near(run, tmp_path):
    for place, sentence in (
        (run.parent, r"holds runs and is none itself; name one of them: .*run"),
        (tmp_path, "no episode is stored in .*: a run has trajectories/"),
        (tmp_path / "missing", "there is no .*missing; name the directory"),
        (Path(__file__), "is no file of episodes"),
    ):
        with pytest.raises(ValueError, match=sentence):
            TraceFiles(place)


@pytest.mark.parametrize("text", ["", ":", "a", "3:1", "1:b"])
def test_a_range_that_is_none_is_refused(text):
    with pytest.raises(ValueError, match="write 2, 2:5, 2: or :5"):
        Range.read(text)


def test_summaries_leave_failed_attempts_out_of_every_mean(run):
    table = selected(TraceFiles(run), Selection(), (*COLUMNS, "step", "tools"))
    whole = summarize(table)
    assert whole.num_episodes == 10 and whole.outcomes == {"completed": 9, "failed": 1}
    assert whole.reward.mean == pytest.approx(4.25 / 9) and whole.reward.largest == 1.0
    assert [(one.low, one.count) for one in whole.rewards] == [(0.0, 4), (0.25, 1), (1.0, 4)]
    steps = summarize_by(table, "step")
    assert [(one.name, one.num_episodes) for one in steps] == [("1", 4), ("2", 4), ("3", 2)]
    usage = tool_usage(table["tools"])
    assert list(usage) == ["search"] and (usage["search"].num_calls, usage["search"].num_failures) == (9, 4)
    assert usage["search"].seconds == 9 * 0.25 and usage["search"].max_seconds == 0.25
    assert tool_usage(table.slice(8, 2)["tools"])["search"].num_calls == 1
    assert tool_usage(table.slice(0, 0)["tools"]) == {}
    nothing = summarize(table.slice(0, 0))
    assert nothing.num_episodes == 0 and nothing.reward.mean is None and not nothing.rewards


def test_a_histogram_counts_every_value_once():
    values = np.random.default_rng(0).normal(size=1_000)
    bins = histogram(values)
    assert len(bins) == 10 and sum(one.count for one in bins) == 1_000
    assert bins[0].low == values.min() and bins[-1].high == values.max()
