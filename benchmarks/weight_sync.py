"""Weight sync against a raw broadcast, from 3 MB to 2 GB: a running SGLang server's weights are updated in every way
that a run has, by turns with a broadcast of the same bytes between two plain processes over gloo.

`share_of_raw` is the raw broadcast's seconds by those of a sync. A raw broadcast loads nothing, and its receiver has
one piece of memory for all time, while an engine takes each bucket into new memory, copies it into its weights, and
answers before it takes the next one. `attainable` is these and nothing else between two plain processes:
`share_of_attainable` its seconds by those of a sync, `attainable_share_of_raw` what `share_of_raw` would be without
anything of ours.

`pause_share` is the time in which the engine could not generate by the seconds of a sync, more than 1 where checksums
are taken behind it; `checksum_share` what of that pause goes away without checksums, by broadcast;
`delta_bytes_by_full` what of the weights' bytes travels where 2 % of the values changed. Medians of ratios, each of two
neighbours."""

from __future__ import annotations

import argparse
import json
import multiprocessing
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import timedelta
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors.torch import load_file

from polyturn.configs.models import resolve_model_path
from polyturn.configs.schema.engines import EnginesConfig
from polyturn.configs.schema.weight_sync import BUCKET_BYTES
from polyturn.rollout.engines.checksums import EngineChecksums, EngineLayout
from polyturn.rollout.engines.placement import free_port
from polyturn.rollout.engines.server import EngineSpec, SGLangServer
from polyturn.trainer.weight_sync import SyncReport, WeightPublisher
from polyturn.trainer.weight_sync.broadcast import BroadcastPublisher
from polyturn.trainer.weight_sync.buckets import make_buckets, size_of
from polyturn.trainer.weight_sync.delta_publisher import DeltaPublisher
from polyturn.trainer.weight_sync.disk import DiskPublisher
from polyturn.trainer.weight_sync.mirror import Mirror, files_beside_weights
from polyturn.trainer.weight_sync.process_group import join_process_group
from polyturn.trainer.weight_sync.tensors import ByValue, TensorPublisher

SIZES: Mapping[str, tuple[int, int]] = {
    "3MB": (0, 0),
    "100MB": (768, 4),
    "500MB": (1536, 5),
    "2GB": (2048, 10),
}
"""Hidden size and layers of a Qwen3 model of float32; zeros: the demo's model."""


CHANGED = 0.02
"""Share of the values that differ from one version to the next."""


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, epilog="example: weight_sync.py --sizes 3MB,100MB --repeats 10"
    )
    parser.add_argument("--sizes", default=",".join(SIZES), help=f"of {', '.join(SIZES)}")
    parser.add_argument("--repeats", type=int, default=7, help="of each way and size")
    parser.add_argument(
        "--bucket-megabytes",
        type=float,
        default=BUCKET_BYTES["cpu"] / 1e6,
        help="the most that a broadcast carries at once",
    )
    parser.add_argument("--short", action="store_true", help="3MB and 100MB, 3 repeats")
    return parser.parse_args()


def make_model(size: str, folder: Path) -> Path:
    """A Hugging Face directory with random weights of about that size."""
    from transformers import Qwen3Config, Qwen3ForCausalLM

    demo = resolve_model_path("builtin:tiny-searcher")
    hidden, layers = SIZES[size]
    if not hidden:
        return demo
    theirs = json.loads((demo / "config.json").read_text())
    config = Qwen3Config(
        vocab_size=theirs["vocab_size"],
        hidden_size=hidden,
        intermediate_size=3 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=hidden // 64,
        num_key_value_heads=hidden // 128,
        head_dim=64,
        max_position_embeddings=2048,
        tie_word_embeddings=False,
    )
    torch.manual_seed(0)
    model = Qwen3ForCausalLM(config)
    model.save_pretrained(folder, max_shard_size="100GB")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(demo / name, folder)
    return folder


def receive(port: int, num_bytes: int, pipe: Connection) -> None:
    """The other end of the raw broadcast: receives whenever it is told to, all at once, or in buckets that it loads."""
    torch.set_num_threads(1)
    group = join(port, rank=1)
    buffer, weights = torch.empty(num_bytes, dtype=torch.uint8), torch.zeros(num_bytes, dtype=torch.uint8)
    while sizes := pipe.recv():
        if sizes == [num_bytes]:
            dist.broadcast(buffer, src=0, group=group)
            pipe.send(True)
            continue
        begin = 0
        for size in sizes:
            bucket = torch.empty(size, dtype=torch.uint8)
            dist.broadcast(bucket, src=0, group=group)
            weights[begin : begin + size] = bucket
            begin += size
            pipe.send(True)


def join(port: int, *, rank: int) -> dist.ProcessGroup:
    return join_process_group(
        address="127.0.0.1",
        port=port,
        world_size=2,
        rank=rank,
        name=f"raw-{port}",
        backend="gloo",
        timeout=timedelta(seconds=300),
    )


@contextmanager
def raw_broadcast(num_bytes: int) -> Iterator[Callable[[Sequence[int]], float]]:
    """A broadcast between two plain processes: its seconds, given the bytes of each bucket."""
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    port = free_port("127.0.0.1")
    receiver = context.Process(target=receive, args=(port, num_bytes, theirs), daemon=True)
    receiver.start()
    group = join(port, rank=0)
    flat = torch.zeros(num_bytes, dtype=torch.uint8)

    def once(sizes: Sequence[int]) -> float:
        started = time.perf_counter()
        ours.send(sizes)
        for part in flat.split(list(sizes)):
            dist.broadcast(part, src=0, group=group)
            ours.recv()
        return time.perf_counter() - started

    yield once
    ours.send([])
    receiver.join(timeout=10)


def measure(size: str, *, repeats: int, bucket_bytes: int, folder: Path) -> dict[str, float]:
    model = make_model(size, folder / "model")
    weights = load_file(model / "model.safetensors")
    layout = EngineLayout.of_config(json.loads((model / "config.json").read_text()))
    variants = (weights, moved(weights, share=CHANGED))
    num_bytes = sum(tensor.numel() * tensor.element_size() for tensor in weights.values())
    spec = EngineSpec(
        config=EnginesConfig(device="cpu"),
        model_path=model,
        sglang={"max_total_tokens": 1024},
        dtype="float32",
        seeded=False,
        log_directory=folder,
    )
    new_checksums = partial(EngineChecksums, layout)
    with SGLangServer(spec) as server, raw_broadcast(num_bytes) as once:
        server.wait_ready()

        def broadcaster(checksums: Callable[[], EngineChecksums] | None) -> BroadcastPublisher:
            return BroadcastPublisher(
                tensor_parallel=1,
                address="127.0.0.1",
                backend="gloo",
                bucket_bytes=bucket_bytes,
                timeout_s=300,
                hung_after_s=300,
                new_checksums=checksums,
            )

        ways: dict[str, WeightPublisher] = {
            "broadcast": broadcaster(new_checksums),
            "without_checksums": broadcaster(None),
            "tensors": TensorPublisher(
                carrier=ByValue(),
                tensor_parallel=1,
                bucket_bytes=bucket_bytes,
                timeout_s=300,
                new_checksums=new_checksums,
            ),
            "delta": DeltaPublisher(
                mirror=Mirror(folder / "mirror", files_beside_weights(model)),
                is_here=lambda _: True,
                open_mirror=lambda host: Mirror(folder / host, {}),
                block_bytes=256,
                bucket_bytes=bucket_bytes,
                full_every=1000,
                new_checksums=new_checksums,
            ),
            "disk": DiskPublisher(model_path=model, directory=folder, new_checksums=new_checksums),
        }
        for publisher in ways.values():
            publisher.set_engines([server.url])
        reports: dict[str, list[SyncReport]] = {name: [] for name in ways}
        raw: list[float] = []
        attainable: list[float] = []
        buckets = [
            sum(size_of(tensor) for _, tensor in bucket)
            for bucket in make_buckets(weights.items(), bucket_bytes=bucket_bytes)
        ]
        for version in range(repeats + 1):
            for name, publisher in ways.items():
                publisher.prepare(variants[version % 2].items(), version=version)
                reports[name].append(publisher.activate())
                if name == "broadcast":
                    raw.append(once([num_bytes]))
                    attainable.append(once(buckets))
        for publisher in ways.values():
            publisher.close()
    # The first of each is a warm-up.
    seconds = {name: [report.seconds for report in found[1:]] for name, found in reports.items()}
    pauses = {name: [report.pause_seconds for report in found[1:]] for name, found in reports.items()}
    return {
        "num_bytes": num_bytes,
        "raw_seconds": statistics.median(raw[1:]),
        "attainable_seconds": statistics.median(attainable[1:]),
        **{f"{name}_seconds": statistics.median(found) for name, found in seconds.items()},
        "share_of_raw": ratio(raw[1:], seconds["broadcast"]),
        "share_of_raw_without_checksums": ratio(raw[1:], seconds["without_checksums"]),
        "attainable_share_of_raw": ratio(raw[1:], attainable[1:]),
        "share_of_attainable": ratio(attainable[1:], seconds["broadcast"]),
        "share_of_attainable_without_checksums": ratio(attainable[1:], seconds["without_checksums"]),
        "delta_bytes_by_full": statistics.median(
            report.num_bytes / num_bytes for report in reports["delta"][1:]
        ),
        "delta_by_disk": ratio(seconds["delta"], seconds["disk"]),
        "checksum_share": 1 - ratio(pauses["without_checksums"], pauses["broadcast"]),
        "broadcast_pause_seconds": statistics.median(pauses["broadcast"]),
        **{
            f"{name}_pause_share": statistics.median(
                report.pause_seconds / report.seconds for report in found[1:]
            )
            for name, found in reports.items()
        },
    }


def moved(weights: Mapping[str, torch.Tensor], *, share: float) -> dict[str, torch.Tensor]:
    """Other values in about that share of the places."""
    generator = torch.Generator().manual_seed(1)
    return {
        name: torch.where(torch.rand(tensor.shape, generator=generator) < share, tensor * 1.001, tensor)
        for name, tensor in weights.items()
    }


def ratio(above: list[float], below: list[float]) -> float:
    return statistics.median(a / b for a, b in zip(above, below, strict=True))


def main() -> None:
    arguments = parse_arguments()
    repeats = 3 if arguments.short else arguments.repeats
    sizes = ["3MB", "100MB"] if arguments.short else arguments.sizes.split(",")
    torch.set_num_threads(1)
    rows: dict[str, dict[str, float]] = {}
    for size in sizes:
        with tempfile.TemporaryDirectory() as folder:
            rows[size] = measure(
                size,
                repeats=repeats,
                bucket_bytes=int(arguments.bucket_megabytes * 1e6),
                folder=Path(folder),
            )
        print(size, {name: round(value, 4) for name, value in rows[size].items()}, flush=True)
    print(json.dumps({"benchmark": "weight_sync", "repeats": repeats, "sizes": rows}))


if __name__ == "__main__":
    main()
