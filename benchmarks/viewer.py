"""How long `polyturn view` takes until a page stands: of 10,000 episodes, and what is asked of 100,000.

    python benchmarks/viewer.py [--short]

Writes runs by `TrajectoryStore`, 250 episodes a step, with messages, tokens and an environment's metrics, and asks a
server in a process of its own over HTTP, as the page does. `open` is from the first request of a fresh process to the
last of those that the first view needs: the list of runs, the curves, the steps and a page of episodes. Every other
figure is the first time that this is asked, unless it is called `again`. `ratio_to_whole_read` is what opening takes
over reading all episodes by `read_sound_episodes`, the way without columns, of one step and scaled up. The last line is
JSON.
"""

from __future__ import annotations

import argparse
import http.client
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import orjson

from polyturn.agents.episode import Episode, EpisodeTimings, Outcome, TurnRecord
from polyturn.agents.ledger import Segment
from polyturn.rollout.store import TrajectoryStore, read_sound_episodes

PER_STEP = 250
SAMPLES = 8
NUM_TOKENS = 600


def make_episodes() -> list[Episode]:
    """Different ones, to be written again and again under other ids."""
    draws = np.random.default_rng(0)
    return [_episode(number, draws) for number in range(16)]


def _episode(number: int, draws: np.random.Generator) -> Episode:
    sampled = np.arange(NUM_TOKENS) % 4 > 1
    words = [f"word{draws.integers(5_000)}" for _ in range(400)]
    call = {
        "id": "c0",
        "type": "function",
        "function": {"name": "search", "arguments": {"query": " ".join(words[:9])}},
    }
    segment = Segment(
        token_ids=draws.integers(0, 150_000, NUM_TOKENS).astype(np.int32),
        sampled=sampled,
        logprobs=np.where(sampled, -draws.exponential(0.4, NUM_TOKENS), 0).astype(np.float32),
        policy_versions=np.where(sampled, 3, -1).astype(np.int32),
        turns=(np.arange(NUM_TOKENS) * 4 // NUM_TOKENS).astype(np.int16),
    )
    return Episode(
        episode_id="",
        group_id="",
        env_id="polyturn/TwoHopSearch-v0",
        task_id=f"task-{number}",
        seed=number,
        outcome=Outcome.COMPLETED if number % 5 else Outcome.TRUNCATED,
        stop_reason="terminated",
        reward=float(draws.random() < 0.4),
        reward_parts={"answer": 1.0, "format": 0.1},
        metrics={"searches": float(number % 4), "hops": float(number % 3)},
        num_turns=4,
        turn_records=tuple(TurnRecord(anchor=f"{turn:016x}") for turn in range(4)),
        num_tool_calls=3,
        num_tool_errors=number % 2,
        messages=(
            {"role": "user", "content": " ".join(words[:60])},
            {"role": "assistant", "content": " ".join(words[60:120]), "tool_calls": [call]},
            {"role": "tool", "tool_call_id": "c0", "content": " ".join(words[120:])},
        ),
        segments=(segment,),
        num_drawn_tokens=int(sampled.sum()),
        timings=EpisodeTimings(generate_s=1.0, tools_s=0.2, queue_s=0.1, total_s=1.4),
    )


def write_run(path: Path, num_episodes: int) -> None:
    """A run of so many episodes with a row of metrics for each step."""
    episodes, store = make_episodes(), TrajectoryStore(path)
    draws = np.random.default_rng(1)
    path.mkdir(parents=True)
    with (path / "metrics.jsonl").open("wb") as file:
        for step in range(1, num_episodes // PER_STEP + 1):
            written = [
                replace(
                    episodes[place % len(episodes)],
                    episode_id=f"g{step:05d}{place // SAMPLES:05d}-{place % SAMPLES}",
                    group_id=f"g{step:05d}{place // SAMPLES:05d}",
                    reward=float(draws.random() < 0.4),
                )
                for place in range(PER_STEP)
            ]
            store.write_step(step, written, advantages={one.episode_id: 0.5 for one in written})
            row = {f"figure/{number}": draws.random() for number in range(80)} | {
                "reward/mean": draws.random()
            }
            file.write(orjson.dumps({"step": step, **row}) + b"\n")
    store.close()


class Viewer:
    """A server in a process of its own; a context manager."""

    def __init__(self, run: Path) -> None:
        self._run = run

    def __enter__(self) -> Viewer:
        command = [sys.executable, "-m", "polyturn", "view", str(self._run)]
        self._process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        assert self._process.stdout is not None
        found = re.search(r":(\d+)/", self._process.stdout.readline())
        assert found is not None
        self._connection = http.client.HTTPConnection("127.0.0.1", int(found[1]), timeout=300)
        return self

    def __exit__(self, *_: object) -> None:
        self._process.terminate()
        self._process.wait()

    def ask(self, path: str) -> Any:
        """The answer, read."""
        self._connection.request("GET", path)
        response = self._connection.getresponse()
        body = response.read()
        assert response.status == 200, (path, body[:300])
        return orjson.loads(body)

    @property
    def cpu_s(self) -> float:
        """Of the server so far."""
        fields = Path(f"/proc/{self._process.pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    @property
    def memory_mb(self) -> float:
        """At most so far."""
        found = re.search(r"VmHWM:\s+(\d+)", Path(f"/proc/{self._process.pid}/status").read_text())
        return 0.0 if found is None else int(found[1]) / 1024


def measure(run: Path) -> dict[str, float]:
    """Seconds of each thing that a person does first."""
    name = run.name
    first_view = (
        "/api/runs",
        f"/api/metrics?run={name}",
        f"/api/steps?run={name}",
        f"/api/episodes?run={name}&limit=100",
    )
    others = {
        "sort_by_reward": f"/api/episodes?run={name}&limit=100&sort=-reward",
        "sort_by_metric": f"/api/episodes?run={name}&limit=100&sort=metrics.searches",
        "filter_by_reward": f"/api/episodes?run={name}&limit=100&min_reward=0.5",
        "last_page": f"/api/episodes?run={name}&limit=100&offset=9900",
        "text_in_one_step": f"/api/episodes?run={name}&limit=100&step=2&text=word17",
        "text_in_all": f"/api/episodes?run={name}&limit=100&text=word17",
        "group": f"/api/group?run={name}&step=2&group=g0000200000",
        "episode": f"/api/episode?run={name}&step=2&id=g0000200003-1",
        "tokens": f"/api/tokens?run={name}&step=2&id=g0000200003-1",
    }
    seconds: dict[str, float] = {}
    with Viewer(run) as viewer:
        before = viewer.cpu_s
        start = time.perf_counter()
        for path in first_view:
            viewer.ask(path)
        seconds["open"] = time.perf_counter() - start
        seconds["open_cpu"] = viewer.cpu_s - before
        for what, path in {**others, "again": first_view[-1]}.items():
            start = time.perf_counter()
            viewer.ask(path)
            seconds[what] = time.perf_counter() - start
        seconds["memory_mb"] = viewer.memory_mb
    return {what: round(value, 4) for what, value in seconds.items()}


def whole_read_s(run: Path, num_episodes: int) -> float:
    """Reading all episodes of a run, from one step of it."""
    start = time.perf_counter()
    found = read_sound_episodes(TrajectoryStore(run).path(1))
    assert len(found.episodes) == PER_STEP
    return (time.perf_counter() - start) * num_episodes / PER_STEP


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--short", action="store_true", help="2,000 and 5,000 episodes")
    sizes = (2_000, 5_000) if parser.parse_args().short else (10_000, 100_000)
    result: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        for size in sizes:
            run = Path(folder) / f"run-{size}"
            write_run(run, size)
            figures = measure(run)
            figures["ratio_to_whole_read"] = round(figures["open"] / whole_read_s(run, size), 4)
            print(f"{size:,} episodes: {figures}", flush=True)
            result[str(size)] = figures
    print(json.dumps(result))


if __name__ == "__main__":
    main()
