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
class LinearScaling:
    """Position interpolation (arXiv 2306.15595): every frequency divided by the factor."""

    factor: float


@dataclass(frozen=True, kw_only=True, slots=True)
class YarnScaling:
    """YaRN (arXiv 2309.00071); `mscale` and `mscale_all_dim` are DeepSeek V3's additions."""

    factor: float
    original_positions: int
    beta_fast: float
    beta_slow: float
    mscale: float
    mscale_all_dim: float
    attention_factor: float
    """What cosines and sines are multiplied by."""
    is_usual_factor: bool
    """Whether `attention_factor` is what follows from the others."""
    truncate: bool
    """Whether the dimensions between which frequencies are interpolated are rounded to whole ones."""


Scaling = Llama3Scaling | LinearScaling | YarnScaling


@dataclass(frozen=True, kw_only=True, slots=True)
class Rope:
    base: float
    percent: float
    """The share of a head's dimensions that is rotated."""
    scaling: Scaling | None


VARYING = {
    "dynamic": "its frequencies follow the longest sequence that an engine has seen so far",
    "longrope": "it has two sets of frequencies, and a sequence that grows past its original context changes between "
    "them, keys that an engine has cached with the others included",
}
"""Rope types whose rotation of a token depends on more than its position, and why nobody can score such a token again
as it was sampled."""


KEYS = frozenset(
    {
        "attention_factor",
        "beta_fast",
        "beta_slow",
        "factor",
        "high_freq_factor",
        "low_freq_factor",
        "mscale",
        "mscale_all_dim",
        "original_max_position_embeddings",
        "partial_rotary_factor",
        "rope_theta",
        "rope_type",
        "truncate",
        "type",
    }
)
"""What is read of a rope. Anything else in it would be computed by somebody else alone."""


def read_rope(hf: Mapping[str, Any], *, default_percent: float = 1.0, default_base: float = 10_000.0) -> Rope:
    """From `rope_parameters`, or from the older `rope_theta` and `rope_scaling`.

    Args:
        default_percent: the family's share of rotated dimensions. Of families that rotate all, transformers ignores
            another share in the config and engines do not, so it is refused.
        default_base: the family's, where the config names none.

    Raises:
        ValueError: a rope that is not supported, described twice, or not whole.
    """
    new, old = hf.get("rope_parameters"), hf.get("rope_scaling")
    if new and old and dict(new) != dict(old):
        raise ValueError("the model's config.json has both rope_parameters and rope_scaling, and they differ")
    rope = new or old or {}
    scaling = _read_scaling(rope.get("rope_type", rope.get("type", "default")), rope)
    for key in rope.keys() - KEYS:
        if rope[key] not in (None, False):
            raise ValueError(
                f"the rope in the model's config.json has {key!r}={rope[key]!r:.60}, which is not supported: rotations "
                "would differ from the model's own"
            )
    percent = float(rope.get("partial_rotary_factor") or hf.get("partial_rotary_factor") or default_percent)
    if default_percent == 1.0 != percent:
        raise ValueError(
            f"partial_rotary_factor={percent} is not supported with model_type {hf.get('model_type')!r}, whose heads "
            "are rotated whole: take it out of config.json"
        )
    return Rope(
        base=_number(rope, "rope_theta", hf.get("rope_theta") or default_base),
        percent=percent,
        scaling=scaling,
    )


def _number(rope: Mapping[str, Any], key: str, default: float | None = None) -> float:
    value = rope.get(key)
    value = default if value is None else value
    if not isinstance(value, int | float) or isinstance(value, bool) or not 0 < value < math.inf:
        raise ValueError(
            f"the rope in the model's config.json: '{key}' must be a number above 0, not {value!r:.60}"
        )
    return float(value)


def _read_scaling(rope_type: str, rope: Mapping[str, Any]) -> Scaling | None:
    if rope_type == "default":
        return None
    if rope_type == "llama3":
        return Llama3Scaling(
            factor=_number(rope, "factor"),
            low_freq_factor=_number(rope, "low_freq_factor"),
            high_freq_factor=_number(rope, "high_freq_factor"),
            original_positions=int(_number(rope, "original_max_position_embeddings")),
        )
    if rope_type == "linear":
        return LinearScaling(factor=_number(rope, "factor"))
    if rope_type == "yarn":
        return _read_yarn(rope)
    reason = f" ({VARYING[rope_type]})" if isinstance(rope_type, str) and rope_type in VARYING else ""
    raise ValueError(
        f"rope type {rope_type!r} is not supported{reason}: use a model with 'default', 'linear', 'llama3' or 'yarn'"
    )


def _read_yarn(rope: Mapping[str, Any]) -> YarnScaling:
    truncate = rope.get("truncate", True)
    if not isinstance(truncate, bool):
        raise ValueError(
            f"the rope in the model's config.json: 'truncate' must be true or false, not {truncate!r:.60}"
        )
    factor = _number(rope, "factor")
    mscale, mscale_all_dim = 1.0, 0.0
    if rope.get("mscale") and rope.get("mscale_all_dim"):
        mscale, mscale_all_dim = _number(rope, "mscale"), _number(rope, "mscale_all_dim")
    elif rope.get("mscale_all_dim"):
        # transformers then scales cosines and sines by the factor alone.
        raise ValueError("yarn rope with mscale_all_dim, but without mscale, is not supported")
    usual = _concentration(factor, mscale) / _concentration(factor, mscale_all_dim)
    attention_factor = _number(rope, "attention_factor", usual)
    return YarnScaling(
        factor=factor,
        original_positions=int(_number(rope, "original_max_position_embeddings")),
        beta_fast=_number(rope, "beta_fast", 32.0),
        beta_slow=_number(rope, "beta_slow", 1.0),
        mscale=mscale,
        mscale_all_dim=mscale_all_dim,
        attention_factor=attention_factor,
        is_usual_factor=attention_factor == usual,
        truncate=truncate,
    )


def _concentration(factor: float, mscale: float) -> float:
    """1 + 0.1 mscale ln(factor): by how much YaRN sharpens the attention of a context `factor` times as long."""
    return 0.1 * mscale * math.log(factor) + 1 if factor > 1 else 1.0
