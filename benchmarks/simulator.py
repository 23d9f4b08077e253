"""Whether the simulator predicts real runs: calibrated on one, it predicts another of other settings.

    python benchmarks/simulator.py [--directory DIR] [--short]

Both runs are of the quickstart recipe on this machine: the first with all requests at once, the second with few. The
speeds of engine and trainer come from the first steps of the first run. Predicted are the steps of the first run that
the calibration did not see, and those of the second. `ratio_same` and `ratio_other` are predicted over real mean
seconds of a step, and are to be within 15 % of 1. The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from polyturn.rollout.simulator.calibration import RealRun, calibrate, read_run
from polyturn.rollout.simulator.rates import Rates
from polyturn.rollout.simulator.simulation import simulate

NUM_SEEN = 4
"""Steps that are calibrated on."""


def train(directory: Path, *, num_requests: int, num_steps: int, num_prompts: int) -> None:
    """One run, unless it is there."""
    if (directory / "summary.json").exists():
        return
    command = [sys.executable, "-m", "polyturn.cli.main", "train", "quickstart", f"run_dir={directory}"]
    command += [
        f"trainer.num_steps={num_steps}",
        f"rollout.prompts_per_step={num_prompts}",
        f"trainer.global_batch_size={8 * num_prompts}",
        f"rollout.max_concurrent_requests={num_requests}",
        "trainer.parallel.data=1",
        "evaluation.before=false",
        "evaluation.after=false",
        "metrics.sinks=[]",
    ]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)


def predicted_over_real(rates: Rates, run: RealRun) -> float:
    """Mean seconds of a step, as predicted from its own episodes, over those that it took."""
    steps = simulate(run.config, rates, run.workload, num_steps=run.num_steps).steps
    predicted = statistics.fmean(step.seconds for step in steps)
    real = statistics.fmean(row["seconds/step"] for row in run.rows)
    print(f"{run.num_steps} steps: predicted {predicted:.2f} s a step, real {real:.2f} s")
    return predicted / real


def measure(directory: Path, *, short: bool) -> dict[str, float | str]:
    """Train, calibrate, predict."""
    num_steps, num_prompts = (7, 4) if short else (12, 16)
    wide, narrow = directory / "wide", directory / "narrow"
    train(wide, num_requests=128, num_steps=num_steps, num_prompts=num_prompts)
    train(narrow, num_requests=8, num_steps=num_steps, num_prompts=num_prompts)
    rates = calibrate(read_run(wide, num_steps=NUM_SEEN))
    print(f"engine: {rates.engine}\ntrainer: {rates.trainer}")
    return {
        "benchmark": "simulator",
        "ratio_same": predicted_over_real(rates, read_run(wide, skip=1 + NUM_SEEN)),
        "ratio_other": predicted_over_real(rates, read_run(narrow)),
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--directory", type=Path, help="where the runs are, and stay")
    parser.add_argument("--short", action="store_true", help="fewer and smaller steps")
    arguments = parser.parse_args()
    if arguments.directory is not None:
        figures = measure(arguments.directory, short=arguments.short)
    else:
        with tempfile.TemporaryDirectory(prefix="polyturn-simulator-") as scratch:
            figures = measure(Path(scratch), short=arguments.short)
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
