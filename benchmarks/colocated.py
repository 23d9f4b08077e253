"""Engines and trainer by turns against engines with a place of their own: the same bits, and what the turns take.

    python benchmarks/colocated.py [--steps 8] [--short]

Two runs of the demo from the same seed, one request at a time, so that no batch decides how an engine rounds. Compared
are all tokens with their logprobs, step by step, and the weights at the end, bit for bit. Nothing waits for a GPU here,
so the seconds are of the calls, the copies and the order alone; `turn_share` is their part of a step. The last line is
JSON.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path

from polyturn.rollout.store import TrajectoryStore
from polyturn.trainer.sinks.json_lines import read_metrics

PHASES = ("release", "reload", "offload", "resume")


def train(directory: Path, *overrides: str) -> None:
    """A run in a process of its own."""
    command = [sys.executable, "-m", "polyturn.cli.main", "train", "quickstart", f"run_dir={directory}"]
    done = subprocess.run([*command, *overrides], capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"the run in {directory} failed:\n{done.stdout[-2000:]}\n{done.stderr[-2000:]}")


def sampled(directory: Path) -> Mapping[str, tuple[bytes, bytes]]:
    """By episode, its tokens and their logprobs as bytes."""
    store = TrajectoryStore(directory)
    found = {}
    for step in store.steps():
        for episode in store.read_step(step):
            columns = [(segment.token_ids, segment.logprobs) for segment in episode.segments]
            tokens, logprobs = (
                b"".join(column.tobytes() for column in each) for each in zip(*columns, strict=True)
            )
            found[episode.episode_id] = (tokens, logprobs)
    return found


def weights(directory: Path) -> list[bytes]:
    """The files of the final policy."""
    return [path.read_bytes() for path in sorted((directory / "policy").glob("*.safetensors"))]


def measure(*, steps: int, scratch: Path) -> dict[str, object]:
    """Both runs, one after the other."""
    options = [
        f"trainer.num_steps={steps}",
        "trainer.global_batch_size=16",
        "rollout.prompts_per_step=4",
        "rollout.samples_per_prompt=4",
        "rollout.max_concurrent_requests=1",
        "evaluation={before: false, after: false}",
        "metrics.sinks=[]",
    ]
    for placement in ("own", "shared"):
        train(scratch / placement, *options, f"engines.placement={placement}")
    own, shared = scratch / "own", scratch / "shared"
    ours, theirs = sampled(shared), sampled(own)
    rows = {name: read_metrics(scratch / name / "metrics.jsonl") for name in ("own", "shared")}
    turns = [sum(row[f"seconds/{phase}"] for phase in PHASES) for row in rows["shared"]]
    print(f"{'step':>4} {'own s':>7} {'shared s':>8} " + " ".join(f"{phase:>8}" for phase in PHASES))
    for one, other in zip(rows["own"], rows["shared"], strict=True):
        shown = " ".join(f"{other[f'seconds/{phase}']:8.3f}" for phase in PHASES)
        print(f"{one['step']:>4} {one['seconds/step']:7.2f} {other['seconds/step']:8.2f} {shown}")
    return {
        "benchmark": "colocated",
        "steps": steps,
        "episodes": len(theirs),
        "equal_episodes": sum(ours.get(name) == column for name, column in theirs.items()),
        "equal_weights": weights(shared) == weights(own),
        "turn_s": statistics.median(turns),
        "turn_share": sum(turns) / sum(row["seconds/step"] for row in rows["shared"]),
        "offloaded_bytes": rows["shared"][-1]["turns/offloaded_bytes"],
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--short", action="store_true", help="two steps")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        print(json.dumps(measure(steps=2 if arguments.short else arguments.steps, scratch=Path(scratch))))


if __name__ == "__main__":
    main()
