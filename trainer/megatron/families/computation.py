"""What a model computes, by its config.json, whatever release of transformers spelled it.

Two configs describe the same computation where they give Megatron-core the same settings: what only training reads
(dropout, losses of routers, initial weights), limits, token ids and the spelling of rotary embeddings make no
difference. Nothing here needs torch.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from polyturn.trainer.megatron.families import find_family
from polyturn.trainer.megatron.families.family import HFConfig, core_settings
from polyturn.trainer.megatron.families.rope import read_rope


def describe_computation(hf: HFConfig) -> dict[str, Any]:
    """Setting -> value, of JSON's kinds.

    Raises:
        ValueError: a family or a feature that is not supported.
    """
    family = find_family(hf)
    rope = read_rope(hf, default_percent=family.rotary_percent)
    return {
        "family": family.model_types[0],
        "vocab_size": hf["vocab_size"],
        "tied_embeddings": bool(hf.get("tie_word_embeddings", False)),
        **core_settings(hf),
        **family.settings(hf),
        "rope_base": rope.base,
        "rope_percent": rope.percent,
        "rope_scaling": None if rope.scaling is None else asdict(rope.scaling),
    }


def same_computation(policy: Mapping[str, Any], other: Mapping[str, Any], *, source: Path, what: str) -> None:
    """Whether another model's config.json, that of `source`, describes the same computation as the policy's.

    Raises:
        ValueError: it does not; names the first setting that differs.
    """
    ours, theirs = describe_computation(policy), describe_computation(other)
    for name in sorted(ours.keys() | theirs.keys()):
        if ours.get(name) != theirs.get(name):
            raise ValueError(
                f"{what}: {source} has {name}={theirs.get(name)!r} by its config.json, the policy has "
                f"{ours.get(name)!r}; they must be models of one architecture"
            )
