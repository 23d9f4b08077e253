"""Trainers of several ranks against real engines of one rank and of two: every layout's weights arrive as they are.

    python benchmarks/weight_layouts.py [--short]

A small mixture-of-experts model is loaded by Megatron ranks in each layout, broadcast to a running SGLang server with
tensor parallelism of 1 and of 2, and the checksums that the server computes of its own tensors are compared with the
trainer's. Two models take turns, so that what is compared was not there before.

The last line is JSON: by engine and layout, the seconds of a sync and whether the checksums are equal.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import shutil
import tempfile
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from polyturn.configs.loading.loader import load_config
from polyturn.configs.models import resolve_model_path
from polyturn.configs.schema.engines import EnginesConfig
from polyturn.configs.schema.trainer import ParallelConfig
from polyturn.rollout.engines.checksums import EngineChecksums, EngineLayout
from polyturn.rollout.engines.control import EngineControl
from polyturn.rollout.engines.placement import free_port
from polyturn.rollout.engines.server import EngineSpec, SGLangServer
from polyturn.trainer.weight_sync import SyncReport
from polyturn.trainer.weight_sync.broadcast import BroadcastPublisher

if TYPE_CHECKING:
    from polyturn.trainer.megatron.policy import MegatronPolicy

LAYOUTS: Mapping[str, Mapping[str, int]] = {
    "TP2": {"tensor": 2},
    "PP2": {"pipeline": 2},
    "EP2": {"data": 2, "expert": 2},
    "TP2 PP2 EP2": {"tensor": 2, "pipeline": 2, "expert": 2},
}


def make_model(directory: Path, *, seed: int) -> Path:
    """Random weights of a small Qwen3-MoE, and the demo's tokenizer."""
    import torch
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    demo = resolve_model_path("builtin:tiny-searcher")
    torch.manual_seed(seed)
    config = Qwen3MoeConfig(
        vocab_size=json.loads((demo / "config.json").read_text())["vocab_size"],
        hidden_size=64,
        intermediate_size=128,
        moe_intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        num_experts=4,
        num_experts_per_tok=2,
        norm_topk_prob=True,
        max_position_embeddings=512,
        initializer_range=0.2,
        tie_word_embeddings=False,
    )
    Qwen3MoeForCausalLM(config).save_pretrained(directory)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(demo / name, directory)
    return directory


def publish(
    rank: int, path: Path, layout: Mapping[str, int], port: int, url: str, tensor_parallel: int, version: int
) -> SyncReport | None:
    """One rank: load the model in a layout and take part in a sync; what rank 0 reports."""
    from polyturn.trainer.megatron.policy import MegatronPolicy
    from polyturn.trainer.megatron.process_groups import Place

    parallel = ParallelConfig(**layout)
    config = load_config("quickstart", [f"model.path={path}"])
    config = config.model_copy(
        update={"trainer": config.trainer.model_copy(update={"parallel": parallel, "device": "cpu"})}
    )
    place = Place(rank=rank, world_size=parallel.world_size, address="127.0.0.1", port=port)
    return send(MegatronPolicy(config, place), path, url, tensor_parallel=tensor_parallel, version=version)


def send(
    policy: MegatronPolicy, path: Path, url: str, *, tensor_parallel: int, version: int
) -> SyncReport | None:
    """Take part in a sync to an engine, and close the policy; what rank 0 reports."""
    tensors = policy.named_hf_tensors()
    try:
        if policy.rank:
            for _ in tensors:
                pass
            return None
        hf_config = json.loads((path / "config.json").read_text())
        publisher = BroadcastPublisher(
            tensor_parallel=tensor_parallel,
            address="127.0.0.1",
            backend="gloo",
            bucket_bytes=1 << 16,
            timeout_s=120,
            hung_after_s=120,
            new_checksums=partial(
                EngineChecksums, EngineLayout.of_config(hf_config), tensor_parallel=tensor_parallel
            ),
        )
        publisher.set_engines([url])
        publisher.prepare(tensors, version=version)
        report = publisher.activate()
        publisher.close()
        return report
    finally:
        policy.close()


def measure(
    models: Sequence[Path], layouts: Sequence[str], *, tensor_parallel: int, logs: Path
) -> dict[str, dict[str, object]]:
    """Every layout against one engine."""
    spec = EngineSpec(
        config=EnginesConfig(device="cpu", tensor_parallel=tensor_parallel, start_timeout_s=240),
        model_path=models[0],
        sglang={"max_total_tokens": 1024},
        dtype="float32",
        seeded=False,
        log_directory=logs,
    )
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["polyturn.trainer.megatron.policy"])
    found: dict[str, dict[str, object]] = {}
    with SGLangServer(spec) as server, EngineControl(server.url) as control:
        server.wait_ready()
        before = control.weight_checksums()
        for version, name in enumerate(layouts, start=1):
            path, layout, port = models[version % 2], LAYOUTS[name], free_port("127.0.0.1")
            world_size = ParallelConfig(**layout).world_size
            started = time.perf_counter()
            with ProcessPoolExecutor(max_workers=world_size, mp_context=context) as ranks:
                calls = [
                    ranks.submit(publish, rank, path, layout, port, server.url, tensor_parallel, version)
                    for rank in range(world_size)
                ]
                report = calls[0].result()
            after = control.weight_checksums()
            assert report is not None, "rank 0 reports"
            found[name] = {
                "equal": after == dict(report.checksums) != before,
                "version": control.weight_version() == str(version),
                "sync_seconds": report.seconds,
                "seconds_with_the_ranks": time.perf_counter() - started,
            }
            before = after
            print(f"engine TP{tensor_parallel}, trainer {name}: {found[name]}", flush=True)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--short", action="store_true", help="TP2 alone, against an engine of two ranks")
    arguments = parser.parse_args()
    layouts = ["TP2"] if arguments.short else list(LAYOUTS)
    with tempfile.TemporaryDirectory() as scratch:
        models = [make_model(Path(scratch) / f"model_{seed}", seed=seed) for seed in range(2)]
        engines = {
            f"TP{size}": measure(models, layouts, tensor_parallel=size, logs=Path(scratch) / f"logs_{size}")
            for size in ((2,) if arguments.short else (1, 2))
        }
    print(json.dumps({"benchmark": "weight_layouts", "engines": engines}))


if __name__ == "__main__":
    main()
