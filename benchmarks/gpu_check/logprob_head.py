"""The fused logprob head against log_softmax over all logits: values, gradients, peak memory, seconds."""

from __future__ import annotations

from typing import Any

import torch

from benchmarks.gpu_check.parts import Device, Failure
from benchmarks.gpu_check.timing import peak_bytes, seconds_of
from polyturn.trainer.megatron.logprob_head import VocabularySlice, token_logprobs

SIZES = {"cuda": (4096, 151_936, 2560), "cpu": (64, 640, 32)}
"""Rows, vocabulary (Qwen3's), hidden size (of its 4B model)."""
TOLERANCE = {"cuda": 2e-2, "cpu": 1e-5}
"""Of gradients, relative to their norm; bfloat16 on a GPU, float32 on a CPU."""


def run(device: Device) -> dict[str, Any]:
    rows, vocabulary, width = SIZES[device]
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    torch.manual_seed(0)
    hidden = torch.randn(rows, width, device=device, dtype=dtype, requires_grad=True)
    weight = torch.empty(vocabulary, width, device=device, dtype=dtype).normal_(0, 0.02).requires_grad_()
    targets = torch.randint(0, vocabulary, (rows,), device=device)

    def fused() -> torch.Tensor:
        columns = VocabularySlice(first=0, num_real=vocabulary, group=None)
        found, _ = token_logprobs(hidden, weight, targets, columns=columns, temperature=1.0, entropy="none")
        found.mean().backward()
        return found.detach()

    def plain() -> torch.Tensor:
        found = (hidden @ weight.t()).float().log_softmax(-1).gather(1, targets[:, None]).squeeze(1)
        found.mean().backward()
        return found.detach()

    results: dict[str, Any] = {}
    for name, method in (("fused", fused), ("plain", plain)):
        hidden.grad = weight.grad = None
        bytes_used, logprobs = peak_bytes(method, device)
        assert hidden.grad is not None and weight.grad is not None
        gradients = (hidden.grad.clone(), weight.grad.clone())
        results[name] = (logprobs, gradients, bytes_used, seconds_of(method, device, repeats=3))
    (ours, our_gradients, our_bytes, our_s), (theirs, their_gradients, their_bytes, their_s) = (
        results.values()
    )
    gradient_error = max(
        float((mine.float() - other.float()).norm() / other.float().norm())
        for mine, other in zip(our_gradients, their_gradients, strict=True)
    )
    figures = {
        "logprob_difference": float((ours - theirs).abs().max()),
        "gradient_difference": gradient_error,
        "memory_of_plain": our_bytes / their_bytes if their_bytes else None,
        "seconds_of_plain": our_s / their_s,
    }
    if figures["logprob_difference"] > TOLERANCE[device] or gradient_error > TOLERANCE[device]:
        raise Failure("the fused head computes something else", **figures)
    return figures
