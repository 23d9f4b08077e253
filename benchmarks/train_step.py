"""A training step of GRPO beside TRL's and a plain transformers loop: the same model, batch and machine.

Each contestant is a process of its own with one thread, and they take turns, one step each. Seconds are those of the
process's CPU, which other work on the machine does not lengthen; memory is the peak of resident memory above what the
imports took. All three start with the same weights, so their first gradient norms must agree.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import multiprocessing
import statistics
import tempfile
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
from contestants import megatron, plain, trl_grpo
from contestants.job import Job, StepResult, make_batch, peak_bytes

from polyturn.trainer.data.balance import pack

SIZES = {
    "1M": {"vocab_size": 2048, "hidden_size": 128, "num_hidden_layers": 4, "intermediate_size": 384},
    "50M": {"vocab_size": 32000, "hidden_size": 512, "num_hidden_layers": 10, "intermediate_size": 1536},
}
NUM_EPISODES = {"1M": 32, "50M": 8}


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, epilog="example: train_step.py --steps 8 --sizes 1M 50M"
    )
    parser.add_argument(
        "--sizes", nargs="+", default=list(SIZES), choices=list(SIZES), help="parameters of the model"
    )
    parser.add_argument("--steps", type=int, default=4, help="timed steps of each contestant")
    parser.add_argument("--episodes", type=int, help=f"episodes in the batch; by default {NUM_EPISODES}")
    parser.add_argument("--micro-batch", type=int, default=4, help="episodes that TRL and plain pad together")
    parser.add_argument("--short", action="store_true", help="1M alone, 8 episodes, 2 steps")
    return parser.parse_args()


CONTESTANTS: dict[str, Any] = {"polyturn": megatron, "trl": trl_grpo, "transformers": plain}


def contest(name: str, job: Job, pipe: Connection) -> None:
    torch.set_num_threads(1)
    module = CONTESTANTS[name]
    module.import_all()
    baseline = peak_bytes()
    if module is trl_grpo:
        trl_grpo.Trl(job).run(pipe, baseline)
        return
    contestant = megatron.Polyturn(job) if module is megatron else plain.Plain(job)
    pipe.send("ready")
    while pipe.recv() is not None:
        pipe.send((contestant.step(), peak_bytes() - baseline))


def make_model(size: str, directory: Path) -> int:
    """A random Qwen3 of that size; the number of its parameters."""
    import transformers

    torch.manual_seed(0)
    config = transformers.Qwen3Config(
        **SIZES[size],
        num_attention_heads=8,
        num_key_value_heads=4,
        head_dim=SIZES[size]["hidden_size"] // 8,
        tie_word_embeddings=True,
        max_position_embeddings=2048,
        pad_token_id=None,
        bos_token_id=1,
        eos_token_id=2,
    )
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    model.save_pretrained(directory)
    return sum(param.numel() for param in model.parameters())


def measure(size: str, arguments: argparse.Namespace, directory: Path) -> dict[str, Any]:
    num_parameters = make_model(size, directory)
    job = Job(
        model_path=directory,
        num_episodes=arguments.episodes or NUM_EPISODES[size],
        vocab_size=SIZES[size]["vocab_size"],
        micro_batch=arguments.micro_batch,
    )
    names = [name for name in CONTESTANTS if name != "trl" or importlib.util.find_spec("trl")]
    context = multiprocessing.get_context("spawn")
    pipes: dict[str, Connection] = {}
    processes = []
    for name in names:
        pipes[name], theirs = context.Pipe()
        process = context.Process(target=contest, args=(name, job, theirs), daemon=True)
        process.start()
        processes.append(process)
    for name in names:
        assert pipes[name].recv() == "ready"
    results: dict[str, list[StepResult]] = {name: [] for name in names}
    peaks: dict[str, int] = {}
    for _ in range(arguments.steps + 1):
        for name in names:
            pipes[name].send(True)
            result, peaks[name] = pipes[name].recv()
            results[name].append(result)
    for name, process in zip(names, processes, strict=True):
        pipes[name].send(None)
        process.join(timeout=20)
    samples = make_batch(job)
    num_tokens = sum(map(len, samples))
    micro_batches = [samples[i : i + job.micro_batch] for i in range(0, len(samples), job.micro_batch)]
    longest = max(map(len, samples))
    figures: dict[str, Any] = {
        "parameters": num_parameters,
        "tokens": num_tokens,
        "trainable_tokens": sum(sample.num_trainable for sample in samples),
        "share_of_real_tokens": {
            "polyturn": 1.0,
            "trl": num_tokens / (longest * len(samples)),
            "transformers": num_tokens / sum(max(map(len, part)) * len(part) for part in micro_batches),
        },
        "micro_batches": {"polyturn": len(pack(samples, megatron.MAX_TOKENS)), "padded": len(micro_batches)},
    }
    for name in names:
        steps = results[name][1:]  # the first is a warm-up
        seconds = statistics.median(step.cpu_s for step in steps)
        figures[name] = {
            "tokens_per_cpu_second": num_tokens / seconds,
            "peak_mb": peaks[name] / 2**20,
            "first_grad_norm": results[name][0].grad_norm,
            "speedup_of_polyturn": statistics.median(
                theirs.cpu_s / ours.cpu_s for theirs, ours in zip(steps, results["polyturn"][1:], strict=True)
            ),
        }
    ours = results["polyturn"][1:]
    figures["polyturn"]["share_by_part"] = {
        part: statistics.median(step.parts[part] / step.cpu_s for step in ours)
        for part in ("forward", "backward", "optimizer")
    }
    figures["polyturn"]["share_outside_passes"] = statistics.median(
        1 - (step.parts["forward"] + step.parts["backward"]) / step.cpu_s for step in ours
    )
    return figures


def main() -> None:
    arguments = parse_arguments()
    if arguments.short:
        arguments.sizes, arguments.episodes, arguments.steps = ["1M"], 8, 2
    torch.set_num_threads(1)
    sizes = {}
    print(f"{'size':>5} {'':>14} {'tokens/CPU s':>13} {'peak MB':>9} {'polyturn is':>12} {'real tokens':>12}")
    for size in arguments.sizes:
        with tempfile.TemporaryDirectory() as directory:
            figures = sizes[size] = measure(size, arguments, Path(directory))
        for name in CONTESTANTS:
            if name not in figures:
                print(f"{size:>5} {name:>14} not installed")
                continue
            row = figures[name]
            print(
                f"{size:>5} {name:>14} {row['tokens_per_cpu_second']:>13.0f} {row['peak_mb']:>9.0f} "
                f"{row['speedup_of_polyturn']:>11.2f}x {figures['share_of_real_tokens'][name]:>12.2f}"
            )
        ours = figures["polyturn"]
        print(
            f"{size:>5} outside forward and backward: {ours['share_outside_passes']:.1%} of polyturn's step"
        )
    print(json.dumps({"benchmark": "train_step", "steps": arguments.steps, "sizes": sizes}))


if __name__ == "__main__":
    main()
