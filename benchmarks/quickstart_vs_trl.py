"""Seconds from the command until 0.8 of the held-out questions are answered right, beside TRL's GRPO.

    python benchmarks/quickstart_vs_trl.py [--short] [--learning-rates 5e-4 1e-3] [--limit-s 420]

Both train the quickstart's model on its tasks on this machine, all of its cores, from a fresh process: Polyturn its
recipe, TRL's GRPOTrainer its own loop of an environment with a tool (`contestants/trl_quickstart.py` says what is
equal and what is not). Both evaluate the same 256 questions every five steps, which counts, and stop at the target. TRL
is given several learning rates, one after the other, and the best counts; Polyturn has its recipe's.

`ratio` is TRL's seconds over Polyturn's. Where TRL has not come so far within the limit its time is that of the limit,
`is_lower_bound` says so, and its last evaluation stands beside it. The last line is JSON. The short form is one step of
few episodes, and the first evaluation whatever it says.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from polyturn.trainer.sinks.json_lines import read_metrics

BENCHMARKS = Path(__file__).parent


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Size:
    target: float = 0.8
    num_steps: int = 60
    every_steps: int = 5
    prompts_per_step: int = 16
    samples_per_prompt: int = 8
    num_tasks: int = 256


SHORT = Size(target=0.0, num_steps=1, every_steps=1, prompts_per_step=2, samples_per_prompt=4, num_tasks=8)


def train_ours(size: Size, *, seed: int) -> dict[str, Any]:
    """The seconds of the whole command, which ends at the target, and what was evaluated last."""
    with tempfile.TemporaryDirectory() as directory:
        command = [sys.executable, "-m", "polyturn.cli.main", "train", "quickstart", f"seed={seed}"]
        command += [
            f"run_dir={directory}/run",
            f"trainer.num_steps={size.num_steps}",
            f"trainer.global_batch_size={size.prompts_per_step * size.samples_per_prompt}",
            f"trainer.stop_at={{metric: heldout/mean, at_least: {size.target}}}",
            f"rollout.prompts_per_step={size.prompts_per_step}",
            f"rollout.samples_per_prompt={size.samples_per_prompt}",
            f"evaluation.num_tasks={size.num_tasks}",
            f"evaluation.every_steps={size.every_steps}",
            "evaluation.before=false",
            "evaluation.after=false",
        ]
        began = time.monotonic()
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        seconds = time.monotonic() - began
        if done.returncode:
            raise RuntimeError(f"Polyturn's run failed: {done.stderr[-2000:]}")
        evaluated = [
            row for row in read_metrics(Path(directory) / "run" / "metrics.jsonl") if "heldout/mean" in row
        ]
    last = evaluated[-1]
    return {
        "seconds": round(seconds, 1),
        "step": last["step"],
        "score": last["heldout/mean"],
        "reached": last["heldout/mean"] >= size.target,
    }


def train_trl(size: Size, *, seed: int, learning_rate: float, limit_s: float) -> dict[str, Any]:
    """The seconds from the start of the process to the evaluation that reached the target, or to the last one."""
    job = {
        "learning_rate": learning_rate,
        "micro_batch": min(32, size.prompts_per_step * size.samples_per_prompt),
        "limit_s": limit_s,
        "seed": seed,
        **dataclasses.asdict(size),
    }
    # It may have all cores; ours are told how many threads each process takes.
    environment = {name: value for name, value in os.environ.items() if name != "OMP_NUM_THREADS"}
    command = [sys.executable, "-m", "contestants.trl_quickstart", json.dumps(job)]
    began = time.monotonic()
    seconds, last = 0.0, None
    with subprocess.Popen(
        command, cwd=BENCHMARKS, env=environment, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    ) as process:
        assert process.stdout is not None
        for line in process.stdout:
            if line.startswith("{"):
                seconds, last = time.monotonic() - began, json.loads(line)
                print(f"TRL, learning rate {learning_rate:g}: {seconds:.0f} s, {last}", flush=True)
    if process.returncode or last is None:
        raise RuntimeError(
            f"TRL ended with {process.returncode}; run it alone: {' '.join(command[1:3])} '{command[3]}'"
        )
    return {
        "learning_rate": learning_rate,
        "seconds": round(seconds, 1),
        "step": last["step"],
        "score": round(last["score"], 4),
        "reached": last["score"] >= size.target,
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--short", action="store_true", help="one step, one learning rate")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--learning-rates", type=float, nargs="+", default=[5e-4, 1e-3], help="of TRL")
    parser.add_argument("--limit-s", type=float, default=420.0, help="of one training by TRL")
    arguments = parser.parse_args()
    size = SHORT if arguments.short else Size()
    rates = arguments.learning_rates[:1] if arguments.short else arguments.learning_rates
    ours = train_ours(size, seed=arguments.seed)
    print(f"Polyturn: {ours}", flush=True)
    theirs = [
        train_trl(size, seed=arguments.seed, learning_rate=rate, limit_s=arguments.limit_s) for rate in rates
    ]
    reached = [one for one in theirs if one["reached"]]
    best = (
        min(reached, key=lambda one: one["seconds"]) if reached else max(theirs, key=lambda one: one["score"])
    )
    line = {
        "benchmark": "quickstart_vs_trl",
        "short": arguments.short,
        "target": size.target,
        "ratio": round(best["seconds"] / ours["seconds"], 2) if ours["reached"] else None,
        "is_lower_bound": not reached,
        "polyturn": ours,
        "trl": theirs,
        "trl_best": best,
    }
    print(json.dumps(line))


if __name__ == "__main__":
    main()
