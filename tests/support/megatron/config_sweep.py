"""Odd configs of every family: what transformers computes with them, and what we do."""

from __future__ import annotations

import json
import math
import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from tests.support.megatron.tiny_families import _COMMON, TINY, _logits, load_model, randomize, token_ids

BASES = (
    "llama",
    "mistral",
    "seed_oss",
    "smollm3",
    "ernie4_5",
    "qwen2",
    "qwen3",
    "qwen3_moe",
    "glm4",
    "glm4_moe",
    "glm4_moe_lite",
    "deepseek_v3",
)
MOE = ("qwen3_moe", "glm4_moe", "glm4_moe_lite", "deepseek_v3")
CORRECTED = ("glm4_moe", "glm4_moe_lite", "deepseek_v3")
LIKE_OTHERS = ("mistral", "seed_oss", "smollm3", "ernie4_5", "glm4_moe_lite")
"""Bases that read most of their keys as another base does."""
REMOVED = "(removed)"


@dataclass(frozen=True, kw_only=True, slots=True)
class Case:
    """One odd config."""

    base: str
    make: dict[str, Any] = field(default_factory=dict)
    """What the model is made with, beside its family's tiny config."""
    edit: dict[str, Any] = field(default_factory=dict)
    """Keys of the written config.json that are changed, or `REMOVED`, before anybody reads it."""

    def __str__(self) -> str:
        changes = {**self.make, **self.edit}
        return f"{self.base}: " + ", ".join(f"{key}={value!r}" for key, value in changes.items())


@dataclass(frozen=True, kw_only=True, slots=True)
class Outcome:
    """What came of a case."""

    error: float | None = None
    """Largest difference of logits, relative to the largest logit."""
    refused: str | None = None
    crashed: str | None = None
    transformers: str | None = None
    """Why transformers itself cannot read it."""


def run_case(case: Case, directory: Path) -> Outcome:
    shutil.rmtree(directory, ignore_errors=True)
    try:
        expected = _expected(case, directory)
    except Exception as error:  # noqa: BLE001
        return Outcome(transformers=f"{type(error).__name__}: {error}")
    try:
        found = _logits(*load_model(directory))
    except ValueError as error:
        return Outcome(refused=str(error))
    except Exception as error:  # noqa: BLE001
        return Outcome(crashed=f"{type(error).__name__}: {error}")
    assert found is not None
    difference = float((found - expected).abs().max() / expected.abs().max())
    return Outcome(error=math.inf if math.isnan(difference) else difference)


def _expected(case: Case, directory: Path) -> torch.Tensor:
    """Write the model, and read it with transformers as anybody would."""
    import transformers

    class_name, changes = TINY[case.base]
    changes = {**changes, "num_hidden_layers": 2}
    if "mlp_layer_types" in changes:
        changes["mlp_layer_types"] = changes["mlp_layer_types"][:2]
    config = getattr(transformers, class_name)(**{**_COMMON, **changes, **case.make})
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    randomize(model)
    model.save_pretrained(directory)
    path = directory / "config.json"
    hf = {**json.loads(path.read_text()), **case.edit}
    path.write_text(json.dumps({key: value for key, value in hf.items() if value != REMOVED}))
    read = transformers.AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
    with torch.no_grad():
        return torch.cat([read(torch.from_numpy(ids)[None]).logits[0] for ids in token_ids()])


def _old_rope(**scaling: Any) -> dict[str, Any]:
    """As transformers 4 wrote it."""
    return {"rope_parameters": REMOVED, "rope_theta": 50.0, "rope_scaling": scaling or None}


_YARN = {"rope_type": "yarn", "factor": 2.0, "original_max_position_embeddings": 16}
_LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
_EDITS: list[dict[str, Any]] = [
    {},
    {"hidden_act": "gelu"},
    {"rms_norm_eps": 1e-3},
    {"rms_norm_eps": REMOVED},
    {"partial_rotary_factor": 0.5},
    {"rope_parameters": {"rope_type": "default", "rope_theta": 100.0, "partial_rotary_factor": 0.5}},
    {"rope_parameters": {"rope_theta": 100.0}},
    {"rope_parameters": REMOVED},
    {"rope_scaling": {"rope_type": "linear", "factor": 2.0}},
    {"rope_theta": 77.0},
    _old_rope(),
    _old_rope(type="linear", factor=2.0),
    _old_rope(type="dynamic", factor=2.0),
    _old_rope(**_YARN),
    _old_rope(rope_type="yarn", factor=2.0),
    _old_rope(**_YARN, mscale=0.7, mscale_all_dim=0.5),
    _old_rope(**_YARN, truncate=False, attention_factor=1.5),
    _old_rope(
        rope_type="longrope", short_factor=[1.0], long_factor=[2.0], original_max_position_embeddings=16
    ),
    _old_rope(**_LLAMA3),
    {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1},
    {"sliding_window": 8},
    {"tie_word_embeddings": REMOVED},
    {"tie_word_embeddings": True},
    {"attention_bias": REMOVED},
    {"num_hidden_layers": 1},
    {"use_qk_norm": False},
    {"is_causal": False},
    {"attention_dropout": 0.5, "pretraining_tp": 2, "attention_multiplier": 0.3, "logit_scale": 2.0},
]
_FEW: list[dict[str, Any]] = [
    {},
    {"rope_parameters": REMOVED},
    _old_rope(**_YARN),
    {"tie_word_embeddings": REMOVED},
    {"attention_bias": True},
    {"mlp_bias": True},
    {"num_key_value_heads": REMOVED},
    {"sliding_window": 8, "use_sliding_window": True},
]
_MAKES: list[dict[str, Any]] = [
    {"attention_bias": True},
    {"attention_bias": False},
    {"mlp_bias": True},
    {"tie_word_embeddings": True},
    {"num_key_value_heads": 4},
    {"intermediate_size": 7, "hidden_size": 40},
]
_MIXTURES: list[dict[str, Any]] = [
    {"num_experts_per_tok": 1},
    {"num_experts_per_tok": 1, "norm_topk_prob": False},
    {"num_experts_per_tok": 1, "n_group": 1, "topk_group": 1},
    {"num_experts_per_tok": 1, "n_group": 1, "topk_group": 1, "norm_topk_prob": False},
    {"norm_topk_prob": False},
    {"norm_topk_prob": True},
    {"num_experts": 3, "n_routed_experts": 3, "num_experts_per_tok": 2, "n_group": 1, "topk_group": 1},
]
_CORRECTED: list[dict[str, Any]] = [
    {"routed_scaling_factor": 1.0},
    {"first_k_dense_replace": 0},
    {"first_k_dense_replace": 3},
    {"moe_layer_freq": 2},
    {"n_shared_experts": 2},
    {"n_group": 2, "topk_group": 1, "num_experts_per_tok": 2},
    {"n_group": 2, "topk_group": 1, "num_experts_per_tok": 1},
    {"n_group": 4, "topk_group": 1, "num_experts_per_tok": 2},
    {"n_group": 4, "topk_group": 2, "num_experts_per_tok": 5},
    {"n_group": 4, "topk_group": 4, "num_experts_per_tok": 8},
    {"n_group": 2, "topk_group": 1, "num_experts_per_tok": 4},
]
_MISSING = ("norm_topk_prob", "routed_scaling_factor", "n_group", "topk_group", "num_experts_per_tok")
_ODD_OF_ONE: list[Case] = [
    Case(base="qwen3_moe", make={"decoder_sparse_step": 2}),
    Case(base="qwen3_moe", make={"mlp_only_layers": [0]}),
    Case(base="qwen3", edit={"layer_types": ["full_attention", "full_attention"]}),
    Case(base="llama", edit={"layer_types": ["sliding_attention", "full_attention"], "sliding_window": 8}),
    Case(base="glm4", edit={"rope_parameters": {"rope_theta": 9.0, "partial_rotary_factor": 0.25}}),
    Case(base="glm4_moe", make={"use_qk_norm": False}),
    Case(base="mistral", edit={"sliding_window": REMOVED}),
    Case(base="seed_oss", make={"attention_out_bias": True}),
    Case(base="seed_oss", edit={"head_dim": REMOVED}),
    Case(base="smollm3", edit={"no_rope_layers": REMOVED}),
    Case(base="smollm3", make={"no_rope_layers": [0, 1]}),
    Case(base="smollm3", make={"no_rope_layers": [1, 1]}),
    Case(base="ernie4_5", make={"use_bias": True}),
    Case(base="ernie4_5", edit={"head_dim": REMOVED}),
    Case(base="glm4_moe_lite", edit={"mlp_layer_types": REMOVED}),
    Case(base="glm4_moe_lite", edit={"mlp_layer_types": REMOVED, "first_k_dense_replace": 1}),
    Case(base="glm4_moe_lite", edit={"first_k_dense_replace": 0}),
    Case(base="glm4_moe_lite", make={"mlp_layer_types": ["sparse", "dense"]}),
    Case(base="deepseek_v3", make={"q_lora_rank": None, "v_head_dim": 6}),
    Case(base="deepseek_v3", edit={"rope_interleave": False}),
    Case(base="deepseek_v3", edit={"scoring_func": "softmax"}),
    Case(base="deepseek_v3", edit={"topk_method": "greedy"}),
    Case(base="deepseek_v3", edit={"n_group": None, "topk_group": None}),
]


def cases_of(base: str) -> list[Case]:
    """The odd configs of a family."""
    if base in LIKE_OTHERS:
        few = [Case(base=base, edit=edit) for edit in _FEW]
        return few + [case for case in _ODD_OF_ONE if case.base == base]
    cases = [Case(base=base, edit=edit) for edit in _EDITS] + [Case(base=base, make=make) for make in _MAKES]
    if base in MOE:
        cases += [Case(base=base, make=make) for make in _MIXTURES]
        cases += [Case(base=base, edit={key: REMOVED}) for key in _MISSING]
    if base in CORRECTED:
        cases += [Case(base=base, make=make) for make in _CORRECTED]
    return cases + [case for case in _ODD_OF_ONE if case.base == base]
