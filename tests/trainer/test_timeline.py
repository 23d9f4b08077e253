"""The timeline of a run, held to the Chrome trace's format, and torch's profiler on a rank."""

from __future__ import annotations

import gzip
import json
from collections import defaultdict
from pathlib import Path
from typing import Any

import pytest

from polyturn.agents.episode import Episode, EpisodeTimings, Outcome
from polyturn.configs.errors import ConfigError
from polyturn.configs.loading.loader import load_config
from polyturn.configs.schema.metrics import TimelineConfig
from polyturn.configs.schema.trainer import ProfileConfig
from polyturn.rollout.engines.load import EngineLoad
from polyturn.trainer.ranks.profiling import RankProfiler
from polyturn.trainer.run.timeline import Timeline

Event = dict[str, Any]


def read_trace(path: Path) -> list[Event]:
    trace = json.loads(gzip.decompress(path.read_bytes()))
    assert trace["displayTimeUnit"] == "ms"
    return trace["traceEvents"]


def assert_well_formed(events: list[Event]) -> None:
    """What the format asks of the kinds of events that are used: times, names, nesting, ends of arrows."""
    names = {(e["pid"], e.get("tid")): e["args"]["name"] for e in events if e["ph"] == "M"}
    stacks: dict[tuple[int, int], list[float]] = defaultdict(list)
    arrows: dict[int, dict[str, Event]] = defaultdict(dict)
    slices = [e for e in events if e["ph"] == "X"]
    for event in events:
        assert event["ph"] in "XCsfM" and event["ts"] >= 0 and event["name"]
        assert (event["pid"], None) in names, "a process without a name"
        if "tid" in event:
            assert (event["pid"], event["tid"]) in names, "a thread without a name"
        if event["ph"] == "C":
            assert all(isinstance(value, int | float) for value in event["args"].values())
        if event["ph"] in "sf":
            arrows[event["id"]][event["ph"]] = event
    for event in sorted(slices, key=lambda e: (e["ts"], -e["dur"])):
        stack = stacks[event["pid"], event["tid"]]
        while stack and stack[-1] <= event["ts"] + 0.2:  # times are rounded to tenths of a microsecond
            stack.pop()
        assert not stack or event["ts"] + event["dur"] <= stack[-1] + 0.2, f"{event} ends in another slice"
        stack.append(event["ts"] + event["dur"])
    for ends in arrows.values():
        assert set(ends) == {"s", "f"} and ends["s"]["ts"] <= ends["f"]["ts"] and ends["f"]["bp"] == "e"
        for end in ends.values():
            around = [
                one
                for one in slices
                if (one["pid"], one["tid"]) == (end["pid"], end["tid"])
                and one["ts"] <= end["ts"] <= one["ts"] + one["dur"]
            ]
            assert around, f"{end} is in no slice"


def played(name: str, seconds: float, *spans: tuple[str, float, float]) -> Episode:
    return Episode(
        episode_id=name,
        group_id="group",
        env_id="env",
        task_id=f"task of {name}",
        seed=0,
        outcome=Outcome.COMPLETED,
        stop_reason="terminated",
        reward=1.0,
        timings=EpisodeTimings(total_s=seconds, spans=spans),
    )


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


def test_who_waits_for_whom_stands_in_the_trace(tmp_path: Path) -> None:
    clock, told = Clock(), list[str]()
    timeline = Timeline(TimelineConfig(every_steps=2), tmp_path / "timeline", told.append, clock=clock)
    load = EngineLoad(num_running=3, num_waiting=1, num_used_tokens=50, max_tokens=100)
    early = played("early", 3.0, ("queue", 0.0, 0.5), ("generate", 0.5, 2.0), ("tools", 2.0, 2.9))
    beside = played("beside", 2.0, ("generate", 0.0, 1.5), ("generate", 1.0, 2.0))
    later, unused = played("later", 1.0), played("unused", 1.0)
    with timeline.measure("trainer", "episodes awaited"):
        clock.now = 103.0
        timeline.note_episode(early)
        timeline.note_episode(beside)
        clock.now = 104.5
        timeline.note_episode(later)
        timeline.note_episode(unused)
    timeline.note_loads([(99.0, {0: load}), (102.0, {0: load, 1: None})])
    timeline.note_update(1, [early, beside])
    timeline.phase("update", 104.5, 106.0)
    timeline.phase("sync", 106.0, 106.5)
    clock.now = 106.5
    timeline.note_pause(0.25)
    timeline.end_step(1, is_last=False)
    assert not (tmp_path / "timeline").exists()
    timeline.end_step(2, is_last=False)
    timeline.close()
    (path,) = (tmp_path / "timeline").iterdir()
    assert path.name == "steps_000001_to_000002.json.gz" and told == []
    events = read_trace(path)
    assert_well_formed(events)
    slices = {(e["name"], e["pid"], e["tid"]): (e["ts"], e["dur"]) for e in events if e["ph"] == "X"}
    assert slices["task of early", 3, 1] == (0.0, 3e6) and slices["task of beside", 3, 2] == (1e6, 2e6)
    # The lane is free again; two of one time are beside each other.
    assert slices["task of later", 3, 1] == slices["task of unused", 3, 2] == (3.5e6, 1e6)
    assert slices["queue", 3, 1] == (0.0, 0.5e6) and slices["tools", 3, 1] == (2e6, 0.9e6)
    assert slices["paused for weights", 2, 2] == (6.25e6, 0.25e6)
    generating = [e for e in events if e["name"] == "generate" and e["tid"] == 2]
    assert [(e["ts"], e["dur"]) for e in generating] == [(1e6, 1.5e6), (2.5e6, 0.5e6)]
    arrows = [e for e in events if e["ph"] == "f"]
    assert [(e["name"], e["ts"]) for e in arrows] == [("trained in step 1", 4.5e6)] * 2
    counters = {e["name"]: e["args"] for e in events if e["ph"] == "C"}
    assert counters == {
        "engine 0: requests": {"running": 3, "waiting": 1},
        "engine 0: KV in use": {"share": 0.5},
    }
    # What is trained on later is in the next file, with its arrow.
    timeline.note_update(3, [later])
    timeline.phase("update", 106.5, 107.0)
    timeline.end_step(3, is_last=True)
    timeline.close()
    events = read_trace(tmp_path / "timeline" / "steps_000003_to_000003.json.gz")
    assert_well_formed(events)
    names = {e["name"]: e["args"]["step"] for e in events if e["pid"] == 3 and e["ph"] == "X"}
    assert names == {"task of later": 3, "task of unused": None}
    assert not timeline._played


def test_files_and_memory_are_bounded(tmp_path: Path) -> None:
    timeline = Timeline(
        TimelineConfig(every_steps=1, keep_files=2, max_events=5), tmp_path / "timeline", print
    )
    for step in range(1, 5):
        for number in range(9):
            timeline.phase("update", float(number), number + 0.5)
            timeline.note_episode(played(f"{step} {number}", 0.5))
        timeline.end_step(step, is_last=False)
    timeline.close()
    files = sorted((tmp_path / "timeline").iterdir())
    assert [file.name for file in files] == [f"steps_00000{i}_to_00000{i}.json.gz" for i in (3, 4)]
    assert sum(e["name"] == "update" for e in read_trace(files[-1])) == 5


def test_a_disk_that_takes_nothing_is_told_and_the_run_goes_on(tmp_path: Path) -> None:
    told: list[str] = []
    (tmp_path / "timeline").write_text("a file in the way")
    timeline = Timeline(TimelineConfig(every_steps=1), tmp_path / "timeline", told.append)
    timeline.phase("update", 0.0, 1.0)
    timeline.end_step(1, is_last=True)
    timeline.close()
    assert len(told) == 1 and told[0].startswith("warning: the timeline cannot be written: ")


def test_nothing_is_kept_where_no_timeline_is_asked_for(tmp_path: Path) -> None:
    timeline = Timeline(TimelineConfig(), tmp_path / "timeline", print)
    timeline.phase("update", 0.0, 1.0)
    timeline.note_episode(played("one", 1.0))
    timeline.end_step(1, is_last=True)
    assert not timeline._spans and not timeline._played and not (tmp_path / "timeline").exists()


def test_a_rank_that_is_named_is_profiled(tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    config = ProfileConfig(steps=[3], ranks=[1], record_shapes=True)
    for rank in (0, 1):
        profiler = RankProfiler(config, rank=rank, device="cpu")
        profiler.begin()
        torch.ones(3, 4) @ torch.ones(4, 5)
        profiler.end(tmp_path / "profile", 3)
    (path,) = (tmp_path / "profile").iterdir()
    assert path.name == "step_000003_rank_1.json.gz"
    events = json.loads(gzip.decompress(path.read_bytes()))["traceEvents"]
    (product,) = [event for event in events if event.get("name") == "aten::mm"]
    assert product["args"]["Input Dims"][:2] == [[3, 4], [4, 5]]


@pytest.mark.parametrize(
    ("written", "wrong"),
    [
        ("{steps: [1], ranks: [99]}", "there is no rank 99; the policy has"),
        ("{steps: [100000]}", "there is no step 100000"),
        ("{steps: [1], activities: [gpu]}", "activities"),
    ],
)
def test_steps_and_ranks_that_are_not_there_are_refused(written: str, wrong: str) -> None:
    with pytest.raises(ConfigError, match=wrong):
        load_config("quickstart", [f"trainer.profile={written}"])
