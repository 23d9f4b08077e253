"""A tiny random model of each family, made with transformers, and what a rank does with it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from tests.support.megatron.ranks_pool import RankContext
from tests.support.samples import make_sample

VOCAB_SIZE = 301
"""Odd, so that two tensor-parallel ranks need a padded vocabulary."""
LENGTHS = [23, 9, 14]

_COMMON = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "initializer_range": 0.15,
    "rms_norm_eps": 1e-6,
    "pad_token_id": None,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_CORRECTED = {
    "n_routed_experts": 8,
    "n_shared_experts": 1,
    "num_experts_per_tok": 4,
    "moe_intermediate_size": 24,
    "first_k_dense_replace": 1,
    "routed_scaling_factor": 1.8,
    "norm_topk_prob": True,
    "num_nextn_predict_layers": 0,
}
_LATENT = {
    **_CORRECTED,
    "num_key_value_heads": 4,
    "kv_lora_rank": 16,
    "q_lora_rank": 20,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 12,
    "v_head_dim": 10,
}
_YARN = {
    "rope_type": "yarn",
    # So that the few rotated dimensions fall on both sides of the ramp.
    "rope_theta": 100.0,
    "factor": 8.0,
    "original_max_position_embeddings": 4096,
    "beta_fast": 32,
    "beta_slow": 1,
    "mscale": 1.0,
    "mscale_all_dim": 1.0,
}

TINY: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("LlamaConfig", {"head_dim": 12}),
    "llama3-rope": (
        "LlamaConfig",
        {
            "head_dim": 16,
            "tie_word_embeddings": True,
            "rope_parameters": {
                "rope_type": "llama3",
                "rope_theta": 500.0,
                "factor": 32.0,
                "low_freq_factor": 2.0,
                "high_freq_factor": 8.0,
                "original_max_position_embeddings": 64,
            },
        },
    ),
    "llama-yarn": (
        "LlamaConfig",
        {
            "head_dim": 16,
            "rope_parameters": {
                "rope_type": "yarn",
                "rope_theta": 50.0,
                "factor": 4.0,
                # Less than the longest of `LENGTHS`.
                "original_max_position_embeddings": 16,
                "beta_fast": 4.0,
                "beta_slow": 1.0,
            },
        },
    ),
    "mistral": (
        "MistralConfig",
        {
            "head_dim": 12,
            "sliding_window": None,
            "num_key_value_heads": 1,
            "rope_parameters": {"rope_type": "linear", "rope_theta": 100.0, "factor": 3.0},
        },
    ),
    "seed_oss": ("SeedOssConfig", {"head_dim": 12, "attention_bias": True, "attention_out_bias": False}),
    "smollm3": ("SmolLM3Config", {"no_rope_layer_interval": 3, "tie_word_embeddings": True}),
    "ernie4_5": ("Ernie4_5Config", {"head_dim": 12, "tie_word_embeddings": True, "num_key_value_heads": 1}),
    "qwen2": ("Qwen2Config", {"tie_word_embeddings": True}),
    "qwen3": ("Qwen3Config", {"head_dim": 12, "tie_word_embeddings": True}),
    "qwen3_moe": (
        "Qwen3MoeConfig",
        {
            "head_dim": 12,
            "num_experts": 8,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 24,
            "norm_topk_prob": True,
        },
    ),
    "qwen3_moe-sparse": (
        "Qwen3MoeConfig",
        {
            "head_dim": 12,
            "num_experts": 6,
            "num_experts_per_tok": 3,
            "moe_intermediate_size": 24,
            "norm_topk_prob": False,
            "decoder_sparse_step": 2,
            "mlp_only_layers": [1],
        },
    ),
    "glm4": ("Glm4Config", {"head_dim": 16, "attention_bias": True, "partial_rotary_factor": 0.5}),
    "glm4_moe": (
        "Glm4MoeConfig",
        {**_CORRECTED, "head_dim": 16, "attention_bias": True, "use_qk_norm": True},
    ),
    "deepseek_v3": (
        "DeepseekV3Config",
        {**_LATENT, "n_group": 4, "topk_group": 2, "rope_parameters": _YARN},
    ),
    "kimi_k2": (
        "DeepseekV3Config",
        {**_LATENT, "n_group": 1, "topk_group": 1, "rope_parameters": {**_YARN, "beta_fast": 1.0}},
    ),
    "glm4_moe_lite": (
        "Glm4MoeLiteConfig",
        {
            **{key: value for key, value in _LATENT.items() if key != "first_k_dense_replace"},
            "n_group": 1,
            "topk_group": 1,
            "mlp_layer_types": ["dense", "sparse", "dense", "sparse"],
        },
    ),
    "moonlight": (
        "DeepseekV3Config",
        {
            **_LATENT,
            "q_lora_rank": None,
            "n_group": 1,
            "topk_group": 1,
            "n_shared_experts": 2,
            "rms_norm_eps": 1e-5,
        },
    ),
}
"""Name -> transformers' config class and what differs from `_COMMON`."""

HAS_EXPERTS = (
    "qwen3_moe",
    "qwen3_moe-sparse",
    "glm4_moe",
    "deepseek_v3",
    "kimi_k2",
    "glm4_moe_lite",
    "moonlight",
)


def make_tiny(name: str, directory: Path, **overrides: Any) -> Path:
    """Write a tiny model as transformers saves it, with its own logits beside it."""
    import transformers

    class_name, changes = TINY[name]
    config = getattr(transformers, class_name)(**{**_COMMON, **changes, **overrides})
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    randomize(model)
    model.save_pretrained(directory)
    path = directory / "config.json"
    hf = json.loads(path.read_text())
    if name == "kimi_k2":
        path.write_text(json.dumps({**hf, "model_type": "kimi_k2"}))
    with torch.no_grad():
        logits = [model(torch.from_numpy(ids)[None]).logits[0] for ids in token_ids()]
    torch.save(torch.cat(logits), directory / "logits.pt")
    return directory


def randomize(model: torch.nn.Module) -> None:
    """Norms, biases and routers of which none could be swapped or forgotten unseen."""
    with torch.no_grad():
        for tensor_name, tensor in [*model.named_parameters(), *model.named_buffers()]:
            if "norm" in tensor_name or "bias" in tensor_name:
                # Ones and zeros would hide a swapped or forgotten one.
                tensor.copy_((1.0 if "norm" in tensor_name else 0.0) + 0.3 * torch.randn_like(tensor))
            elif tensor_name.endswith("gate.weight"):
                # Experts far apart in score, so that rounding does not choose others.
                tensor.copy_(torch.randn_like(tensor))


def token_ids() -> list[np.ndarray]:
    rng = np.random.default_rng(0)
    return [rng.integers(0, VOCAB_SIZE, length) for length in LENGTHS]


def run_rank(context: RankContext, directories: dict[str, Path], parallel: Any) -> dict[str, dict[str, Any]]:
    """Load each model in a layout; by name the packed logits [tokens, vocabulary] and the exported tensors' names.

    Raises:
        AssertionError: an exported tensor is not bit for bit what was loaded.
    """
    results = {}
    with context.joined(parallel):
        for name, directory in directories.items():
            results[name] = _run_model(directory)
    return results


def load_model(directory: Path) -> tuple[list[Any], Any, Any]:
    """This rank's part of a model with its weights: chunks, TransformerConfig, Architecture."""
    from polyturn.trainer.megatron.model import build_chunks, read_architecture, transformer_config
    from polyturn.trainer.megatron.process_groups import ModelLayout
    from polyturn.trainer.megatron.weights import load_hf_weights, mark_split_params
    from polyturn.trainer.models.hf_directory import HFWeights, read_config

    hf, layout = read_config(directory), ModelLayout.current()
    architecture = read_architecture(hf, tensor_parallel=layout.tensor)
    config = transformer_config(hf, dtype="float32", device="cpu", extra={}, layout=layout)
    chunks = build_chunks(config, architecture, device="cpu")
    mark_split_params(chunks, architecture)
    load_hf_weights(chunks, architecture, HFWeights(directory))
    return chunks, config, architecture


def _with_settings(
    made: Callable[[Any], dict[str, Any]], fields: dict[str, Any]
) -> Callable[[Any], dict[str, Any]]:
    return lambda hf: made(hf) | fields


def run_without(
    context: RankContext,
    directories: dict[str, Path],
    changes: list[tuple[str, str, dict[str, Any]]],
    parallel: Any,
) -> list[float]:
    """How far the logits are from transformers', relatively, with other fields in the family's TransformerConfig.

    Args:
        changes: each the name of a tiny model, its family's `model_type` and the fields.
    """
    from dataclasses import replace

    from polyturn.trainer.models.families import FAMILIES

    errors = []
    with context.joined(parallel):
        for name, model_type, fields in changes:
            family = FAMILIES[model_type]
            FAMILIES[model_type] = replace(family, settings=_with_settings(family.settings, fields))
            logits = _logits(*load_model(directories[name]))
            FAMILIES[model_type] = family
            expected = torch.load(directories[name] / "logits.pt")
            assert logits is not None
            errors.append(float((logits - expected).abs().max() / expected.abs().max()))
    return errors


def _run_model(directory: Path) -> dict[str, Any]:
    from safetensors.torch import load_file

    from polyturn.trainer.megatron.weights import named_hf_tensors

    chunks, config, architecture = load_model(directory)
    stored = load_file(directory / "model.safetensors")
    names = []
    for name, tensor in named_hf_tensors(chunks, architecture):
        assert torch.equal(tensor, stored[name]), name
        assert tensor.dtype == stored[name].dtype, name
        names.append(name)
    assert len(names) == len(set(names))
    assert set(names) == set(stored) - ({"lm_head.weight"} if architecture.tied_embeddings else set())
    return {"names": names, "logits": _logits(chunks, config, architecture)}


@torch.no_grad()
def _logits(chunks: list[Any], config: Any, architecture: Any) -> torch.Tensor | None:
    """[tokens, vocabulary], on the ranks of the last pipeline stage."""
    from megatron.core import parallel_state
    from megatron.core.pipeline_parallel import get_forward_backward_func
    from megatron.core.tensor_parallel import gather_from_tensor_model_parallel_region

    from polyturn.trainer.megatron.packing import make_packed_batch

    samples = [make_sample(ids) for ids in token_ids()]
    batch = make_packed_batch(samples, device=torch.device("cpu"), multiple=4)
    kept: list[torch.Tensor] = []

    def step(_batches: Any, model: torch.nn.Module) -> Any:
        output = model(batch.input_ids, batch.position_ids, None, packed_seq_params=batch.sequences)

        def keep(logits: torch.Tensor) -> Any:
            kept.append(logits)
            return torch.zeros(()), {}

        return output, keep

    num_microbatches = parallel_state.get_pipeline_model_parallel_world_size()
    get_forward_backward_func()(
        forward_step_func=step,
        data_iterator=[iter([]) for _ in chunks],
        model=chunks,
        num_microbatches=num_microbatches,
        seq_length=batch.input_ids.numel(),
        micro_batch_size=1,
        forward_only=True,
    )
    if not kept:
        return None
    logits = gather_from_tensor_model_parallel_region(kept[0])
    return logits[0, : sum(LENGTHS), : architecture.vocab_size].clone()
