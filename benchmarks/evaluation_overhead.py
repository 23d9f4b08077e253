"""CPU of an evaluation beside inspect_ai and verifiers, and 1,000 episodes at once against a slow endpoint.

    python benchmarks/evaluation_overhead.py [--short] [--peers DIR] [--without-peers]

All play the same tasks against the same OpenAI-compatible endpoint, which is a process of its own with fixed answers:
four turns, three of them with a call of one tool, whose result is of 400 characters. Each contestant is a process in a
virtual environment of its own, plays a few episodes first, and writes what it writes (trajectories, log, results) to
the disk. `cpu_ms` is the CPU time of its process for one episode, imports left out; contestants take turns, and the
least of their rounds counts. `ratio_to_best_peer` is the least `cpu_ms` of the peers over Polyturn's.

verifiers is 0.1, which plays in its own process; in 0.4 each rollout is a program of its own, which `uv` starts.

The second part plays 1,000 episodes at once against an endpoint that takes 2 s for each answer: `slow_failed` of them
fail, and `slow_share_of_ideal` is the time of one episode, 8 s, over that of all. The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent / "contestants" / "evaluations"
ROOT = Path(__file__).parent.parent
PEERS = {
    "inspect": ("inspect_ai==0.3.285", "openai"),
    "verifiers": ("verifiers==0.1.14",),
}
NUM_TURNS = 4
SLOW_S = 2.0


@contextmanager
def endpoint(latency_s: float) -> Iterator[str]:
    """The URL of one that is served meanwhile."""
    command = [sys.executable, str(HERE / "endpoint.py"), str(latency_s)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        try:
            yield process.stdout.readline().strip()
        finally:
            process.terminate()


def python_of(peer: str, peers: Path) -> Path:
    """The interpreter of a peer's environment, which is made if it is not there."""
    path = peers / peer / "bin" / "python"
    if not path.exists():
        print(f"installing {' '.join(PEERS[peer])} into {peers / peer}", flush=True)
        subprocess.run([sys.executable, "-m", "venv", str(peers / peer)], check=True)
        subprocess.run([str(path), "-m", "pip", "install", "--quiet", *PEERS[peer]], check=True)
    return path


def play(python: Path, name: str, url: str, number: int, at_once: int) -> dict[str, Any]:
    """The figures of one contestant. Raises `RuntimeError` where it did not play all episodes right."""
    environment = {**os.environ, "BENCHMARK_KEY": "none", "OMP_NUM_THREADS": "1"}
    if name != "polyturn":
        environment.pop("PYTHONPATH", None)
    with tempfile.TemporaryDirectory(prefix="polyturn-overhead-") as directory:
        done = subprocess.run(
            [str(python), str(HERE / f"with_{name}.py"), url, str(number), str(at_once), directory],
            capture_output=True,
            text=True,
            env=environment,
            cwd=directory,
            check=False,
        )
    if done.returncode:
        raise RuntimeError(f"{name}: {done.stderr[-2000:]}")
    figures: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    if figures["num_right"] != number:
        raise RuntimeError(f"{name} played {figures['num_right']} of {number} episodes right: {figures}")
    return figures


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__)
    arguments.add_argument("--short", action="store_true")
    arguments.add_argument("--without-peers", action="store_true")
    arguments.add_argument("--peers", type=Path, default=Path(tempfile.gettempdir()) / "polyturn-peers")
    options = arguments.parse_args()
    number, at_once, rounds = (60, 16, 1) if options.short else (300, 32, 2)
    contestants = {"polyturn": Path(sys.executable)}
    if not options.without_peers:
        contestants |= {peer: python_of(peer, options.peers) for peer in PEERS}
    least: dict[str, float] = {}
    with endpoint(0.0) as url:
        for index in range(rounds):
            for name, python in contestants.items():
                figures = play(python, name, url, number, at_once)
                cpu_ms = 1000 * figures["cpu_s"] / number
                least[name] = min(cpu_ms, least.get(name, cpu_ms))
                print(
                    f"round {index + 1}  {name:<10} {cpu_ms:6.2f} ms of CPU an episode, "
                    f"{figures['wall_s']:.1f} s, {figures['peak_mb']:.0f} MiB",
                    flush=True,
                )
    row: dict[str, Any] = {"cpu_ms": {name: round(value, 3) for name, value in least.items()}}
    peers = [value for name, value in least.items() if name != "polyturn"]
    if peers:
        row["ratio_to_best_peer"] = round(min(peers) / least["polyturn"], 2)
    slow, slow_s = (100, 0.5) if options.short else (1000, SLOW_S)
    with endpoint(slow_s) as url:
        figures = play(contestants["polyturn"], "polyturn", url, slow, slow)
    row |= {
        "slow_episodes": slow,
        "slow_failed": figures["num_failed"],
        "slow_share_of_ideal": round(NUM_TURNS * slow_s / figures["wall_s"], 3),
    }
    print(json.dumps(row))


if __name__ == "__main__":
    main()
