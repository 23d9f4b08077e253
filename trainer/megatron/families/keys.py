"""The keys of a Hugging Face config.json that decide what a model computes: that they are there, and of their kind.

Everything that reads a config goes through here first, so a key that is missing or mistyped is one sentence, wherever a
model comes from. Sizes are checked with the rest of a model's shape (`ModelShape`).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from polyturn.trainer.megatron.families.family import Family, HFConfig

NUMBERS = ("rms_norm_eps", "routed_scaling_factor", "rope_theta", "partial_rotary_factor")
COUNTS = (
    "decoder_sparse_step",
    "n_group",
    "n_routed_experts",
    "num_experts",
    "num_experts_per_tok",
    "num_local_experts",
    "topk_group",
)
FLAGS = (
    "attention_bias",
    "is_causal",
    "mlp_bias",
    "norm_topk_prob",
    "rope_interleave",
    "tie_word_embeddings",
    "use_qk_norm",
    "use_sliding_window",
)
OBJECTS = ("rope_parameters", "rope_scaling")
WHERE = "the model's config.json"


def check_keys(hf: HFConfig, family: Family) -> None:
    """
    Raises:
        ValueError: a key that the family needs is missing, or one is not of its kind.
    """
    for key in ("rms_norm_eps", *family.required):
        if hf.get(key) is None:
            raise ValueError(f"{WHERE} has no '{key}', which model_type {hf['model_type']!r} needs")
    for keys, is_right, kind in (
        (NUMBERS, is_positive, "a number above 0"),
        (COUNTS, lambda value: type(value) is int and value >= 0, "an integer of at least 0"),
        (FLAGS, lambda value: isinstance(value, bool), "true or false"),
        (OBJECTS, lambda value: isinstance(value, Mapping), "an object"),
    ):
        for key in keys:
            value = hf.get(key)
            if value is not None and not is_right(value):
                raise ValueError(f"{WHERE}: '{key}' must be {kind}, not {value!r:.60}")


def is_positive(value: Any) -> bool:
    """Whether a value of JSON is a finite number above 0."""
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 < value < math.inf
