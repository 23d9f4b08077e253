"""What a checkpoint says of the model that it is of, and whether that is the one that is to take it up.

Nothing here needs torch.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from polyturn.configs.schema.trainer import LoraConfig
from polyturn.trainer.megatron.families.computation import describe_computation

IDENTITY = (
    "model_type",
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "intermediate_size",
    "moe_intermediate_size",
    "n_routed_experts",
    "num_experts",
    "vocab_size",
    "tie_word_embeddings",
)
"""The keys of a Hugging Face config in which two models differ whose checkpoints must not be mixed up."""


def describe_model(hf_config: Mapping[str, Any]) -> dict[str, Any]:
    """The part of a header that tells models apart."""
    return {
        "model": {key: hf_config[key] for key in IDENTITY if key in hf_config},
        "computation": describe_computation(hf_config),
    }


def describe_adapters(lora: LoraConfig | None, layers: Sequence[str]) -> dict[str, Any] | None:
    """The part of a header that tells adapters apart; `layers` are the kinds of layers that can have some."""
    if lora is None:
        return None
    targets = sorted(layer for layer in layers if lora.adapts(layer))
    return {"rank": lora.rank, "alpha": lora.alpha, "target_modules": targets}


def check_header(header: Mapping[str, Any], ours: Mapping[str, Any], *, source: Path) -> None:
    """Compare a checkpoint's header with what is to take it up, as far as the header says.

    Args:
        ours: what `describe_model` says, and `adapters` where there may be some.

    Raises:
        ValueError: they differ; names the first thing that does.
    """
    for part in ("computation", "model"):
        theirs, here = header.get(part), ours[part]
        if theirs is None:
            continue
        for key in sorted(theirs.keys() | here.keys()):
            if theirs.get(key) != here.get(key):
                raise ValueError(
                    f"{source} holds the checkpoint of another model: its {key} is {theirs.get(key)}, here it is "
                    f"{here.get(key)}"
                )
    if "adapters" in ours and "adapters" in header:
        _check_adapters(header["adapters"], ours["adapters"], source)


def _check_adapters(theirs: Mapping[str, Any] | None, ours: Mapping[str, Any] | None, source: Path) -> None:
    if theirs is None or ours is None:
        if theirs is not ours:
            was, asks = ("without", "some") if theirs is None else ("with", "none")
            raise ValueError(
                f"{source} was written {was} LoRA adapters, and trainer.lora asks for {asks}: "
                "train as it was trained, or begin from the run's weights (policy/, in which adapters are merged)"
            )
        return
    for key in theirs:
        if theirs[key] != ours.get(key):
            raise ValueError(
                f"{source} holds LoRA adapters with {key}={theirs[key]}, and trainer.lora has {key}={ours.get(key)}: "
                "give it the same value, or begin from the run's merged weights (policy/) with new adapters"
            )
