"""Seconds from the command of a run to where its first step begins, beside those of its slowest part alone: one SGLang
server, from its command to its first token. What a run takes beyond that are checks of its config, Ray and the ranks.

The two take turns, so that other work on the machine slows both.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from polyturn.configs.models import resolve_model_path
from polyturn.configs.schema.engines import EnginesConfig
from polyturn.rollout.engines.server import EngineSpec, SGLangServer

RUN = {
    "trainer.num_steps": 1,
    "trainer.global_batch_size": 4,
    "rollout.prompts_per_step": 2,
    "rollout.samples_per_prompt": 2,
    "evaluation.before": "false",
    "evaluation.after": "false",
}
"""The least that the quickstart can do."""


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, epilog="example: startup.py --rounds 3")
    parser.add_argument("--rounds", type=int, default=3, help="starts of each")
    parser.add_argument("--short", action="store_true", help="one start of each")
    return parser.parse_args()


def start_run(folder: Path) -> dict[str, float]:
    """Seconds of a run until its first step, and those of them in which its processes were started."""
    options = [f"{key}={value}" for key, value in RUN.items()]
    command = [
        sys.executable,
        "-m",
        "polyturn.cli.main",
        "train",
        "quickstart",
        f"run_dir={folder}",
        *options,
    ]
    started = time.time()
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    # What the run consists of is written once everything is up.
    ready = (folder / "identity.json").stat().st_mtime
    summary = json.loads((folder / "summary.json").read_text())
    return {"run": ready - started, "processes": float(summary["seconds"]["start"])}


def start_engine(folder: Path) -> float:
    """Seconds of one server until it has generated a token."""
    spec = EngineSpec(
        config=EnginesConfig(device="cpu"),
        model_path=resolve_model_path("builtin:tiny-searcher"),
        dtype="float32",
        seeded=True,
        log_directory=folder,
    )
    started = time.perf_counter()
    with SGLangServer(spec) as server:
        server.wait_ready()
        return time.perf_counter() - started


def main() -> None:
    arguments = parse_arguments()
    rounds = 1 if arguments.short else arguments.rounds
    found: dict[str, list[float]] = {"run": [], "processes": [], "engine": []}
    for index in range(rounds):
        with tempfile.TemporaryDirectory() as name:
            for what, seconds in start_run(Path(name) / "run").items():
                found[what].append(seconds)
            found["engine"].append(start_engine(Path(name)))
        print(
            f"round {index + 1}: " + ", ".join(f"{what} {values[-1]:.1f} s" for what, values in found.items())
        )
    seconds = {what: statistics.median(values) for what, values in found.items()}
    print(
        "of the run, from its command to its first step; of these in which its processes start; of an engine alone"
    )
    print(
        json.dumps(
            {
                "benchmark": "startup",
                "short": arguments.short,
                "seconds": {what: round(value, 2) for what, value in seconds.items()},
                "ratio_to_engine": round(seconds["run"] / seconds["engine"], 3),
            }
        )
    )


if __name__ == "__main__":
    main()
