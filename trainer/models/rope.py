"""Rotary position embeddings as a Hugging Face config describes them."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, kw_only=True, slots=True)
class Llama3Scaling:
    """Llama 3.1's longer context: low frequencies are slowed down, high ones kept, those between interpolated."""

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_positions: int


@dataclass(frozen=True, kw_only=True, slots=True)
class YarnScaling:
    """YaRN (arXiv 2309.00071), as DeepSeek V3 uses it."""

    factor: float
    original_positions: int
    beta_fast: float
    beta_slow: float
    mscale: float
    mscale_all_dim: float


@dataclass(frozen=True, kw_only=True, slots=True)
class Rope:
    base: float
    percent: float
    """The share of a head's dimensions that is rotated."""
    scaling: Llama3Scaling | YarnScaling | None


def read_rope(hf: Mapping[str, Any], *, default_percent: float = 1.0) -> Rope:
    """From `rope_parameters`, or from the older `rope_theta` and `rope_scaling`.

    Args:
        default_percent: the family's share of rotated dimensions. Of families that rotate all, transformers ignores
            another share in the config and engines do not, so it is refused.

    Raises:
        ValueError: a rope that is not supported, described twice, or not whole.
    """
    new, old = hf.get("rope_parameters"), hf.get("rope_scaling")
    if new and old and dict(new) != dict(old):
        raise ValueError("the model's config.json has both rope_parameters and rope_scaling, and they differ")
    rope = new or old or {}
    percent = float(rope.get("partial_rotary_factor") or hf.get("partial_rotary_factor") or default_percent)
    if default_percent == 1.0 != percent:
        raise ValueError(
            f"partial_rotary_factor={percent} is not supported with model_type {hf.get('model_type')!r}, whose heads "
            "are rotated whole: take it out of config.json"
        )
    return Rope(
        base=_number(rope, "rope_theta", hf.get("rope_theta") or 10_000.0),
        percent=percent,
        scaling=_read_scaling(rope.get("rope_type", rope.get("type", "default")), rope),
    )


def _number(rope: Mapping[str, Any], key: str, default: float | None = None) -> float:
    value = rope.get(key)
    value = default if value is None else value
    if not isinstance(value, int | float) or isinstance(value, bool) or not 0 < value < math.inf:
        raise ValueError(
            f"the rope in the model's config.json: '{key}' must be a number above 0, not {value!r:.60}"
        )
    return float(value)


def _read_scaling(rope_type: str, rope: Mapping[str, Any]) -> Llama3Scaling | YarnScaling | None:
    if rope_type == "default":
        return None
    if rope_type == "llama3":
        return Llama3Scaling(
            factor=_number(rope, "factor"),
            low_freq_factor=_number(rope, "low_freq_factor"),
            high_freq_factor=_number(rope, "high_freq_factor"),
            original_positions=int(_number(rope, "original_max_position_embeddings")),
        )
    if rope_type == "yarn":
        return _read_yarn(rope)
    raise ValueError(
        f"rope type {rope_type!r} is not supported: use a model with 'default', 'llama3' or 'yarn'"
    )


def _read_yarn(rope: Mapping[str, Any]) -> YarnScaling:
    if rope.get("attention_factor") is not None or not rope.get("truncate", True):
        raise ValueError("yarn rope with attention_factor or without truncation is not supported")
    mscale, mscale_all_dim = 1.0, 0.0
    if rope.get("mscale") and rope.get("mscale_all_dim"):
        mscale, mscale_all_dim = _number(rope, "mscale"), _number(rope, "mscale_all_dim")
    elif rope.get("mscale_all_dim"):
        # transformers then scales cosines and sines by the factor alone.
        raise ValueError("yarn rope with mscale_all_dim, but without mscale, is not supported")
    return YarnScaling(
        factor=_number(rope, "factor"),
        original_positions=int(_number(rope, "original_max_position_embeddings")),
        beta_fast=_number(rope, "beta_fast", 32.0),
        beta_slow=_number(rope, "beta_slow", 1.0),
        mscale=mscale,
        mscale_all_dim=mscale_all_dim,
    )
