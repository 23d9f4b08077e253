"""What a checkpoint costs: seconds that training stands still, seconds until it is finished, seconds to load it at the
layout that wrote it and at another, beside Megatron-core's own torch_dist with the optimizer's state made fully
reshardable (its own writer, which starts processes, and the same files written in this process). One rank, one thread,
all in one run."""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from polyturn.trainer.base_model.supervised import one_rank
from polyturn.trainer.megatron.policy import MegatronPolicy

SIZES = {"1M": (64, 4), "50M": (512, 12)}
"""Hidden size and layers."""


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, epilog="example: checkpoints.py --size 50M --repeats 5"
    )
    parser.add_argument("--size", choices=sorted(SIZES), default="50M", help="parameters of the model")
    parser.add_argument("--repeats", type=int, default=5, help="saves and loads of each kind")
    parser.add_argument("--short", action="store_true", help="the 1M model, 2 repeats")
    return parser.parse_args()


def make_model(size: str, directory: Path) -> Path:
    """A random Qwen3 of about that size."""
    import transformers

    hidden, layers = SIZES[size]
    config = transformers.Qwen3Config(
        vocab_size=8192,
        hidden_size=hidden,
        intermediate_size=3 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=hidden // 32,
        num_key_value_heads=hidden // 64,
        head_dim=32,
        max_position_embeddings=512,
        tie_word_embeddings=True,
        pad_token_id=None,
        bos_token_id=1,
        eos_token_id=2,
    )
    transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(directory)
    return directory


def median_seconds(repeats: int, action: Callable[[], Any]) -> float:
    found = []
    for _ in range(repeats):
        started = time.perf_counter()
        action()
        found.append(time.perf_counter() - started)
    return statistics.median(found)


def take_update(engine: Any) -> None:
    """An optimizer step on made-up gradients, so that both moments exist."""
    for chunk in engine.chunks:
        for param in chunk.parameters():
            param.main_grad.copy_(torch.sin(param.detach() * 50) * 0.01)
    engine.optimizer.step()


class Upstream:
    """Megatron-core's torch_dist with the optimizer's state."""

    def __init__(self, engine: Any, directory: Path, *, in_process: bool) -> None:
        self._engine = engine
        self._directory = directory
        self._in_process = in_process

    def save(self) -> None:
        from megatron.core import dist_checkpointing

        from polyturn.trainer.megatron.torch_dist import InProcessSave

        shutil.rmtree(self._directory, ignore_errors=True)
        self._directory.mkdir()
        strategy = InProcessSave("torch_dist", 1) if self._in_process else ("torch_dist", 1)
        dist_checkpointing.save(self._state(loading=False), str(self._directory), strategy)

    def load(self) -> None:
        from megatron.core import dist_checkpointing

        state = dist_checkpointing.load(self._state(loading=True), str(self._directory))
        self._engine.chunks[0].load_state_dict(state["model"], strict=False)
        self._engine.optimizer.load_state_dict(state["optimizer"])

    def _state(self, *, loading: bool) -> dict[str, Any]:
        from polyturn.trainer.megatron.checkpoint_state import sharding_metadata

        metadata = sharding_metadata()
        model = self._engine.chunks[0].sharded_state_dict(metadata=metadata)
        optimizer = self._engine.optimizer.sharded_state_dict(model, is_loading=loading, metadata=metadata)
        return {"model": model, "optimizer": optimizer}


def measure(policy: MegatronPolicy, directory: Path, repeats: int) -> dict[str, dict[str, float]]:
    from polyturn.trainer.megatron.checkpoint_reader import load_checkpoint

    engine = policy._engine
    take_update(engine)
    update_alone = median_seconds(repeats, lambda: take_update(engine))
    blocking, finished, beside = [], [], []
    for index in range(repeats):
        started = time.perf_counter()
        policy.begin_checkpoint(directory / f"ours{index % 2}")
        blocking.append(time.perf_counter() - started)
        num_updates = 0
        while not policy.checkpoints.written():
            take_update(engine)
            num_updates += 1
        policy.checkpoints.finish()
        finished.append(time.perf_counter() - started)
        beside.append((finished[-1] - blocking[-1]) / max(num_updates, 1))
    ours = directory / "ours0"
    engines = {"policy": engine}
    upstream = Upstream(engine, directory / "upstream", in_process=False)
    threadless = Upstream(engine, directory / "in_process", in_process=True)
    slow = median_seconds(repeats, upstream.save)
    quick = median_seconds(repeats, threadless.save)
    return {
        "polyturn": {
            "blocking_s": statistics.median(blocking),
            "finished_s": statistics.median(finished),
            "load_same_s": median_seconds(repeats, lambda: load_checkpoint(engines, ours, same_layout=True)),
            "load_other_s": median_seconds(
                repeats, lambda: load_checkpoint(engines, ours, same_layout=False)
            ),
            "check_s": median_seconds(repeats, lambda: policy.checkpoints.find_faults(ours)),
            "update_s": update_alone,
            "update_while_writing_s": statistics.median(beside),
            "megabytes": sum(path.stat().st_size for path in ours.iterdir()) / 1e6,
        },
        "torch_dist": {
            "blocking_s": slow,
            "finished_s": slow,
            "load_other_s": median_seconds(repeats, upstream.load),
        },
        "torch_dist in process": {
            "blocking_s": quick,
            "finished_s": quick,
            "load_other_s": median_seconds(repeats, threadless.load),
        },
    }


def main() -> None:
    arguments = parse_arguments()
    size = "1M" if arguments.short else arguments.size
    repeats = 2 if arguments.short else arguments.repeats
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as scratch:
        policy = MegatronPolicy(one_rank(make_model(size, Path(scratch) / "model")))
        try:
            found = measure(policy, Path(scratch), repeats)
            num_params = sum(param.numel() for chunk in policy._engine.chunks for param in chunk.parameters())
        finally:
            policy.close()
    columns = ("blocking_s", "finished_s", "load_same_s", "load_other_s")
    print(f"{num_params / 1e6:.1f}M parameters, float32, AdamW, medians of {repeats}")
    print(f"{'format':24}" + "".join(f"{name:>15}" for name in columns))
    for kind, figures in found.items():
        cells = (f"{figures[name]:15.3f}" if name in figures else f"{'-':>15}" for name in columns)
        print(f"{kind:24}" + "".join(cells))
    print(json.dumps({"num_params": num_params, "repeats": repeats, **found}))


if __name__ == "__main__":
    main()
