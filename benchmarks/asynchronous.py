"""Asynchronous training against synchronous, with real engines, the same seeds and the same number of steps.

    python benchmarks/asynchronous.py [--seeds 0] [--steps 20] [--staleness 4] [--short]

Two environments: the demo's with searches that mostly take a quarter of a second and seldom up to twelve
(`long_tailed`), and with searches that take about one (`tools`). The seconds are slept, as those of a remote tool are:
what asynchrony gains is waiting, since engine and trainer share the processor here. Measured are the seconds of the
steps behind the first two, and the held-out reward after the last one, on 256 questions without latency.

`reward_difference` is asynchronous less synchronous, with a 95 % interval of the difference over all seeds; the last
line is JSON.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from contestants.slow_tools import register

from polyturn.trainer.sinks.json_lines import read_metrics

ENVIRONMENTS = {"long_tailed": "long_tailed", "tools": "even"}
NUM_WARM = 2
"""Steps that are not counted."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Result:
    """What one run came to."""

    step_s: float
    train_s: float
    reward: float
    num_tasks: int
    staleness_max: float


def overrides(latency: str, *, staleness: int, seed: int, steps: int, short: bool) -> list[str]:
    """What the runs have in place of the quickstart's options."""
    prompts = 4 if short else 8
    return [
        f"seed={seed}",
        f"environment.id={register()}",
        f"environment.options={{latency: {latency}}}",
        f"trainer.num_steps={steps}",
        f"rollout.max_staleness={staleness}",
        f"rollout.prompts_per_step={prompts}",
        "rollout.samples_per_prompt=8",
        f"trainer.global_batch_size={8 * prompts}",
        # Steps of environments only sleep.
        "rollout.max_concurrent_tools=1024",
        "rollout.max_concurrent_episodes=1024",
        "rollout.max_concurrent_requests=256",
        "trainer.parallel={tensor: 1, data: 1}",
        "evaluation.before=false",
        f"evaluation.num_tasks={64 if short else 256}",
        "metrics.sinks=[]",
    ]


def run_here(directory: Path, options: list[str]) -> None:
    """Train in this process."""
    import polyturn

    register()
    polyturn.train("quickstart", *options, run_dir=directory)


def train(directory: Path, options: list[str]) -> None:
    """Train in a process of its own."""
    command = [sys.executable, __file__, "--run", str(directory), *options]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"the run in {directory} failed:\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}")


def result_of(directory: Path) -> Result:
    """Read a finished run."""
    heldout = json.loads((directory / "summary.json").read_text())["heldout"]["after"]
    rows = read_metrics(directory / "metrics.jsonl")[NUM_WARM:]
    return Result(
        step_s=statistics.fmean(row["seconds/step"] for row in rows),
        train_s=statistics.fmean(row["seconds/train"] + row["seconds/sync"] for row in rows),
        reward=heldout["mean"],
        num_tasks=heldout["num_tasks"],
        staleness_max=max(row["policy/staleness_max"] for row in rows),
    )


def difference_of(pairs: list[tuple[Result, Result]]) -> tuple[float, float]:
    """Mean reward of the second ones less that of the first ones, and half of its 95 % interval."""
    difference = statistics.fmean(other.reward - one.reward for one, other in pairs)
    variance = sum(
        result.reward * (1 - result.reward) / result.num_tasks for pair in pairs for result in pair
    ) / (len(pairs) ** 2)
    return difference, 1.96 * math.sqrt(variance)


def measure(arguments: argparse.Namespace, scratch: Path) -> dict[str, Any]:
    """All runs, each synchronous one beside its asynchronous one."""
    steps = 6 if arguments.short else arguments.steps
    figures: dict[str, Any] = {}
    every: list[tuple[Result, Result]] = []
    print(f"{'environment':12} {'seed':>4} {'staleness':>9} {'step s':>7} {'train+sync s':>12} {'reward':>7}")
    for name, latency in ENVIRONMENTS.items():
        pairs: list[tuple[Result, Result]] = []
        for seed in arguments.seeds:
            results = []
            for staleness in (0, arguments.staleness):
                directory = scratch / f"{name}-{seed}-{staleness}"
                if not (directory / "summary.json").exists():
                    train(
                        directory,
                        overrides(
                            latency, staleness=staleness, seed=seed, steps=steps, short=arguments.short
                        ),
                    )
                results.append(result := result_of(directory))
                print(
                    f"{name:12} {seed:>4} {result.staleness_max:>9.0f} {result.step_s:>7.2f} {result.train_s:>12.2f} "
                    f"{result.reward:>7.3f}",
                    flush=True,
                )
            pairs.append((results[0], results[1]))
        figures[f"{name.removesuffix('ed')}_speedup"] = statistics.fmean(
            one.step_s for one, _ in pairs
        ) / statistics.fmean(other.step_s for _, other in pairs)
        every += pairs
    difference, interval = difference_of(every)
    return {
        **figures,
        "reward_difference": difference,
        "reward_difference_interval": interval,
        "steps": steps,
        "seeds": arguments.seeds,
        "staleness": arguments.staleness,
        "rewards": [[one.reward, other.reward] for one, other in every],
    }


def main() -> None:
    if sys.argv[1:2] == ["--run"]:
        run_here(Path(sys.argv[2]), sys.argv[3:])
        return
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--staleness", type=int, default=4, help="of the asynchronous runs")
    parser.add_argument("--directory", type=Path, help="where the runs are, and stay; finished ones are read")
    parser.add_argument("--short", action="store_true", help="six steps of half the size")
    arguments = parser.parse_args()
    if arguments.directory is not None:
        figures = measure(arguments, arguments.directory)
    else:
        with tempfile.TemporaryDirectory(prefix="polyturn-asynchronous-") as scratch:
            figures = measure(arguments, Path(scratch))
    print(json.dumps({"benchmark": "asynchronous", **figures}))


if __name__ == "__main__":
    main()
