"""Where each Megatron parameter comes from: its Hugging Face tensors, how they are joined, and who holds which part."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Literal


@dataclass(frozen=True, kw_only=True, slots=True)
class Mapped:
    """How one Megatron tensor is made of Hugging Face tensors."""

    hf_names: tuple[str, ...]
    """`{layer}` stands for the number of the layer in the whole model, `{expert}` for that of the expert."""
    join: Literal["copy", "qkv", "gate_up", "vocab"] = "copy"
    split_dim: int | None = None
    """The dimension that tensor parallelism (an expert's: expert tensor parallelism) splits; None: every rank of the
    group holds all of it."""
    is_expert: bool = False
    """One expert's: expert parallelism gives each rank some experts whole."""


Rows = Mapping[str, Mapped]
"""By Megatron's name: of a layer's parameter the part after `decoder.layers.N.`, without the number of an expert."""

_LAYER = "model.layers.{layer}."
_ATTENTION = f"{_LAYER}self_attn."
_MLP = f"{_LAYER}mlp."
_EXPERT = f"{_LAYER}mlp.experts.{{expert}}."
_SHARED = f"{_LAYER}mlp.shared_experts."


def gate_up(prefix: str, *, is_expert: bool = False) -> Mapped:
    """The first linear layer of a gated MLP: the gate's rows, then the up projection's."""
    return Mapped(
        hf_names=(f"{prefix}gate_proj.weight", f"{prefix}up_proj.weight"),
        join="gate_up",
        split_dim=0,
        is_expert=is_expert,
    )


def down(prefix: str, *, is_expert: bool = False) -> Mapped:
    return Mapped(hf_names=(f"{prefix}down_proj.weight",), split_dim=1, is_expert=is_expert)


EMBEDDINGS: Rows = {
    "embedding.word_embeddings.weight": Mapped(
        hf_names=("model.embed_tokens.weight",), join="vocab", split_dim=0
    ),
    "output_layer.weight": Mapped(hf_names=("lm_head.weight",), join="vocab", split_dim=0),
    "decoder.final_layernorm.weight": Mapped(hf_names=("model.norm.weight",)),
}

ATTENTION: Rows = {
    "self_attention.linear_qkv.layer_norm_weight": Mapped(hf_names=(f"{_LAYER}input_layernorm.weight",)),
    "self_attention.linear_qkv.weight": Mapped(
        hf_names=tuple(f"{_ATTENTION}{x}_proj.weight" for x in "qkv"), join="qkv", split_dim=0
    ),
    "self_attention.linear_qkv.bias": Mapped(
        hf_names=tuple(f"{_ATTENTION}{x}_proj.bias" for x in "qkv"), join="qkv", split_dim=0
    ),
    "self_attention.q_layernorm.weight": Mapped(hf_names=(f"{_ATTENTION}q_norm.weight",)),
    "self_attention.k_layernorm.weight": Mapped(hf_names=(f"{_ATTENTION}k_norm.weight",)),
    "self_attention.linear_proj.weight": Mapped(hf_names=(f"{_ATTENTION}o_proj.weight",), split_dim=1),
}

LATENT_ATTENTION: Rows = {
    "input_layernorm.weight": Mapped(hf_names=(f"{_LAYER}input_layernorm.weight",)),
    "self_attention.linear_q_proj.weight": Mapped(hf_names=(f"{_ATTENTION}q_proj.weight",), split_dim=0),
    "self_attention.linear_q_down_proj.weight": Mapped(hf_names=(f"{_ATTENTION}q_a_proj.weight",)),
    "self_attention.linear_q_up_proj.layer_norm_weight": Mapped(
        hf_names=(f"{_ATTENTION}q_a_layernorm.weight",)
    ),
    "self_attention.linear_q_up_proj.weight": Mapped(hf_names=(f"{_ATTENTION}q_b_proj.weight",), split_dim=0),
    "self_attention.linear_kv_down_proj.weight": Mapped(hf_names=(f"{_ATTENTION}kv_a_proj_with_mqa.weight",)),
    "self_attention.linear_kv_up_proj.layer_norm_weight": Mapped(
        hf_names=(f"{_ATTENTION}kv_a_layernorm.weight",)
    ),
    "self_attention.linear_kv_up_proj.weight": Mapped(
        hf_names=(f"{_ATTENTION}kv_b_proj.weight",), split_dim=0
    ),
    "self_attention.linear_proj.weight": Mapped(hf_names=(f"{_ATTENTION}o_proj.weight",), split_dim=1),
}

DENSE_MLP: Rows = {
    "mlp.linear_fc1.layer_norm_weight": Mapped(hf_names=(f"{_LAYER}post_attention_layernorm.weight",)),
    "mlp.linear_fc1.weight": gate_up(_MLP),
    "mlp.linear_fc2.weight": down(_MLP),
}

EXPERTS: Rows = {
    "pre_mlp_layernorm.weight": Mapped(hf_names=(f"{_LAYER}post_attention_layernorm.weight",)),
    "mlp.router.weight": Mapped(hf_names=(f"{_MLP}gate.weight",)),
    "mlp.experts.linear_fc1.weight": gate_up(_EXPERT, is_expert=True),
    "mlp.experts.linear_fc2.weight": down(_EXPERT, is_expert=True),
}

CORRECTED_ROUTER: Rows = {
    "mlp.router.expert_bias": Mapped(hf_names=(f"{_MLP}gate.e_score_correction_bias",)),
}

SHARED_EXPERTS: Rows = {
    "mlp.shared_experts.linear_fc1.weight": gate_up(_SHARED),
    "mlp.shared_experts.linear_fc2.weight": down(_SHARED),
}

_IN_LAYER = re.compile(r"decoder\.layers\.(\d+)\.(.+)")
_OF_EXPERT = re.compile(r"(mlp\.experts\.linear_fc[12]\.weight)(\d+)")


def find_row(rows: Rows, name: str, *, layer_offset: int = 0, expert_offset: int = 0) -> Mapped:
    """The row of a Megatron parameter, its numbers filled in.

    Args:
        name: as a pipeline stage and an expert-parallel rank name it, counting from 0 each.
        layer_offset: the number in the whole model of the stage's first layer.
        expert_offset: the number of the rank's first expert.
    """
    layer = expert = ""
    key = name
    if match := _IN_LAYER.fullmatch(name):
        layer, key = str(int(match[1]) + layer_offset), match[2]
    if match := _OF_EXPERT.fullmatch(key):
        key, expert = match[1], str(int(match[2]) + expert_offset)
    assert key in rows, f"no Hugging Face name is known for {name}"
    row = rows[key]
    return replace(
        row, hf_names=tuple(hf_name.format(layer=layer, expert=expert) for hf_name in row.hf_names)
    )
