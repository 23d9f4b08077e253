"""What `polyturn eval export` takes of an evaluation of 100,000 episodes: seconds and memory, in each format.

    python benchmarks/export.py [--short] [--formats inspect openai ...] [--folder FOLDER]

Writes one evaluation, as a sitting leaves it (plan, lines and columnar files of 2,048 episodes, each of them with
messages, tools and 600 tokens), and a tenth of it. Every export is the command in a process of its own, whose memory is
the most that the kernel counted. `growth_mb` is the memory of all episodes less that of a tenth: what a program that
reads one episode after the other adds by their lines alone. A `--folder` keeps the evaluations for another time. The
last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

from polyturn.rollout.evaluation.directory import EpisodeLog, entry_directory, write_plan
from polyturn.rollout.evaluation.export.formats import ENDINGS, Format
from polyturn.rollout.evaluation.plan import EvaluationPlan, PlannedEntry, Player
from polyturn.rollout.evaluation.recorder import EPISODES_PER_FILE
from polyturn.rollout.evaluation.scoring import GROUP, scored
from polyturn.rollout.store import TrajectoryStore
from viewer import make_episodes

NUM_EPISODES = 100_000
SAMPLES = 4
ENTRY = "questions"


def write_evaluation(directory: Path, num_episodes: int) -> None:
    """An evaluation of one entry, four samples of each task."""
    made = make_episodes()
    entry = PlannedEntry(
        name=ENTRY,
        environment=made[0].env_id,
        split="heldout",
        num_tasks=num_episodes // SAMPLES,
        samples_per_task=SAMPLES,
        success_score=1.0,
        config={"environment": {"id": made[0].env_id}},
    )
    plan = EvaluationPlan(
        suite="export",
        player=Player(name="model", label="a model"),
        package="0",
        created="2026-01-01T12:00:00+00:00",
        entries=[entry],
    )
    write_plan(directory, plan)
    with (
        closing(TrajectoryStore(entry_directory(directory, ENTRY))) as store,
        closing(EpisodeLog(directory)) as log,
    ):
        for number, first in enumerate(range(0, num_episodes, EPISODES_PER_FILE)):
            places = range(first, min(first + EPISODES_PER_FILE, num_episodes))
            episodes = [
                replace(
                    made[place % len(made)],
                    episode_id=f"{GROUP}{place // SAMPLES:06d}.{place % SAMPLES}.0",
                    group_id=f"{GROUP}{place // SAMPLES:06d}",
                    task_id=f"task-{place // SAMPLES}",
                )
                for place in places
            ]
            store.write_step(number, episodes)
            for episode in episodes:
                log.append(scored(episode, entry=ENTRY, prices=None))


def export(directory: Path, kind: str, output: Path, num_episodes: int) -> dict[str, float]:
    """Seconds, processor seconds, the most memory and the size of what is written."""
    command = [sys.executable, "-m", "polyturn", "eval", "export", str(directory), "--format", kind]
    began = time.perf_counter()
    process = subprocess.Popen([*command, "--output", str(output)], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    said = process.stdout.read()
    _, status, usage = os.wait4(process.pid, 0)
    seconds = time.perf_counter() - began
    assert status == 0, said
    found = json.loads(said.splitlines()[-1])
    assert found["num_episodes"] == num_episodes, found
    return {
        "seconds": round(seconds, 1),
        "cpu_s": round(usage.ru_utime + usage.ru_stime, 1),
        "memory_mb": round(usage.ru_maxrss / 1024),
        "written_mb": round(_size(output) / 1e6),
    }


def _size(path: Path) -> int:
    files = path.iterdir() if path.is_dir() else [path]
    return sum(file.stat().st_size for file in files)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--short", action="store_true", help="a hundredth of the episodes")
    parser.add_argument("--formats", nargs="+", choices=get_args(Format), default=get_args(Format))
    parser.add_argument("--folder", type=Path, help="where evaluations are kept and found again")
    arguments = parser.parse_args()
    number = NUM_EPISODES // 100 if arguments.short else NUM_EPISODES
    result: dict[str, Any] = {"episodes": number}
    sizes = (number // 10, number)
    with tempfile.TemporaryDirectory() as scratch:
        folder = arguments.folder or Path(scratch)
        for size in sizes:
            if not (folder / f"evaluation-{size}").exists():
                write_evaluation(folder / f"evaluation-{size}", size)
        for kind in arguments.formats:
            found = []
            for size in sizes:
                output = Path(scratch) / f"out{ENDINGS[kind][0]}"
                found.append(export(folder / f"evaluation-{size}", kind, output, size))
                output.unlink()
            growth = found[1]["memory_mb"] - found[0]["memory_mb"]
            result[kind] = {**found[1], "growth_mb": growth}
            print(f"{kind}: {result[kind]}", flush=True)
    print(json.dumps(result))


if __name__ == "__main__":
    main()
