"""The memory estimate and the shapes of models, against files that transformers writes and published totals."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

import pytest

from polyturn.configs.errors import ConfigError
from polyturn.configs.loading.loader import load_config
from polyturn.configs.models import preset_directory, preset_names, resolve_model_path
from polyturn.configs.schema.trainer import ParallelConfig
from polyturn.configs.sizing.fit import judge, named_capacity
from polyturn.configs.sizing.memory import check_layout, estimate_memory, stage_parameters
from polyturn.configs.sizing.model_shape import ModelShape, Split, StageSizes, divide_layers, stage_layers

SIZES = {
    "vocab_size": 101,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "pad_token_id": None,
}
MIXTURE = {
    "n_routed_experts": 8,
    "n_shared_experts": 2,
    "num_experts_per_tok": 4,
    "moe_intermediate_size": 24,
    "first_k_dense_replace": 1,
    "num_nextn_predict_layers": 0,
}
LATENT = {
    **MIXTURE,
    "num_key_value_heads": 4,
    "kv_lora_rank": 16,
    "q_lora_rank": 20,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 12,
    "v_head_dim": 10,
}
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "qwen2": ("qwen2", {}),
    "qwen3": ("qwen3", {"head_dim": 16}),
    "llama": ("llama", {}),
    "tied": ("llama", {"tie_word_embeddings": True}),
    "glm4": ("glm4", {"head_dim": 8, "attention_bias": True}),
    "glm4 without biases": ("glm4", {"head_dim": 8}),
    "qwen3_moe": (
        "qwen3_moe",
        {"head_dim": 16, "num_experts": 6, "moe_intermediate_size": 24, "mlp_only_layers": [1]},
    ),
    "glm4_moe": ("glm4_moe", {**MIXTURE, "head_dim": 16, "use_qk_norm": True, "attention_bias": True}),
    "deepseek_v3": ("deepseek_v3", LATENT),
    "moonlight": ("deepseek_v3", {**LATENT, "q_lora_rank": None}),
}

PUBLISHED = {
    "llama-3.1-8b": 8_030_261_248,
    "llama-3.2-1b": 1_235_814_400,
    "llama-3.2-3b": 3_212_749_824,
    "qwen2.5-0.5b": 494_032_768,
    "qwen2.5-7b": 7_615_616_512,
    "qwen3-8b": 8_190_735_360,
    "qwen3-30b-a3b": 30_532_122_624,
    "glm-4-9b": 9_400_279_040,
}
"""Totals that the model hub states."""


def shape(**changes: Any) -> ModelShape:
    sizes: dict[str, Any] = {
        "model_type": "qwen3",
        "vocab_size": 100,
        "hidden_size": 32,
        "num_layers": 3,
        "num_heads": 4,
        "num_kv_heads": 2,
        "head_dim": 16,
        "ffn_size": 48,
        "max_positions": 128,
        "tied_embeddings": True,
        "head_norms": True,
    }
    return ModelShape(**(sizes | changes))


@pytest.mark.parametrize("name", FAMILIES)
def test_parameter_count_is_the_one_of_the_safetensors_file(name: str, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    model_type, changes = FAMILIES[name]
    config = transformers.AutoConfig.for_model(
        model_type, **{"tie_word_embeddings": False, **SIZES, **changes}
    )
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    raw = (tmp_path / "model.safetensors").read_bytes()
    header = json.loads(raw[8 : 8 + struct.unpack("<Q", raw[:8])[0]])
    total = 0
    for tensor_name, tensor in header.items():
        if tensor_name != "__metadata__" and "e_score_correction_bias" not in tensor_name:
            count = 1
            for length in tensor["shape"]:
                count *= length
            total += count
    assert ModelShape.read(tmp_path).num_parameters == total


@pytest.mark.parametrize("name", PUBLISHED)
def test_presets_have_the_published_number_of_parameters(name: str) -> None:
    assert ModelShape.read(preset_directory(name)).num_parameters == PUBLISHED[name]


def test_tensor_parallel_ranks_together_hold_the_model_and_the_repeated_norms() -> None:
    model = shape()
    norms = 3 * (2 * 32 + 2 * 16) + 32
    (two,) = stage_parameters(model, ParallelConfig(tensor=2))
    assert 2 * two.total == model.num_parameters + norms
    padding = 32 * 2
    other = shape(num_heads=6, num_kv_heads=3)
    (three,) = stage_parameters(other, ParallelConfig(tensor=3))
    assert 3 * three.total == other.num_parameters + 2 * norms + padding


def test_stages_together_hold_the_model_and_a_second_copy_of_tied_embeddings() -> None:
    model = shape()
    stages = stage_parameters(model, ParallelConfig(pipeline=3))
    assert sum(stage.total for stage in stages) == model.num_parameters + 100 * 32
    untied = shape(tied_embeddings=False)
    stages = stage_parameters(untied, ParallelConfig(pipeline=2))
    assert sum(stage.total for stage in stages) == untied.num_parameters


def test_expert_ranks_together_hold_every_expert_once() -> None:
    model = ModelShape.read(preset_directory("qwen3-30b-a3b"))
    whole = model.on_stage(range(model.num_layers), Split(), first=True, last=True)
    (part,) = stage_parameters(model, ParallelConfig(data=8, expert=4, expert_tensor=2))
    assert 8 * part.experts == whole.experts and part.dense == whole.dense


def test_memory_by_hand() -> None:
    model = shape()
    count = model.num_parameters
    options = ["trainer.parallel.data=2", "sglang.max_total_tokens=500"]
    estimate = estimate_memory(load_config("quickstart", options), model)
    assert estimate.rank.parts == {"weights": 4 * count, "gradients": 4 * count, "optimizer": 4 * count}
    assert estimate.engine == {"weights": 4 * count, "kv cache": 500 * 2 * 3 * 2 * 16 * 4}
    bf16 = [*options, "model.dtype=bfloat16", "trainer.algorithm.kl.kind=in_loss"]
    estimate = estimate_memory(load_config("quickstart", bf16), model)
    assert estimate.rank.parts["optimizer"] == 6 * count
    assert estimate.rank.parts["reference"] == estimate.rank.parts["weights"] == 2 * count
    assert estimate.engine["kv cache"] == 500 * 2 * 3 * 2 * 16 * 2


def test_the_state_of_experts_is_split_over_the_ranks_that_hold_them() -> None:
    model = ModelShape.read(preset_directory("qwen3-30b-a3b"))
    options = ["model.dtype=bfloat16", "trainer.parallel={tensor: 2, data: 4, expert: 4}"]
    (counts,) = stage_parameters(model, ParallelConfig(tensor=2, data=4, expert=4))
    estimate = estimate_memory(load_config("quickstart", options), model)
    assert estimate.rank.parts["optimizer"] == 12 * counts.dense // 4 + 12 * counts.experts // 2


def test_the_state_of_the_optimizer_by_its_dtypes_and_place() -> None:
    model = shape()
    count = model.num_parameters
    options = [
        "model.dtype=bfloat16",
        "trainer.device=cuda",
        "trainer.parallel.data=1",
        "megatron.optimizer={use_precision_aware_optimizer: true, exp_avg_dtype: bfloat16, exp_avg_sq_dtype: uint8}",
    ]
    estimate = estimate_memory(load_config("quickstart", options), model)
    assert estimate.rank.parts["optimizer"] == 7 * count and estimate.rank.host == 0
    options += [
        "megatron.optimizer.optimizer_cpu_offload=true",
        "megatron.optimizer.optimizer_offload_fraction=1.0",
    ]
    estimate = estimate_memory(load_config("quickstart", options), model)
    assert estimate.rank.parts["optimizer"] == 0 and estimate.rank.host == 7 * count
    estimate = estimate_memory(
        load_config("quickstart", [*options, "trainer.algorithm.kl.kind=in_loss"]), model
    )
    assert "reference" not in estimate.rank.parts and estimate.rank.host == 9 * count


def test_only_adapters_have_gradients_and_optimizer() -> None:
    model = shape()
    lora = ["trainer.lora.rank=8", 'trainer.lora.target_modules=["q_proj","down_proj"]']
    estimate = estimate_memory(load_config("quickstart", lora), model)
    queries = model.hidden_size + model.num_heads * model.head_dim
    adapters = 8 * model.num_layers * (queries + model.ffn_size + model.hidden_size)
    assert estimate.rank.parts == {
        "weights": 4 * model.num_parameters,
        "adapters": 4 * adapters,
        "gradients": 4 * adapters,
        "optimizer": 4 * adapters,
    }


PER_PARAMETER = {"weights": 4, "gradients": 4, "optimizer": 8}


def test_a_shared_critic_is_another_model_without_an_output_layer() -> None:
    model = shape()
    ppo = ["trainer.algorithm.advantage.kind=ppo_gae", "trainer.parallel.data=1"]
    table = 0 if model.tied_embeddings else model.vocab_size * model.hidden_size
    estimate = estimate_memory(load_config("quickstart", ppo), model)
    assert estimate.rank.parts["critic"] == (4 + 4 + 8) * (model.num_parameters - table)
    own = estimate_memory(load_config("quickstart", [*ppo, "trainer.critic.placement=own"]), model)
    assert "critic" not in own.rank.parts
    (critic,) = own.critic
    assert critic.parts == {key: size * (model.num_parameters - table) for key, size in PER_PARAMETER.items()}


def test_the_fullest_stage_stands_for_the_rank(tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("extends: [search_r1, preset:glm-4.5-355b]\nname: big\n", encoding="utf-8")
    config = load_config(recipe, ["environment.options.questions=q.jsonl"])
    assert config.trainer.parallel.world_size == 64
    assert config.trainer.max_tokens_per_gpu == 16384
    estimate = estimate_memory(
        config, ModelShape.read(resolve_model_path(config.model.path, needs_weights=False))
    )
    weights = [stage.parts["weights"] for stage in estimate.stages]
    assert len(weights) == 4 and weights[1] == weights[2] < weights[3]
    assert weights[0] < weights[1], "three dense layers are smaller than three mixtures"
    assert estimate.rank == max(estimate.stages, key=lambda stage: stage.total)


def test_a_layer_of_the_preset_lies_under_the_recipe(tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("extends: [search_r1, preset:glm-4.5-355]\nname: big\n", encoding="utf-8")
    with pytest.raises(
        ConfigError, match=r"recipe.yaml:1: 'extends': there is no preset 'glm-4.5-355', did you"
    ):
        load_config(recipe)


@pytest.mark.parametrize("name", preset_names())
def test_every_preset_fits_its_layout(name: str, tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(f"extends: [search_r1, 'preset:{name}']\nname: big\n", encoding="utf-8")
    config = load_config(recipe, ["environment.options.questions=q.jsonl"])
    assert config.model.path == f"preset:{name}" and config.model.dtype == "bfloat16"
    planned = ModelShape.read(resolve_model_path(config.model.path, needs_weights=False))
    check_layout(config, planned)
    assert config.engines.device == "cuda" and config.cluster.gpu is not None
    assert judge(config, planned, named_capacity(config)) == ([], [])


@pytest.mark.parametrize(
    ("section", "message"),
    [
        (
            "{recompute_granularity: full, recompute_method: uniform, recompute_num_layers: 5}",
            "must divide the 36",
        ),
        (
            "{recompute_granularity: selective, recompute_modules: [mla_up_proj]}",
            "names mla_up_proj, but the model has no latent attention",
        ),
        ("{recompute_granularity: selective, recompute_modules: [moe_act]}", "but the model has no experts"),
        ("{distribute_saved_activations: true}", "does not go with trainer.parallel.tensor above 1"),
        ("{cpu_offloading: true, cpu_offloading_num_layers: 36}", "must be below the model's 36 layers"),
    ],
)
def test_options_of_recomputing_are_checked_against_the_model(
    tmp_path: Path, section: str, message: str
) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        f"extends: [search_r1, 'preset:qwen3-4b']\nname: big\nmegatron: {section}\n",
        encoding="utf-8",
    )
    options = ["environment.options.questions=q.jsonl"]
    if "recompute_granularity" not in section:
        options += [f"megatron.recompute_{key}=null" for key in ("granularity", "method", "num_layers")]
    elif "selective" in section:
        options += [f"megatron.recompute_{key}=null" for key in ("method", "num_layers")]
    config = load_config(recipe, options)
    with pytest.raises(ConfigError, match=message):
        check_layout(config, ModelShape.read(resolve_model_path("preset:qwen3-4b", needs_weights=False)))


def test_a_preset_has_no_weights_to_run_with() -> None:
    with pytest.raises(
        ConfigError, match=r"'preset:qwen3-4b' is the shape of a published model, without its weights"
    ):
        resolve_model_path("preset:qwen3-4b")
    with pytest.raises(ConfigError, match=r"there is no preset 'qwen3-4', did you mean 'preset:qwen3-4b'"):
        resolve_model_path("preset:qwen3-4")


@pytest.mark.parametrize(
    ("parallel", "message"),
    [
        ("{tensor: 3}", r"trainer\.parallel\.tensor is 3, which must divide the model's 32 attention heads"),
        (
            "{data: 3, expert: 3}",
            r"trainer\.parallel\.expert is 3, which must divide the model's 128 experts",
        ),
        (
            "{data: 5, expert_tensor: 5}",
            r"expert_tensor is 5, which must divide the 768 channels of the model's experts",
        ),
        ("{pipeline: 49}", r"48 layers cannot be divided among 49 pipeline stages"),
        (
            "{pipeline: 2, virtual_pipeline: 5}",
            r"48 layers do not divide among 2 pipeline ranks with 5 virtual",
        ),
    ],
)
def test_layouts_that_do_not_fit_the_model(parallel: str, message: str) -> None:
    config = load_config("quickstart", [f"trainer.parallel={parallel}"])
    with pytest.raises(ConfigError, match=message):
        check_layout(config, ModelShape.read(preset_directory("qwen3-30b-a3b")))


def test_more_ranks_than_key_value_heads_share_them_but_not_their_adapters() -> None:
    shape = ModelShape.read(preset_directory("qwen3-30b-a3b"))
    parallel = "trainer.parallel={tensor: 8}"
    check_layout(load_config("quickstart", [parallel]), shape)
    with pytest.raises(ConfigError, match=r"trainer\.parallel\.tensor 8 above the model's 4 key-value"):
        check_layout(load_config("quickstart", [parallel, "trainer.lora={rank: 4}"]), shape)
    elsewhere = "trainer.lora={rank: 4, target_modules: [o_proj]}"
    check_layout(load_config("quickstart", [parallel, elsewhere]), shape)


def test_a_family_that_the_trainer_does_not_know(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "qwen4"}', encoding="utf-8")
    with pytest.raises(ConfigError, match=r"model_type 'qwen4' is not supported; one of deepseek_v3"):
        ModelShape.read(tmp_path)


@pytest.mark.parametrize(
    ("num_layers", "pipeline", "counts"),
    [(8, 4, [2, 2, 2, 2]), (61, 4, [15, 16, 16, 14]), (61, 8, [7, 8, 8, 8, 8, 8, 8, 6]), (5, 2, [3, 2])],
)
def test_stages_are_even_and_the_ends_short(num_layers: int, pipeline: int, counts: list[int]) -> None:
    stages = stage_layers(num_layers, pipeline)
    assert [layer for stage in stages for layer in stage] == list(range(num_layers))
    assert sorted(len(stage) for stage in stages) == sorted(counts)
    assert max(len(stage) for stage in stages[1:-1] or stages) == max(len(stage) for stage in stages)


def test_virtual_stages_take_turns() -> None:
    assert stage_layers(8, 2, 2) == [[0, 1, 4, 5], [2, 3, 6, 7]]
    assert stage_layers(10, 2, 2, given=StageSizes(last=4)) == [[0, 1, 2, 5, 6, 7], [3, 4, 8, 9]]


def test_stages_that_do_not_add_up() -> None:
    with pytest.raises(ValueError, match="61 layers cannot be divided into stages of 20, 20, 20 layers"):
        stage_layers(61, 3, given=StageSizes(last=20))
    assert divide_layers(61, 3, given=StageSizes(last=21)) == StageSizes(last=21)
