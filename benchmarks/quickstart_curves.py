"""The demo's reward curves: success per step for several seeds, before and after on held-out questions, and where
the seconds of a step go. Trains the seeds itself, or reads runs that are there already (`--run`)."""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

from polyturn.trainer.sinks.json_lines import read_metrics

PARTS = ("generate", "tools", "train", "sync")


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, epilog="example: quickstart_curves.py --seeds 0 1 2"
    )
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="seeds to train")
    parser.add_argument("--run", type=Path, nargs="+", help="finished run directories, instead of training")
    parser.add_argument("--picture", type=Path, help="write the curves as a PNG")
    parser.add_argument("--short", action="store_true", help="one seed, three steps, few held-out questions")
    return parser.parse_args()


def train(seed: int, *, short: bool) -> Path:
    """Train the quickstart recipe with a seed; the run directory."""
    command = [sys.executable, "-m", "polyturn.cli.main", "train", "quickstart", f"seed={seed}"]
    if short:
        command += ["trainer.num_steps=3", "evaluation.num_tasks=32"]
    process = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    last = process.stdout.strip().splitlines()[-1]
    return Path(last.removeprefix("run: "))


def read_run(path: Path) -> dict[str, Any]:
    """What the table shows about one run."""
    summary = json.loads((path / "summary.json").read_text())
    rows = read_metrics(path / "metrics.jsonl")
    return {
        "seed": summary["seed"],
        "before": summary["heldout"]["before"],
        "after": summary["heldout"]["after"],
        "seconds": summary["seconds"],
        "success": [row["success/mean"] for row in rows],
        "step_seconds": statistics.median(row["seconds/step"] for row in rows),
        "split": {part: statistics.median(row[f"seconds/{part}"] for row in rows) for part in PARTS},
        "tokens_per_second": statistics.median(row["rollout/tokens_per_second"] for row in rows),
    }


def draw(runs: list[dict[str, Any]], path: Path) -> None:
    """Success per training step, one line per seed, with the held-out intervals at both ends."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(8, 4.5), dpi=120)
    for run in runs:
        steps = range(1, len(run["success"]) + 1)
        (line,) = axes.plot(
            steps, run["success"], linewidth=1.4, label=f"seed {run['seed']}: training success"
        )
        for x, point in ((0, run["before"]), (len(run["success"]) + 1, run["after"])):
            error = [[point["mean"] - point["low"]], [point["high"] - point["mean"]]]
            axes.errorbar([x], [point["mean"]], yerr=error, fmt="o", capsize=4, color=line.get_color())
    axes.plot([], [], "ko", label="held-out success, 95 % interval")
    axes.set_xlabel("training step")
    axes.set_ylabel("share of questions answered")
    axes.set_ylim(0, 1.02)
    axes.grid(alpha=0.3)
    axes.legend(loc="lower right")
    axes.set_title("quickstart: GRPO on two-search questions, CPU only")
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)


def main() -> None:
    arguments = parse_arguments()
    seeds = arguments.seeds[:1] if arguments.short else arguments.seeds
    paths = arguments.run or [train(seed, short=arguments.short) for seed in seeds]
    runs = [read_run(path) for path in paths]
    print(f"{'seed':>4} {'before':>20} {'after':>20} {'total s':>8} {'step s':>7}  split of the median step")
    for run in runs:
        ends = [f"{p['mean']:.3f} [{p['low']:.3f}, {p['high']:.3f}]" for p in (run["before"], run["after"])]
        split = " ".join(f"{part} {seconds:.2f}" for part, seconds in run["split"].items())
        total = run["seconds"]["total"]
        print(
            f"{run['seed']:>4} {ends[0]:>20} {ends[1]:>20} {total:>8.0f} {run['step_seconds']:>7.2f}  {split}"
        )
    if arguments.picture:
        draw(runs, arguments.picture)
    print(json.dumps({"benchmark": "quickstart_curves", "short": arguments.short, "runs": runs}))


if __name__ == "__main__":
    main()
