"""Weight sync against a raw broadcast: seconds to update a running SGLang server's weights, divided by seconds to
broadcast the same bytes between two plain processes over gloo. Both alternate in one run."""

from __future__ import annotations

import argparse
import json
import multiprocessing
import statistics
import tempfile
import time
from datetime import timedelta
from multiprocessing.connection import Connection
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors.torch import load_file

from polyturn.configs.models import resolve_model_path
from polyturn.configs.schema.engines import EnginesConfig
from polyturn.rollout.engines.checksums import EngineChecksums
from polyturn.rollout.engines.placement import free_port
from polyturn.rollout.engines.server import EngineSpec, SGLangServer
from polyturn.trainer.weight_sync.broadcast import BroadcastPublisher
from polyturn.trainer.weight_sync.process_group import join_process_group


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, epilog="example: weight_sync.py --repeats 20")
    parser.add_argument(
        "--model", default="builtin:tiny-searcher", help="Hugging Face directory or builtin:NAME"
    )
    parser.add_argument("--repeats", type=int, default=20, help="pairs of measurements")
    parser.add_argument("--short", action="store_true", help="5 repeats")
    return parser.parse_args()


def receive(port: int, num_bytes: int, pipe: Connection) -> None:
    """The other end of the raw broadcast: receives whenever it is told to."""
    torch.set_num_threads(1)
    group = join(port, rank=1)
    buffer = torch.empty(num_bytes, dtype=torch.uint8)
    while pipe.recv():
        dist.broadcast(buffer, src=0, group=group)
        pipe.send(True)


def join(port: int, *, rank: int) -> dist.ProcessGroup:
    return join_process_group(
        address="127.0.0.1",
        port=port,
        world_size=2,
        rank=rank,
        name="raw",
        backend="gloo",
        timeout=timedelta(seconds=60),
    )


def main() -> None:
    arguments = parse_arguments()
    repeats = 5 if arguments.short else arguments.repeats
    torch.set_num_threads(1)
    model = resolve_model_path(arguments.model)
    weights = load_file(model / "model.safetensors")
    tied = bool(json.loads((model / "config.json").read_text()).get("tie_word_embeddings"))
    num_bytes = sum(tensor.numel() * tensor.element_size() for tensor in weights.values())
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    port = free_port("127.0.0.1")
    receiver = context.Process(target=receive, args=(port, num_bytes, theirs), daemon=True)
    receiver.start()
    raw_group = join(port, rank=0)
    flat = torch.zeros(num_bytes, dtype=torch.uint8)
    sync: list[float] = []
    raw: list[float] = []
    with tempfile.TemporaryDirectory() as logs:
        spec = EngineSpec(
            config=EnginesConfig(device="cpu"),
            model_path=model,
            sglang={"max_total_tokens": 8192},
            dtype="float32",
            seeded=False,
            log_directory=Path(logs),
        )
        with SGLangServer(spec) as server:
            server.wait_ready()
            publisher = BroadcastPublisher(
                tensor_parallel=1,
                address="127.0.0.1",
                backend="gloo",
                bucket_bytes=1 << 29,
                timeout_s=60,
                new_checksums=lambda: EngineChecksums(tied_embeddings=tied),
            )
            publisher.set_engines([server.url])
            for version in range(repeats + 1):
                publisher.prepare(weights.items(), version=version)
                seconds = publisher.activate().seconds
                started = time.perf_counter()
                ours.send(True)
                dist.broadcast(flat, src=0, group=raw_group)
                ours.recv()
                if version > 0:  # the first of each is a warm-up
                    sync.append(seconds)
                    raw.append(time.perf_counter() - started)
            publisher.close()
    ours.send(False)
    receiver.join(timeout=10)
    figures = {
        "benchmark": "weight_sync",
        "num_bytes": num_bytes,
        "sync_seconds": statistics.median(sync),
        "raw_broadcast_seconds": statistics.median(raw),
        "ratio": statistics.median(a / b for a, b in zip(sync, raw, strict=True)),
        "repeats": repeats,
    }
    print(f"{'bytes':>12} {'sync s':>10} {'raw broadcast s':>16} {'ratio':>7}")
    print(
        f"{num_bytes:>12} {figures['sync_seconds']:>10.4f} {figures['raw_broadcast_seconds']:>16.4f} "
        f"{figures['ratio']:>7.1f}"
    )
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
