"""The CPU twins of the recipes, each trained for real: what its reward did, and what a step took.

Without --short each runs as it is written; with it two small steps of each, without evaluations. `fine_tuning_cpu` is
taught what the environment's own solution plays, and the teacher of `distillation_cpu` is the model that ships, unless
`runs/teacher` holds a better one (configs/recipes/distillation/README.md).
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from polyturn.configs.loading.loader import load_config, shipped_names
from polyturn.configs.schema.run import RunConfig
from polyturn.trainer.sinks.json_lines import read_metrics

COMMAND = (sys.executable, "-m", "polyturn.cli.main")
TEACHER = Path("runs/teacher/policy")
SHORT = (
    "trainer.num_steps=2",
    "evaluation.before=false",
    "evaluation.after=false",
)
MOST_PROMPTS = 4


def twins() -> list[str]:
    """The recipes that train on a CPU, and whose model ships; those for evaluations alone have GPUs."""
    configs = {name: load_config(name) for name in shipped_names("recipe")}
    return [
        name
        for name, config in configs.items()
        if config.engines.device == "cpu" and config.model.path.startswith("builtin:")
    ]


def smaller(config: RunConfig) -> list[str]:
    """Options that make steps of a few prompts of it."""
    prompts = min(MOST_PROMPTS, config.rollout.prompts_per_step)
    samples = min(4, config.rollout.samples_per_prompt)
    updates = config.trainer.updates_per_step
    if prompts * samples % updates:
        updates = 1
    return [
        f"rollout.prompts_per_step={prompts}",
        f"rollout.samples_per_prompt={samples}",
        f"trainer.global_batch_size={prompts * samples // updates}",
        f"trainer.updates_per_step={updates}",
        *SHORT,
    ]


def output(*arguments: str) -> str:
    """The last line that a command prints."""
    done = subprocess.run([*COMMAND, *arguments], capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"polyturn {' '.join(arguments)}\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}")
    return done.stdout.strip().splitlines()[-1]


def demonstrations(folder: Path) -> Path:
    """Rows of what the environment's own solution plays."""
    rows = folder / "rows.jsonl"
    options = (f"output_dir={folder}", "evaluation.split=train", "evaluation.num_tasks=64")
    played = output("eval", "run", "quickstart-heldout", "--policy", "oracle", *options)
    output("eval", "curate", json.loads(played)["directory"], "--output", str(rows))
    return rows


def measure(name: str, *, short: bool, folder: Path) -> dict[str, Any]:
    """Train one twin."""
    config = load_config(name)
    options = [f"output_dir={folder}", *(smaller(config) if short else ())]
    command: Sequence[str] = ("train", name)
    if name.startswith("fine_tuning"):
        command = ("sft", name, "--data", str(demonstrations(folder)))
    if config.teachers and not TEACHER.is_dir():
        options.append("teachers=[{name: untrained, path: builtin:tiny-searcher, engines: {device: cpu}}]")
    started = time.perf_counter()
    path = Path(output(*command, *options).removeprefix("run: "))
    rows = read_metrics(path / "metrics.jsonl")
    figures = {"steps": len(rows), "seconds": time.perf_counter() - started}
    figures["step_seconds"] = statistics.median(row["seconds/step"] for row in rows)
    for key in ("reward/mean", "train/loss", "distillation/kl"):
        if key in rows[0]:
            figures[key] = [rows[0][key], rows[-1][key]]
    return figures


def main() -> None:
    """Run as asked, and print the figures as JSON in the last line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--short", action="store_true", help="two small steps of each; about a minute each")
    parser.add_argument("names", nargs="*", help=f"which twins; default: {', '.join(twins())}")
    options = parser.parse_args()
    figures = {}
    for name in options.names or twins():
        with tempfile.TemporaryDirectory(prefix="polyturn-twins-") as folder:
            figures[name] = measure(name, short=options.short, folder=Path(folder))
        print(f"{name}: {json.dumps(figures[name])}", flush=True)
    print(json.dumps({"short": options.short, "twins": figures}))


if __name__ == "__main__":
    main()
