"""Runs against an SGLang server that somebody else started: weights pushed by broadcast and through a disk, and a
version contract where somebody else has the server load them.

    python benchmarks/external_engines.py [--short]

The server is started by its own command line, as anybody would, and lives on between the runs, each of which trains
two steps of a few episodes and compares checksums and logprobs. With `updates: external` a loop beside the run does
what the server's owner has to: it has it load each directory that the run writes, and stamp its number.

The last line is JSON: by way, the version that the server serves at the end, how many tensors differed, the largest
difference of a logprob, and the seconds of a sync.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

from polyturn.configs.models import resolve_model_path
from polyturn.rollout.engines.control import EngineControl
from polyturn.rollout.engines.placement import free_port
from polyturn.rollout.engines.process import EngineError

WAYS: Mapping[str, Sequence[str]] = {
    "broadcast": ("weight_sync.kind=broadcast",),
    "disk": ("weight_sync.kind=disk",),
    "external": ("weight_sync.kind=disk", "engines.updates=external"),
}
SMALL = (
    "trainer.num_steps=2",
    "trainer.parallel={data: 1}",
    "trainer.global_batch_size=8",
    "rollout.prompts_per_step=2",
    "rollout.samples_per_prompt=4",
    "rollout.sampling.seeded=false",
    "evaluation.before=false",
    "evaluation.after=false",
)
START_S = 300.0


@contextmanager
def somebodys_server(scratch: Path) -> Iterator[str]:
    """An SGLang server as its own documentation starts one, with the demo's model; its URL."""
    port = free_port("127.0.0.1")
    arguments = (
        f"--model-path {resolve_model_path('builtin:tiny-searcher')} --device cpu --dtype float32 "
        "--attention-backend torch_native --cuda-graph-backend-decode=disabled "
        "--cuda-graph-backend-prefill=disabled --max-total-tokens 16384 --max-running-requests 32 "
        f"--skip-server-warmup --sleep-on-idle --host 127.0.0.1 --port {port}"
    ).split()
    url = f"http://127.0.0.1:{port}"
    with (scratch / "server.log").open("wb") as log:
        server = subprocess.Popen(
            [sys.executable, "-m", "polyturn.rollout.engines.sglang_main", *arguments],
            env={**os.environ, "SGLANG_USE_CPU_ENGINE": "1", "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
            stdout=log,
            stderr=subprocess.STDOUT,
        )
    try:
        deadline = time.monotonic() + START_S
        with EngineControl(url) as control:
            while True:
                try:
                    control.weight_version()
                    break
                except EngineError:
                    if time.monotonic() > deadline or server.poll() is not None:
                        raise
                    time.sleep(1.0)
        yield url
    finally:
        server.terminate()
        server.wait()


def serve_what_is_written(url: str, weights: Path, closing: threading.Event) -> None:
    """What the server's owner does: load each version's directory once it is there."""
    served = -1
    with EngineControl(url) as control:
        while not closing.wait(0.2):
            found = [
                (int(match[1]), path)
                for path in (weights.iterdir() if weights.is_dir() else ())
                if (match := re.fullmatch(r"version_(\d+)", path.name))
            ]
            number, path = max(found, default=(-1, weights))
            if number > served:
                control.update_weights_from_disk(model_path=str(path), weight_version=number)
                served = number


def measure(way: str, url: str, scratch: Path) -> dict[str, object]:
    """One run."""
    run = scratch / way
    command = [sys.executable, "-m", "polyturn", "train", "quickstart", f"run_dir={run}"]
    command += [f"engines.urls=[{url}]", *SMALL, *WAYS[way]]
    closing = threading.Event()
    owner = threading.Thread(target=serve_what_is_written, args=(url, run / "weights", closing))
    if way == "external":
        owner.start()
    try:
        subprocess.run(command, check=True)
    finally:
        closing.set()
        if way == "external":
            owner.join()
    summary = json.loads((run / "summary.json").read_text())
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    with EngineControl(url) as control:
        return {
            "served_version": control.weight_version(),
            "checks": summary["checks"],
            "sync_seconds": [row["sync/seconds"] for row in rows if "sync/seconds" in row],
        }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--short", action="store_true", help="by broadcast alone")
    arguments = parser.parse_args()
    ways = ["broadcast"] if arguments.short else list(WAYS)
    with tempfile.TemporaryDirectory() as directory:
        scratch = Path(directory)
        with somebodys_server(scratch) as url:
            found = {way: measure(way, url, scratch) for way in ways}
    print(json.dumps({"benchmark": "external_engines", "ways": found}))


if __name__ == "__main__":
    main()
