"""The fused logprob head beside the naive one: peak memory and CPU seconds of logprobs, entropies and gradients.

Naive is logits = hidden weight^T in float32, log_softmax, gather, entropy, backward. Every measurement is a process of
its own; memory is the peak of resident memory (on a GPU, of allocated memory) above what inputs, gradients
and imports take.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import resource
import time
from multiprocessing.connection import Connection
from typing import Any

import torch

METHODS = ("naive", "fused", "fused, all kept")


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, epilog="example: logprob_head.py --rows 4096")
    parser.add_argument("--rows", type=int, default=4096, help="trainable tokens of a micro-batch")
    parser.add_argument("--vocabulary", type=int, default=32768)
    parser.add_argument("--hidden", type=int, default=256)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--repeats", type=int, default=3, help="the fastest counts")
    parser.add_argument("--short", action="store_true", help="512 rows, 16384 tokens, once")
    return parser.parse_args()


def compute(
    method: str, hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor, *, entropy: bool
) -> torch.Tensor:
    """The loss, after its backward pass."""
    if method == "naive":
        plain = (hidden @ weight.t()).float().log_softmax(-1)
        logprobs = plain.gather(1, targets[:, None]).squeeze(1)
        entropies = -(plain.exp() * plain).sum(-1) if entropy else None
    else:
        from polyturn.trainer.megatron.logprob_head import VocabularySlice, token_logprobs

        logprobs, entropies = token_logprobs(
            hidden,
            weight,
            targets,
            columns=VocabularySlice(first=0, num_real=weight.size(0), group=None),
            temperature=1.0,
            entropy="gradient" if entropy else "none",
            kept_elements=0 if method == "fused" else 2**62,
        )
    loss = logprobs.mean()
    if entropies is not None:
        loss = loss + 0.01 * entropies.mean()
    loss.backward()
    return loss.detach()


def peak_bytes(device: str) -> int:
    if device == "cuda":
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def measure(method: str, entropy: bool, arguments: argparse.Namespace, pipe: Connection) -> None:
    torch.set_num_threads(1)
    device, dtype = arguments.device, getattr(torch, arguments.dtype)
    torch.manual_seed(0)
    hidden = torch.randn(arguments.rows, arguments.hidden, device=device, dtype=dtype, requires_grad=True)
    weight = (0.1 * torch.randn(arguments.vocabulary, arguments.hidden, device=device)).to(dtype)
    weight.requires_grad_()
    targets = torch.randint(0, arguments.vocabulary, (arguments.rows,), device=device)
    small = (hidden[:8], weight[:64], targets[:8] % 64)
    compute(method, *small, entropy=entropy)
    hidden.grad = weight.grad = None
    baseline = peak_bytes(device)
    seconds = []
    for _ in range(arguments.repeats):
        hidden.grad = weight.grad = None
        started = time.process_time() if device == "cpu" else time.perf_counter()
        loss = float(compute(method, hidden, weight, targets, entropy=entropy))
        seconds.append((time.process_time() if device == "cpu" else time.perf_counter()) - started)
    pipe.send(
        {
            "peak_mb": (peak_bytes(device) - baseline) / 2**20,
            "seconds": min(seconds),
            "loss": loss,
            "gradient_norm": float(weight.grad.float().norm()),
        }
    )


def main() -> None:
    arguments = parse_arguments()
    if arguments.short:
        arguments.rows, arguments.vocabulary, arguments.repeats = 512, 16384, 1
    context = multiprocessing.get_context("spawn")
    whole = arguments.rows * arguments.vocabulary * 4 / 2**20
    print(f"{arguments.rows} rows x {arguments.vocabulary} tokens: all float32 logits are {whole:.0f} MB")
    print(f"{'':>16} {'entropy':>8} {'peak MB':>9} {'of naive':>9} {'seconds':>8} {'of naive':>9}")
    figures: dict[str, Any] = {"benchmark": "logprob_head", "logits_mb": whole}
    for entropy in (False, True):
        rows: dict[str, dict[str, float]] = {}
        for method in METHODS:
            ours, theirs = context.Pipe()
            process = context.Process(target=measure, args=(method, entropy, arguments, theirs))
            process.start()
            rows[method] = row = ours.recv()
            process.join()
            memory, time_ratio = (row[key] / rows["naive"][key] for key in ("peak_mb", "seconds"))
            print(
                f"{method:>16} {'yes' if entropy else 'no':>8} {row['peak_mb']:>9.0f} {memory:>8.1%} "
                f"{row['seconds']:>8.2f} {time_ratio:>8.2f}x"
            )
        figures["with_entropy" if entropy else "logprobs"] = rows
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
