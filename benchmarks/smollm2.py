"""A real pre-trained model on two CPU cores: what the recipes of configs/recipes/smollm2 reach, and in which time.

Each recipe and seed is the way of its README: demonstrations by the environment's own solution, a warm start on them,
then reinforcement learning; held-out tasks before and after. Name one recipe for a figure within the hour.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from polyturn.trainer.sinks.json_lines import read_metrics

COMMAND = (sys.executable, "-m", "polyturn.cli.main")
RECIPES = {"smollm2_words": (256, 16), "smollm2_calculator": (64, 8), "smollm2_search_r1": (64, 8)}
"""Demonstrations of the warm start, and how many there are in an update."""
WARM = (
    "trainer.optimizer.learning_rate=2e-4",
    "trainer.optimizer.schedule.kind=cosine",
)
SHORT = (
    "rollout.prompts_per_step=2",
    "rollout.samples_per_prompt=4",
    "trainer.global_batch_size=8",
    "evaluation.num_tasks=8",
)


def run(*arguments: str) -> None:
    """A command, whose progress goes to the error stream."""
    subprocess.run([*COMMAND, *arguments], check=True, stdout=sys.stderr)


def measure(recipe: str, seed: int, *, steps: int | None, short: bool, folder: Path) -> dict[str, Any]:
    """The reward of each step, the held-out scores with their intervals, and the seconds of each part."""
    demonstrations, rows = folder / f"{recipe}-demonstrations", folder / f"{recipe}.jsonl"
    warm, trained = folder / f"{recipe}-{seed}-warm", folder / f"{recipe}-{seed}"
    num_demonstrations, in_an_update = RECIPES[recipe]
    common = (f"model.path={folder / 'model'}", f"seed={seed}")
    if not rows.exists():
        played = ("--policy", "oracle", "--directory", str(demonstrations), "evaluation.split=train")
        run("eval", "run", recipe, *played, common[0], f"evaluation.num_tasks={num_demonstrations}")
        run("eval", "curate", str(demonstrations), "--output", str(rows))
    started = time.perf_counter()
    few = ("trainer.num_steps=2",) if short else ()
    warm_up = (*WARM, f"trainer.global_batch_size={in_an_update}", *few)
    run("sft", recipe, "--data", str(rows), *common, *warm_up, f"run_dir={warm}")
    warmed = time.perf_counter()
    limits = [*SHORT, "trainer.num_steps=2"] if short else []
    if steps is not None and not short:
        limits.append(f"trainer.num_steps={steps}")
    run("train", recipe, f"model.path={warm / 'policy'}", f"seed={seed}", f"run_dir={trained}", *limits)
    metrics = read_metrics(trained / "metrics.jsonl")
    summary = json.loads((trained / "summary.json").read_text(encoding="utf-8"))
    return {
        "recipe": recipe,
        "seed": seed,
        "reward": [round(row["reward/mean"], 3) for row in metrics],
        "heldout": summary.get("heldout"),
        "step_seconds": round(statistics.median(row["seconds/step"] for row in metrics), 1),
        "warm_seconds": round(warmed - started),
        "train_seconds": round(time.perf_counter() - warmed),
    }


def main() -> None:
    """Run as asked, and print the figures as JSON in the last line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--short", action="store_true", help="two small updates and steps of each; no curve")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    parser.add_argument("--steps", type=int, help="default: the recipe's")
    parser.add_argument("--folder", type=Path, default=Path("runs/smollm2"), help="for runs and the model")
    parser.add_argument("recipes", nargs="*", help=f"default: {', '.join(RECIPES)}")
    options = parser.parse_args()
    if not (options.folder / "model").is_dir():
        options.folder.mkdir(parents=True, exist_ok=True)
        run("models", "get", "smollm2-135m", "--directory", str(options.folder / "model"))
    found = []
    for recipe in options.recipes or RECIPES:
        for seed in options.seeds:
            found.append(
                measure(recipe, seed, steps=options.steps, short=options.short, folder=options.folder)
            )
            print(json.dumps(found[-1]), flush=True)
    print(json.dumps({"short": options.short, "runs": found}))


if __name__ == "__main__":
    main()
