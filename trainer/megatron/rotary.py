"""The rotary frequencies of a model with ordinary attention, where its rope is scaled.

Latent attention has a rotation of its own in Megatron-core.
"""

from __future__ import annotations

import math

import torch
from megatron.core.models.gpt.gpt_model import GPTModel

from polyturn.trainer.models.rope import LinearScaling, Llama3Scaling, Rope, Scaling, YarnScaling


def scale_rope(model: GPTModel, rope: Rope) -> None:
    """Give a model of Megatron-core's plain rope the scaled frequencies, and its attention YaRN's sharpening."""
    if rope.scaling is None:
        return
    rotary = model.rotary_pos_emb
    rotary.inv_freq = scale_frequencies(rotary.inv_freq, rope.scaling, base=rope.base)
    if isinstance(rope.scaling, YarnScaling):
        # Where upstream's attention looks for the factor of cosines and sines: (0.1 mscale ln(e) + 1) / 1.
        model.config.yarn_rotary_scaling_factor = math.e
        model.config.yarn_mscale = 10 * (rope.scaling.attention_factor - 1)
        model.config.yarn_mscale_all_dim = 0.0


def scale_frequencies(frequencies: torch.Tensor, scaling: Scaling, *, base: float) -> torch.Tensor:
    """The inverse frequencies [dim / 2] of a rope of `dim` rotated dimensions, scaled as transformers does."""
    if isinstance(scaling, LinearScaling):
        return frequencies / scaling.factor
    if isinstance(scaling, Llama3Scaling):
        return _scale_llama3(frequencies, scaling)
    return _scale_yarn(frequencies, scaling, base)


def _scale_llama3(frequencies: torch.Tensor, scaling: Llama3Scaling) -> torch.Tensor:
    """Low frequencies slowed down, those between interpolated (arXiv 2407.21783)."""
    wavelengths = 2 * math.pi / frequencies
    longest = scaling.original_positions / scaling.low_freq_factor
    shortest = scaling.original_positions / scaling.high_freq_factor
    share = (scaling.original_positions / wavelengths - scaling.low_freq_factor) / (
        scaling.high_freq_factor - scaling.low_freq_factor
    )
    slowed = torch.where(wavelengths > longest, frequencies / scaling.factor, frequencies)
    between = (1 - share) * slowed / scaling.factor + share * slowed
    is_between = (wavelengths >= shortest) & (wavelengths <= longest)
    return torch.where(is_between, between, slowed)


def _scale_yarn(frequencies: torch.Tensor, scaling: YarnScaling, base: float) -> torch.Tensor:
    """Dimensions that turn often within the original context are kept, those that turn seldom slowed down, and those
    between interpolated by a ramp over dimensions (arXiv 2309.00071, section 3.2)."""
    dim = 2 * len(frequencies)

    def find_dimension(num_turns: float) -> float:
        return dim * math.log(scaling.original_positions / (num_turns * 2 * math.pi)) / (2 * math.log(base))

    low, high = find_dimension(scaling.beta_fast), find_dimension(scaling.beta_slow)
    if scaling.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dim - 1)
    if low == high:
        high += 0.001
    places = torch.arange(dim // 2, dtype=torch.float32, device=frequencies.device)
    slowed = ((places - low) / (high - low)).clamp(0, 1)
    return frequencies / scaling.factor * slowed + frequencies * (1 - slowed)
