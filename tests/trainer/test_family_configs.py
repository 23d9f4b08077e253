"""What the families read of a Hugging Face config, and what they refuse."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from polyturn.configs.models import preset_directory, preset_names, read_json
from polyturn.configs.sizing.model_shape import FAMILIES as SHAPES
from polyturn.trainer.megatron.model import read_architecture, transformer_config
from polyturn.trainer.megatron.process_groups import ModelLayout
from polyturn.trainer.models.families import FAMILIES, describe_computation, find_family, same_computation
from polyturn.trainer.models.rope import YarnScaling, read_rope


def published(name: str, **changes: Any) -> dict[str, Any]:
    return read_json(preset_directory(name) / "config.json") | changes


def test_dry_runs_know_the_families_that_the_trainer_does() -> None:
    assert sorted(SHAPES) == sorted(FAMILIES)


@pytest.mark.parametrize("name", preset_names())
def test_published_configs_become_megatrons(name: str) -> None:
    hf = published(name)
    config = transformer_config(hf, dtype="bfloat16", device="cpu", extra={}, layout=ModelLayout())
    assert config.num_layers == hf["num_hidden_layers"] and config.hidden_size == hf["hidden_size"]
    assert config.calculate_per_token_loss and not config.moe_aux_loss_coeff
    architecture = read_architecture(hf, tensor_parallel=8)
    assert architecture.padded_vocab_size % 8 == 0
    assert architecture.rope.base == hf["rope_theta"]


def test_deepseek_as_published() -> None:
    config = transformer_config(
        published("deepseek-v3"), dtype="bfloat16", device="cpu", extra={}, layout=ModelLayout(pipeline=4)
    )
    assert config.moe_layer_freq == [0] * 3 + [1] * 58
    assert (config.moe_router_num_groups, config.moe_router_group_topk, config.moe_router_topk) == (8, 4, 8)
    assert config.moe_router_bias_update_rate == 0 and config.moe_router_dtype == "fp32"
    assert (config.num_layers_in_first_pipeline_stage, config.num_layers_in_last_pipeline_stage) == (15, 14)
    assert config.rotary_scaling_factor == 40 and config.mscale_all_dim == 1
    kimi = transformer_config(
        published("kimi-k2"), dtype="bfloat16", device="cpu", extra={}, layout=ModelLayout()
    )
    assert kimi.moe_router_num_groups is None and kimi.moe_layer_freq == [0] + [1] * 60


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        (
            "qwen3-4b",
            {"model_type": "qwen4"},
            "model_type 'qwen4' is not supported: one of deepseek_v3, glm4",
        ),
        ("qwen3-4b", {"model_type": "gpt_oss"}, "'gpt_oss' is not supported: one of deepseek_v3, glm4"),
        ("qwen3-4b", {"attention_bias": True}, "biases in the attention output"),
        ("qwen3-4b", {"hidden_act": "gelu"}, "hidden_act 'gelu' is not supported: only 'silu'"),
        ("qwen2.5-7b", {"use_sliding_window": True}, "sliding-window attention is not supported"),
        ("glm-4.5-air", {"norm_topk_prob": False}, "sigmoid routing without norm_topk_prob"),
        (
            "deepseek-v3",
            {"topk_group": 2},
            "num_experts_per_tok must be twice topk_group, not 8 with topk_group 2",
        ),
        ("deepseek-v3", {"scoring_func": "softmax"}, "scoring_func 'softmax' is not supported"),
        ("deepseek-v3", {"topk_method": "greedy"}, "topk_method 'greedy' is not supported: only 'noaux_tc'"),
        (
            "deepseek-v3",
            {"quantization_config": {"quant_method": "fp8"}},
            "one scale for a whole matrix",
        ),
        ("deepseek-v3", {"rope_interleave": False}, "rope_interleave off is not supported"),
        ("deepseek-v3", {"n_group": None}, "has no 'n_group', which model_type 'deepseek_v3' needs"),
        ("deepseek-v3", {"topk_group": 9}, "n_group=8 must divide the 256 experts, and topk_group=9"),
        ("glm-4.5-air", {"num_experts_per_tok": 1}, "with it not for one expert a token"),
        ("glm-4.5-air", {"routed_scaling_factor": "2"}, "'routed_scaling_factor' must be a number above 0"),
        ("qwen3-30b-a3b", {"num_experts_per_tok": 129}, "must be one of the 128 experts at least"),
        ("qwen3-4b", {"rms_norm_eps": None}, "has no 'rms_norm_eps'"),
        ("qwen3-4b", {"tie_word_embeddings": "yes"}, "must be true or false, not 'yes'"),
        ("qwen3-4b", {"is_causal": False}, "is_causal=false is not supported"),
        ("qwen3-4b", {"head_dim": 127}, "127 rotated dimensions"),
        ("qwen3-4b", {"partial_rotary_factor": 0.5}, "whose heads are rotated whole"),
        ("qwen3-4b", {"num_key_value_heads": 7}, "7 key-value heads must divide the 32 attention heads"),
        (
            "qwen3-4b",
            {"rope_parameters": {"rope_theta": 1}, "rope_scaling": {"type": "linear", "factor": 2}},
            "has both rope_parameters and rope_scaling",
        ),
    ],
)
def test_features_that_would_be_computed_otherwise_are_refused(
    name: str, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        find_family(published(name, **changes))


@pytest.mark.parametrize(
    ("rope", "message"),
    [
        ({"type": "linear", "factor": 2.0}, "rope type 'linear' is not supported"),
        (
            {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 8},
            "'yarn' is supported with lat",
        ),
    ],
)
def test_rope_types_that_are_refused(rope: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        read_architecture(published("qwen3-4b", rope_scaling=rope), tensor_parallel=1)


def test_rope_of_transformers_4_and_5() -> None:
    old = read_rope(published("deepseek-v3"))
    assert isinstance(old.scaling, YarnScaling) and old.base == 10000
    scaling = published("deepseek-v3")["rope_scaling"]
    new = {key: value for key, value in scaling.items() if key != "type"}
    parameters = {**new, "rope_type": "yarn", "rope_theta": 10000}
    hf = {key: value for key, value in published("deepseek-v3").items() if not key.startswith("rope")}
    assert read_rope({**hf, "rope_parameters": parameters}) == old


@pytest.mark.parametrize(
    ("name", "layout", "message"),
    [
        ("glm-4-9b", ModelLayout(tensor=4), r"parallel\.tensor=4 must divide the model's 2 key-value heads"),
        ("qwen3-4b", ModelLayout(expert=2), r"parallel\.expert=2 asks for experts, and the model has none"),
        ("qwen3-30b-a3b", ModelLayout(expert=3), r"parallel\.expert=3 must divide the model's 128 experts"),
        (
            "qwen3-4b-odd",
            ModelLayout(tensor=2),
            r"parallel\.tensor=2 must divide the 9729 channels of the model's MLP",
        ),
        (
            "glm-4.5-air-odd",
            ModelLayout(expert_tensor=4),
            r"parallel\.expert_tensor=4 must divide the 1409 channels of the model's experts",
        ),
        (
            "qwen3-4b",
            ModelLayout(pipeline=5, virtual_pipeline=2),
            "36 layers do not divide among 5 pipeline ranks",
        ),
    ],
)
def test_layouts_that_do_not_fit(name: str, layout: ModelLayout, message: str) -> None:
    hf = published(name.removesuffix("-odd"))
    if name.endswith("-odd"):
        hf |= {key: hf[key] + 1 for key in ("intermediate_size", "moe_intermediate_size") if key in hf}
    with pytest.raises(ValueError, match=message):
        transformer_config(hf, dtype="bfloat16", device="cpu", extra={}, layout=layout)


@pytest.mark.parametrize("name", preset_names())
def test_spellings_of_one_computation_are_the_same(name: str) -> None:
    """What transformers 5 writes for a model that transformers 4 published, and what fine-tuning leaves in a config."""
    old = published(name)
    rope = {"rope_type": "default", **(old.get("rope_scaling") or {}), "rope_theta": old["rope_theta"]}
    rope["rope_type"] = rope.pop("type", rope["rope_type"])
    new = {key: value for key, value in old.items() if key not in ("rope_theta", "rope_scaling")}
    new |= {
        "rope_parameters": rope,
        "attention_dropout": 0.1,
        "initializer_range": 0.5,
        "router_aux_loss_coef": 0.01,
        "output_router_logits": True,
        "use_cache": False,
        "dtype": "float32",
        "transformers_version": "5.19.0",
        "max_window_layers": 3,
        "eos_token_id": [1, 2],
        "_name_or_path": "elsewhere",
    }
    same_computation(old, new, source=Path("new"), what="model.reference_path")
    for changes, told in (
        ({"rope_parameters": {**rope, "rope_theta": 1.5}}, r"rope_base=1\.5|rotary_base=1\.5"),
        ({"rms_norm_eps": 0.5}, r"layernorm_epsilon=0\.5"),
        ({"intermediate_size": 8}, "ffn_hidden_size=8"),
        ({"vocab_size": 7}, "vocab_size=7"),
        ({"tie_word_embeddings": not old.get("tie_word_embeddings")}, "tied_embeddings"),
    ):
        with pytest.raises(ValueError, match=rf"model\.reference_path: new has ({told})"):
            same_computation(old, new | changes, source=Path("new"), what="model.reference_path")


VALUES = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-2, 300),
    st.floats(),
    st.text(max_size=3),
    st.lists(st.integers(0, 3), max_size=3),
    st.dictionaries(st.sampled_from(["rope_type", "type", "factor", "rope_theta"]), st.integers(0, 3)),
)


@settings(max_examples=300, deadline=None)
@given(name=st.sampled_from(preset_names()), data=st.data())
def test_any_key_of_any_value_is_read_or_refused(name: str, data: st.DataObject) -> None:
    hf = published(name)
    for key in data.draw(st.lists(st.sampled_from(sorted(hf)), min_size=1, max_size=2)):
        if data.draw(st.booleans()):
            hf.pop(key, None)
        else:
            hf[key] = data.draw(VALUES)
    try:
        describe_computation(hf)
        read_architecture(hf, tensor_parallel=2)
        transformer_config(hf, dtype="bfloat16", device="cpu", extra={}, layout=ModelLayout())
    except ValueError as error:
        assert str(error)
