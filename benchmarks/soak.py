"""A long run on the CPU: whether memory, threads, descriptors and temporary files stay what they are.

    python benchmarks/soak.py [--hours 2] [--staleness 2] [--short]

A run of the demo's sizes, halved, is trained for so long; every few seconds all of its processes are looked at. The
first quarter warms up. Of each kind of process and figure the growth is told: the median of the last tenth of the time
over that of the first tenth behind the warm-up, less 1. `largest_growth` is to be below 0.02; figures that are small
(fewer than 50 threads, descriptors or files) may grow by one. The last line is JSON.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil

KINDS = {
    "driver": "polyturn.cli.main",
    "rank": "ray::PolicyRank",
    "rollout worker": "ray::PlayerActor",
    "engine's scheduler": "sglang::scheduler",
    "engine's server": "polyturn.rollout.engines.sglang_main",
    "router": "sglang::router",
}
"""Processes by what their command lines contain; supervisors do not count."""
FIGURES = ("memory_mb", "threads", "descriptors")
TEMPORARY = ("polyturn*", "sgl*", "sglang*", "tmp*", "torch*")
EVERY_S = 5.0
WARM_SHARE = 0.25
SMALL = 50


@dataclass(frozen=True, kw_only=True, slots=True)
class Sample:
    """All processes of a run at one time."""

    seconds: float
    figures: dict[str, float]
    """By `kind figure`."""


def family_of(pid: int) -> Iterator[tuple[str, psutil.Process]]:
    """The run's processes that are watched, with their kinds."""
    root = psutil.Process(pid)
    for process in (root, *root.children(recursive=True)):
        with contextlib.suppress(psutil.Error):
            command = " ".join(process.cmdline())
            if "engines.supervisor" in command:
                continue
            for kind, text in KINDS.items():
                if text in command and (kind != "driver" or process.pid == pid):
                    yield kind, process


def private_mb(process: psutil.Process) -> float:
    """Memory that is the process's own: shared libraries and shared memory are not."""
    return process.memory_full_info().uss / 2**20


def look(pid: int, run: Path, begun: float) -> Sample:
    """One sample."""
    figures: dict[str, float] = {}
    for kind, process in family_of(pid):
        with contextlib.suppress(psutil.Error):
            values = (private_mb(process), process.num_threads(), process.num_fds())
            for name, value in zip(FIGURES, values, strict=True):
                figures[f"{kind} {name}"] = figures.get(f"{kind} {name}", 0.0) + value
    temporary = Path(tempfile.gettempdir())
    figures["temporary files"] = sum(1 for pattern in TEMPORARY for _ in temporary.glob(pattern))
    shared = Path("/dev/shm")
    figures["shared memory files"] = sum(1 for _ in shared.iterdir()) if shared.is_dir() else 0
    figures["journals and parts"] = sum(1 for _ in run.glob("journal/*")) + sum(
        1 for _ in run.rglob("*.part")
    )
    return Sample(seconds=time.monotonic() - begun, figures=figures)


def growth_of(samples: list[Sample], name: str) -> tuple[float, float, float]:
    """The figure's first and last median behind the warm-up, and its growth."""
    total = samples[-1].seconds
    warm = [sample for sample in samples if sample.seconds >= WARM_SHARE * total and name in sample.figures]
    count = max(1, len(warm) // 10)
    first = statistics.median(sample.figures[name] for sample in warm[:count])
    last = statistics.median(sample.figures[name] for sample in warm[-count:])
    if "memory" not in name.split() and "memory_mb" not in name and first < SMALL and last - first <= 1:
        return first, last, 0.0
    return first, last, last / first - 1 if first else float(last > 1)


def watch(process: subprocess.Popen[str], run: Path, seconds: float) -> list[Sample]:
    """Look at the run until its time is over. Raises `RuntimeError` where it ends before."""
    begun: float | None = None
    samples: list[Sample] = []
    while begun is None or time.monotonic() - begun < seconds:
        if process.poll() is not None:
            raise RuntimeError("the run ended by itself")
        if begun is None and (run / "metrics.jsonl").exists():
            begun = time.monotonic()
        if begun is not None:
            samples.append(look(process.pid, run, begun))
        time.sleep(EVERY_S)
    return samples


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--hours", type=float, default=2.0)
    parser.add_argument("--staleness", type=int, default=2)
    parser.add_argument("--short", action="store_true", help="three minutes")
    arguments = parser.parse_args()
    seconds = 180.0 if arguments.short else 3600 * arguments.hours
    with tempfile.TemporaryDirectory(prefix="soak-") as scratch:
        run = Path(scratch) / "run"
        command = [sys.executable, "-m", "polyturn.cli.main", "train", "quickstart", f"run_dir={run}"]
        command += ["trainer.num_steps=100000", "rollout.prompts_per_step=8", "trainer.global_batch_size=64"]
        command += [f"rollout.max_staleness={arguments.staleness}", "trainer.parallel.data=1"]
        command += ["evaluation.num_tasks=32", "evaluation.every_steps=25", "evaluation.before=false"]
        with (Path(scratch) / "output").open("w") as output:
            process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT, text=True)
            try:
                samples = watch(process, run, seconds)
                num_steps = len((run / "metrics.jsonl").read_bytes().splitlines())
            finally:
                process.terminate()
                try:
                    process.wait(timeout=180)
                except subprocess.TimeoutExpired:
                    process.kill()
                if process.returncode not in (0, 130, -15):
                    print((Path(scratch) / "output").read_text()[-3000:])
    print(f"{'what':34} {'first':>10} {'last':>10} {'growth':>8}")
    growths = {}
    for name in sorted({name for sample in samples for name in sample.figures}):
        first, last, growths[name] = growth_of(samples, name)
        print(f"{name:34} {first:>10.1f} {last:>10.1f} {growths[name]:>8.1%}")
    worst = max(growths, key=lambda name: growths[name])
    print(
        json.dumps(
            {
                "benchmark": "soak",
                "hours": seconds / 3600,
                "steps": num_steps,
                "samples": len(samples),
                "largest_growth": round(growths[worst], 4),
                "of": worst,
                "growth": {name: round(growth, 4) for name, growth in growths.items()},
            }
        )
    )


if __name__ == "__main__":
    main()
