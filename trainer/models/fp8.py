"""Block-quantised FP8 weights, as DeepSeek-V3 publishes its own (arXiv 2412.19437, section 3.3) and SGLang serves them.

A matrix is divided into blocks of 128 x 128. Each block is divided by a scale of its own, so that its largest number
becomes the largest of float8 e4m3, and rounded to nearest; the scales stand beside it as `weight_scale_inv`, and
weight = block * scale_inv. Which matrices are stored so is in `quantization.py`.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator

import torch
from torch.nn import functional

from polyturn.trainer.models.quantization import BlockFP8
from polyturn.trainer.models.weight_files import SCALE_SUFFIX

MAX_E4M3 = torch.finfo(torch.float8_e4m3fn).max
_PLAIN = BlockFP8()


def quantize_blocks(weight: torch.Tensor, fp8: BlockFP8 = _PLAIN) -> tuple[torch.Tensor, torch.Tensor]:
    """A matrix [M, N] as float8 e4m3 [M, N], and its scales [ceil(M / 128), ceil(N / 128)] in float32.

    Blocks at the lower and right edge may be smaller. A block of zeros has scale 1.

    Raises:
        ValueError: an element is not finite.
    """
    (rows, columns), (height, width) = weight.shape, fp8.block
    padded = functional.pad(weight.detach().float(), (0, -columns % width, 0, -rows % height))
    blocks = padded.view(padded.size(0) // height, height, padded.size(1) // width, width)
    largest = blocks.abs().amax(dim=(1, 3))
    if not torch.isfinite(largest).all():
        raise ValueError("a weight that is not finite cannot be quantised")
    # Below the smallest normal number a scale would be 0, or round badly: such blocks become zeros.
    scales = (largest / MAX_E4M3).clamp(min=torch.finfo(torch.float32).tiny)
    if fp8.powers_of_two:
        mantissa, exponent = torch.frexp(scales)
        # A power of two itself has the mantissa 0.5.
        scales = torch.ldexp(torch.ones_like(scales), exponent - (mantissa == 0.5).int())
    scales = torch.where(largest == 0, torch.ones_like(scales), scales)
    scaled = (blocks / scales[:, None, :, None]).clamp(-MAX_E4M3, MAX_E4M3)
    quantised = scaled.to(torch.float8_e4m3fn).view(padded.shape)[:rows, :columns]
    return quantised.contiguous(), scales


def dequantize_blocks(
    quantised: torch.Tensor, scales: torch.Tensor, *, block: tuple[int, int] = _PLAIN.block
) -> torch.Tensor:
    """The matrix [M, N] in float32 that an FP8 matrix and its scales [ceil(M / rows), ceil(N / columns)] stand for.

    One row of blocks after the other, in place: beside the result no more than a row of it is held.
    """
    result, columns = quantised.float(), quantised.size(1)
    for rows, row_scales in zip(result.split(block[0]), scales.float(), strict=True):
        rows *= row_scales.repeat_interleave(block[1])[:columns]
    return result


def cast_tensors(
    tensors: Iterable[tuple[str, torch.Tensor]], quantised: Collection[str], fp8: BlockFP8 = _PLAIN
) -> Iterator[tuple[str, torch.Tensor]]:
    """The tensors of a model as an FP8 engine takes them: each quantised one is followed by its scales."""
    for name, tensor in tensors:
        if name not in quantised:
            yield name, tensor
            continue
        matrix, scales = quantize_blocks(tensor, fp8)
        yield name, matrix
        yield f"{name}{SCALE_SUFFIX}", scales


def round_tensors(
    tensors: Iterable[tuple[str, torch.Tensor]], quantised: Collection[str], fp8: BlockFP8 = _PLAIN
) -> Iterator[tuple[str, torch.Tensor]]:
    """The tensors of a model in their own dtypes, those that FP8 engines hold quantised rounded to what these hold."""
    for name, tensor in tensors:
        if name in quantised:
            matrix, scales = quantize_blocks(tensor, fp8)
            yield name, dequantize_blocks(matrix, scales, block=fp8.block).to(tensor.dtype)
        else:
            yield name, tensor
