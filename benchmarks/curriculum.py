"""Curriculum: what share of the groups have rewards that differ, by how tasks are drawn, and what a draw costs.

No model: each task has a success rate of its own, drawn from Beta(0.3, 0.5), by which many are hard, some easy and few
between, and an episode is right with it. Groups of the second half of the draws count, when rates have been found out;
a probe's rates are known from the start, and count from the first draw on.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

from polyturn.configs.schema.curriculum import CurriculumConfig
from polyturn.envs.messages import ListTasks, Task
from polyturn.envs.tasks import make_curriculum
from polyturn.envs.tasks.curriculum import Curriculum
from polyturn.envs.tasks.order import task_digest
from polyturn.envs.tasks.rates import Difficulty

DIFFICULTY = {"kind": "difficulty", "low": 0.2, "high": 0.8}


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, epilog="example: curriculum.py --tasks 1000")
    parser.add_argument("--tasks", type=int, default=2000)
    parser.add_argument("--draws", type=int, default=8000, help="groups that are played")
    parser.add_argument(
        "--samples", type=int, default=8, help="episodes of a group, and of each task in the probe"
    )
    parser.add_argument("--short", action="store_true", help="500 tasks, 2,000 draws")
    return parser.parse_args()


def share_that_differs(
    config: dict[str, Any],
    tasks: ListTasks,
    rates: np.ndarray,
    arguments: argparse.Namespace,
    *,
    skipped: int,
) -> tuple[float, float]:
    """The share of groups with rewards that differ, after `skipped` draws; and microseconds of a draw."""
    rng = np.random.default_rng(1)
    order = make_curriculum(CurriculumConfig.model_validate(config), tasks, seed=0)
    num_differing, seconds = 0, 0.0
    for position in range(arguments.draws):
        started = time.perf_counter()
        index = order[position].task_index
        seconds += time.perf_counter() - started
        rewards = (rng.random(arguments.samples) < rates[index]).astype(float).tolist()
        if position >= skipped:
            num_differing += len(set(rewards)) > 1
        if isinstance(order, Curriculum):
            started = time.perf_counter()
            order.observe(position, rewards)
            seconds += time.perf_counter() - started
    return num_differing / (arguments.draws - skipped), seconds / arguments.draws * 1e6


def write_probe(path: Path, tasks: ListTasks, rates: np.ndarray, samples: int) -> Path:
    rng = np.random.default_rng(2)
    lines = []
    for index in range(len(tasks)):
        task, successes = tasks[index], int(rng.binomial(samples, rates[index]))
        lines.append(
            Difficulty(
                task_id=task.task_id,
                digest=task_digest(task),
                num_episodes=samples,
                num_successes=successes,
                mean_reward=successes / samples,
            ).to_line()
        )
    path.write_bytes(b"".join(lines))
    return path


def main() -> None:
    arguments = parse_arguments()
    if arguments.short:
        arguments.tasks, arguments.draws = 500, 2000
    rates = np.random.default_rng(0).beta(0.3, 0.5, arguments.tasks)
    tasks = ListTasks([Task.from_prompt(str(index), "q") for index in range(arguments.tasks)])
    half = arguments.draws // 2
    with tempfile.TemporaryDirectory() as directory:
        probe = write_probe(Path(directory) / "probe.jsonl", tasks, rates, arguments.samples)
        kinds: dict[str, tuple[dict[str, Any], int]] = {
            "mixture": ({}, half),
            "mixture behind the band gate": ({"gate": {"kind": "band"}}, half),
            "difficulty": ({"sampler": DIFFICULTY}, half),
            "difficulty after a probe, all draws": ({"sampler": DIFFICULTY, "difficulties": str(probe)}, 0),
        }
        found = {
            name: share_that_differs(config, tasks, rates, arguments, skipped=skipped)
            for name, (config, skipped) in kinds.items()
        }
    print(f"{'':38}{'groups that differ':>20}{'µs a draw':>12}")
    for name, (share, microseconds) in found.items():
        print(f"{name:38}{share:>20.1%}{microseconds:>12.1f}")
    shares = {name: share for name, (share, _) in found.items()}
    print(
        json.dumps(
            {
                "differing": {name: round(share, 4) for name, share in shares.items()},
                "difficulty_over_mixture": round(shares["difficulty"] / shares["mixture"], 3),
                "us_per_draw": round(found["difficulty"][1], 1),
            }
        )
    )


if __name__ == "__main__":
    main()
