"""What the families read of a Hugging Face config, and what they refuse."""

from __future__ import annotations

import ast
import functools
import re
from pathlib import Path
from typing import Any

import pytest
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers.models.auto.configuration_auto import model_type_to_module_name

from polyturn.configs.models import preset_directory, preset_names, read_json
from polyturn.configs.sizing.model_shape import FAMILIES as SHAPES
from polyturn.trainer.megatron.model import read_architecture, transformer_config
from polyturn.trainer.megatron.process_groups import ModelLayout
from polyturn.trainer.models.config_keys import FEATURES, INERT, LACKING, UNDERSTOOD
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
            "model_type 'qwen4' is not supported: one of deepseek_v3, ernie4_5, glm4",
        ),
        ("qwen3-4b", {"model_type": "gpt_oss"}, r"it needs attention sinks, .*'swiglu_limit' in config.json"),
        ("qwen3-4b", {"model_type": "mistral"}, "sliding_window must be null"),
        ("qwen3-4b", {"model_type": "mistral", "sliding_window": 4096}, "sliding_window must be null"),
        (
            "qwen3-4b",
            {"model_type": "smollm3", "no_rope_layers": [1, 0]},
            "'no_rope_layers' must be 1 .rotated. or 0 for each of the 36 layers",
        ),
        (
            "deepseek-v3",
            {"model_type": "glm4_moe_lite", "first_k_dense_replace": 3},
            "layers with experts are others",
        ),
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
    ("name", "rope", "message"),
    [
        (
            "qwen3-4b",
            {"type": "dynamic", "factor": 2.0},
            "'dynamic' is not supported .its frequencies follow",
        ),
        ("qwen3-4b", {"type": "longrope", "factor": 2.0}, "'longrope' is not supported .it has two sets"),
        ("qwen3-4b", {"type": ["yarn"]}, "is not supported: use a model with"),
        ("qwen3-4b", {"rope_type": "linear", "factor": 0}, "'factor' must be a number above 0"),
        (
            "qwen3-4b",
            {"rope_type": "yarn", "factor": 4.0},
            "'original_max_position_embeddings' must be a number",
        ),
        ("qwen3-4b", {"llama_4_scaling_beta": 0.1}, "has 'llama_4_scaling_beta'=0.1, which is not supported"),
        (
            "deepseek-v3",
            {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 8, "attention_factor": 2.0},
            "attention_factor or without truncation is not supported with latent attention",
        ),
    ],
)
def test_ropes_that_are_refused(name: str, rope: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        read_architecture(published(name, rope_scaling=rope), tensor_parallel=1)


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
        ("qwen3-4b", ModelLayout(tensor=3), r"parallel\.tensor=3 must divide the model's 32 attention heads"),
        (
            "llama-3.2-3b",
            ModelLayout(tensor=12),
            r"parallel\.tensor=12 must divide the model's 8 key-value h",
        ),
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


def test_a_yarn_rope_is_not_computed_by_a_kernel_without_its_factor() -> None:
    yarn = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768}
    hf = published("qwen3-4b", rope_scaling=yarn)
    transformer_config(hf, dtype="bfloat16", device="cpu", extra={}, layout=ModelLayout())
    with pytest.raises(ValueError, match="apply_rope_fusion does not go with the model's yarn rope"):
        transformer_config(
            hf, dtype="bfloat16", device="cpu", extra={"apply_rope_fusion": True}, layout=ModelLayout()
        )


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


DECODERS = (
    *(model_type for model_type in FAMILIES if model_type != "kimi_k2"),
    *(model_type for model_type in LACKING if model_type not in ("deepseek_v4", "minimax")),
)
"""Of those that the trainer knows of, the ones whose modelling code is one file in transformers, read below."""


@functools.cache
def keys_read(model_type: str) -> frozenset[str]:
    """The keys of a config that transformers' modelling code of a model type reads."""
    folder = model_type_to_module_name(model_type)
    source = Path(transformers.__file__).parent / "models" / folder / f"modeling_{folder}.py"
    found = set()
    for node in ast.walk(ast.parse(source.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Attribute) and is_config(node.value):
            found.add(node.attr)
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "getattr":
            where, key = node.args[:2]
            if is_config(where) and isinstance(key, ast.Constant):
                found.add(key.value)
    return frozenset(found)


def is_config(node: ast.expr) -> bool:
    """`config`, `self.config`, `config.text_config`."""
    name = node.id if isinstance(node, ast.Name) else node.attr if isinstance(node, ast.Attribute) else ""
    return name.endswith("config")


VISION = re.compile(
    r"image|video|visual|vision|patch|pixel|project|depth|num_heads|channels|merge|get_text|out_hidden|num_position|per_image"
)


def test_every_key_that_a_decoder_of_transformers_reads_is_understood_inert_or_refused() -> None:
    unknown = {
        key: model_type
        for model_type in DECODERS
        for key in keys_read(model_type)
        if key not in FEATURES and key not in UNDERSTOOD and key not in INERT and not VISION.search(key)
    }
    assert not unknown
    for model_type, family in FAMILIES.items():
        if model_type != "kimi_k2":
            unread = keys_read(model_type) & FEATURES.keys() - set(family.reads)
            assert unread == set(), f"{model_type} does not say what it does with {unread}"
    assert not FEATURES.keys() & (UNDERSTOOD | INERT) and not LACKING.keys() & FAMILIES.keys()


@pytest.mark.parametrize("name", preset_names())
@pytest.mark.parametrize(
    ("key", "value", "neutral"),
    [
        ("logit_scale", 0.5, 1.0),
        ("final_logit_softcapping", 30.0, None),
        ("attn_output_gate", True, False),
        ("index_topk", 2048, 0),
        ("no_rope_layers", [1], []),
        ("embedding_multiplier", 12, 1),
    ],
)
def test_a_key_of_another_familys_computation_is_refused(
    name: str, key: str, value: Any, neutral: Any
) -> None:
    with pytest.raises(
        ValueError, match=rf"config\.json has {key}=.* which the trainer does not compute for"
    ):
        find_family(published(name, **{key: value}))
    find_family(published(name, **{key: neutral}))


@pytest.mark.parametrize("model_type", LACKING)
def test_another_family_is_told_what_it_lacks_by_a_key_that_it_has(model_type: str) -> None:
    hf = transformers.CONFIG_MAPPING[model_type]().to_dict()
    key, what = LACKING[model_type]
    assert key in hf
    with pytest.raises(ValueError, match=re.escape(f"it needs {what}: '{key}' in config.json")):
        find_family(hf)


def test_the_documents_list_what_is_supported_and_what_each_other_family_lacks() -> None:
    page = (Path(__file__).parents[2] / "docs" / "models.md").read_text(encoding="utf-8")
    rows = dict(re.findall(r"^\| `(\w+)` \|(?:.*\|)? ([^|]*) \|$", page, flags=re.M))
    rows.pop("model_type")
    assert rows.keys() == FAMILIES.keys() | LACKING.keys()
    for model_type, (key, what) in LACKING.items():
        assert rows[model_type] == f"{what} (`{key}`)", model_type


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
