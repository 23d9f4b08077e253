"""Block-quantised FP8 weights, as DeepSeek-V3 publishes its own (arXiv 2412.19437, section 3.3) and SGLang serves them.

A matrix is divided into blocks of 128 x 128. Each block is divided by a scale of its own, so that its largest number
becomes the largest of float8 e4m3, and rounded to nearest; the scales stand beside it as `weight_scale_inv`, and
weight = block * scale_inv. Only the matrices of attention and feed-forward layers are quantised: embeddings, norms,
routers, biases and the output layer stay as they are.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch.nn import functional

from polyturn.trainer.models.weight_files import SCALE_SUFFIX

BLOCK = 128
MAX_E4M3 = torch.finfo(torch.float8_e4m3fn).max
_MATRIX = re.compile(r"model\.layers\.\d+\.(?:self_attn|mlp)\..*(?:_proj|_proj_with_mqa)\.weight$")
_FUSED = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"), ("q_a_proj", "kv_a_proj_with_mqa"))
"""Matrices that an engine joins row by row into one, whose blocks must not straddle the seams."""


def quantize_blocks(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """A matrix [M, N] as float8 e4m3 [M, N], and its scales [ceil(M / 128), ceil(N / 128)] in float32.

    Blocks at the lower and right edge may be smaller. A block of zeros has scale 1.

    Raises:
        ValueError: an element is not finite.
    """
    rows, columns = weight.shape
    padded = functional.pad(weight.detach().float(), (0, -columns % BLOCK, 0, -rows % BLOCK))
    blocks = padded.view(padded.size(0) // BLOCK, BLOCK, padded.size(1) // BLOCK, BLOCK)
    largest = blocks.abs().amax(dim=(1, 3))
    if not torch.isfinite(largest).all():
        raise ValueError("a weight that is not finite cannot be quantised")
    # Below the smallest normal number a scale would be 0, or round badly: such blocks become zeros.
    scales = (largest / MAX_E4M3).clamp(min=torch.finfo(torch.float32).tiny)
    scales = torch.where(largest == 0, torch.ones_like(scales), scales)
    scaled = (blocks / scales[:, None, :, None]).clamp(-MAX_E4M3, MAX_E4M3)
    quantised = scaled.to(torch.float8_e4m3fn).view(padded.shape)[:rows, :columns]
    return quantised.contiguous(), scales


def dequantize_blocks(
    quantised: torch.Tensor, scales: torch.Tensor, *, block: tuple[int, int] = (BLOCK, BLOCK)
) -> torch.Tensor:
    """The matrix [M, N] in float32 that an FP8 matrix and its scales [ceil(M / rows), ceil(N / columns)] stand for."""
    rows, columns = quantised.shape
    spread = scales.repeat_interleave(block[0], 0)[:rows].repeat_interleave(block[1], 1)[:, :columns]
    return quantised.float() * spread


def without_quantization(config: Mapping[str, Any], *, source: object) -> dict[str, Any]:
    """A config.json as it is once its weights are read: without the FP8 that they are stored in.

    Raises:
        ValueError: they are quantised in another way, which is not read.
    """
    quantization = config.get("quantization_config")
    if quantization:
        method = quantization.get("quant_method") if isinstance(quantization, dict) else quantization
        if method != "fp8" or not quantization.get("weight_block_size"):
            raise ValueError(
                f"{source} is quantised with {method!r}, and only FP8 with a scale for each block (quant_method fp8, "
                "weight_block_size) can be read: use the model in bfloat16"
            )
    return {key: value for key, value in config.items() if key != "quantization_config"}


def find_quantised(shapes: Mapping[str, tuple[int, ...]]) -> frozenset[str]:
    """Which of a model's tensors are quantised, by their Hugging Face names.

    Matrices that an engine joins are left alone together if one of them is no multiple of 128 rows.
    """
    matrices = {name for name, shape in shapes.items() if _MATRIX.match(name) and len(shape) == 2}
    for name in sorted(matrices):
        module = name.removesuffix(".weight")
        prefix, _, leaf = module.rpartition(".")
        for group in _FUSED:
            if leaf not in group:
                continue
            members = {f"{prefix}.{member}.weight" for member in group} & matrices
            if len(members) > 1 and any(shapes[member][0] % BLOCK for member in members):
                matrices -= members
    return frozenset(matrices)


def cast_tensors(
    tensors: Iterable[tuple[str, torch.Tensor]], quantised: frozenset[str]
) -> Iterator[tuple[str, torch.Tensor]]:
    """The tensors of a model as an FP8 engine takes them: each quantised one is followed by its scales."""
    for name, tensor in tensors:
        if name not in quantised:
            yield name, tensor
            continue
        matrix, scales = quantize_blocks(tensor)
        yield name, matrix
        yield f"{name}{SCALE_SUFFIX}", scales


def quantization_config(shapes: Mapping[str, tuple[int, ...]], quantised: frozenset[str]) -> dict[str, Any]:
    """What config.json says about it, in the form that transformers and SGLang read."""
    skipped = sorted(
        name.removesuffix(".weight")
        for name, shape in shapes.items()
        if name.endswith(".weight") and len(shape) == 2 and name not in quantised
    )
    return {
        "quant_method": "fp8",
        "fmt": "e4m3",
        "activation_scheme": "dynamic",
        "weight_block_size": [BLOCK, BLOCK],
        # An engine has an output layer of its own even where the safetensors have none.
        "modules_to_not_convert": sorted({*skipped, "lm_head"}),
    }
