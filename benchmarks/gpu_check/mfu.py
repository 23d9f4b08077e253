"""Model FLOPs utilisation of an update of a model in the shape of Qwen3-4B, with optimizer, on packed sequences.

MFU is the FLOPs that the model needs for the tokens of an update, over seconds and the peak of the GPU's data sheet
(dense, bfloat16). The need is 6 FLOPs (two forward, four backward) for each token and weight of a layer that it meets,
12 x layers x heads x width for each pair of tokens that attend (half of a square: attention is causal), and 6 for each
trainable token and weight of the output layer; nothing that is computed twice counts. `mfu_palm` is the figure by the
formula that is usually published (PaLM, arXiv 2204.02311, appendix B): 6 N + 12 L H Q T for each token, all parameters
and the whole square.
"""

from __future__ import annotations

from typing import Any

import torch

from benchmarks.gpu_check.models import engine_of, make_samples, sized, update
from benchmarks.gpu_check.parts import Device, Failure
from benchmarks.gpu_check.timing import seconds_of
from polyturn.configs.models import preset_directory, read_json
from polyturn.configs.sizing.hardware import GPU_PEAKS
from polyturn.trainer.data.prefix_tree import Sharing
from polyturn.trainer.megatron.model import layer_flops

AIM = 0.45
"""Of one H200."""
LENGTH = {"cuda": 4096, "cpu": 64}
NUM_SEQUENCES = {"cuda": 8, "cpu": 2}
MAX_TOKENS = {"cuda": (16384, 8192, 4096), "cpu": (128,)}
"""Of a micro-batch: the largest for which there is memory."""
CPU_TFLOPS = 0.1
"""Something to divide by."""


def run(device: Device) -> dict[str, Any]:
    hf_config = (
        sized(device) if device == "cpu" else dict(read_json(preset_directory("qwen3-4b") / "config.json"))
    )
    tried: list[int] = []
    for max_tokens in MAX_TOKENS[device]:
        tried.append(max_tokens)
        try:
            figures = _measure(hf_config, max_tokens, device)
        except torch.OutOfMemoryError:
            torch.cuda.empty_cache()
            continue
        return {**figures, "no_memory_for": tried[:-1], "reached": figures["mfu"] >= AIM}
    raise Failure(f"there is not memory enough for a micro-batch of {tried[-1]} tokens")


def _measure(hf_config: dict[str, Any], max_tokens: int, device: Device) -> dict[str, Any]:
    lengths = [LENGTH[device]] * NUM_SEQUENCES[device]
    samples = make_samples(hf_config["vocab_size"], lengths)
    dtype = "bfloat16" if device == "cuda" else "float32"
    with engine_of(hf_config, device=device, dtype=dtype, max_tokens=max_tokens) as engine:
        update(engine, samples, learning_rate=1e-6)
        seconds = seconds_of(
            lambda: update(engine, samples, learning_rate=1e-6), device, repeats=3 if device == "cuda" else 1
        )
        per_layer = layer_flops(engine.chunks)
        num_parameters = sum(param.numel() for chunk in engine.chunks for param in chunk.parameters())
        layers = type(engine.chunks[0].decoder.layers[0].self_attention.linear_proj).__module__
    plain = Sharing.none(lengths)
    output = 6.0 * hf_config["vocab_size"] * hf_config["hidden_size"]
    needed = (
        per_layer.token * plain.num_tokens
        + per_layer.pair * plain.num_pairs
        + output * sum(sample.num_trainable for sample in samples)
    )
    attended = (
        12.0 * hf_config["num_hidden_layers"] * hf_config["num_attention_heads"] * hf_config["head_dim"]
    )
    palm = (6.0 * num_parameters + attended * LENGTH[device]) * plain.num_tokens
    peak = 1e12 * _peak_tflops(device)
    return {
        "mfu": needed / seconds / peak,
        "mfu_palm": palm / seconds / peak,
        "tokens_per_s": plain.num_tokens / seconds,
        "update_seconds": seconds,
        "micro_batch_tokens": max_tokens,
        "parameters": num_parameters,
        "peak_tflops": peak / 1e12,
        "layers": "transformer_engine" if "transformer_engine" in layers else "torch",
        "peak_gigabytes": torch.cuda.max_memory_allocated() / 1e9 if device == "cuda" else None,
    }


def _peak_tflops(device: Device) -> float:
    if device == "cpu":
        return CPU_TFLOPS
    name = torch.cuda.get_device_name()
    for known, peak in GPU_PEAKS.items():
        if known.partition("-")[0] in name:
            return peak.tflops
    raise Failure(f"the peak of {name!r} is not known: add it to GPU_PEAKS in configs/sizing/hardware.py")
