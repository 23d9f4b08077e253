"""What can be known to be wrong with the models of a run: policy, reference, critic, adapters and their memory.

Nothing here reads a weight.
"""

from __future__ import annotations

import fnmatch
import importlib.util
from pathlib import Path

from polyturn.configs.errors import ConfigError, as_config_error
from polyturn.configs.loading.sglang_options import attention_parts, expert_parts
from polyturn.configs.models import PRESET, read_json, resolve_model_path
from polyturn.configs.schema.run import RunConfig
from polyturn.configs.sizing.fit import Capacity, judge, named_capacity
from polyturn.configs.sizing.hardware import host_memory
from polyturn.configs.sizing.model_shape import ModelShape
from polyturn.trainer.models.families import find_family, same_computation
from polyturn.trainer.models.quantization import (
    EngineRanks,
    check_engine_blocks,
    check_scales,
    find_quantised,
)
from polyturn.trainer.models.weight_files import OUTPUT, check_tensors, expected_tensors, read_weight_files


def check_family(directory: Path, key: str = "model.path") -> None:
    """That the trainer knows the model, as far as its config tells. Raises ConfigError."""
    try:
        find_family(read_json(directory / "config.json"))
    except ValueError as error:
        sentence = str(error).removeprefix("model.path: ")
        raise ConfigError(f"{key}: {sentence}") from error


def check_no_decay(config: RunConfig, directory: Path) -> None:
    """That every pattern of parameters that do not decay fits one, as Megatron-core names them. Raises ConfigError."""
    if config.trainer.lora is not None or not config.trainer.optimizer.no_decay:
        return
    family, shape = find_family(read_json(directory / "config.json")), ModelShape.read(directory)
    experts = [str(number) for number in range(shape.experts.num_experts)] if shape.experts else []
    names = []
    for row, mapped in family.rows.items():
        layers = (
            [f"decoder.layers.{layer}." for layer in range(shape.num_layers)]
            if "{layer}" in mapped.hf_names[0]
            else [""]
        )
        names += [
            f"module.{layer}{row}{number}"
            for layer in layers
            for number in (experts if mapped.is_expert else [""])
        ]
    for pattern in config.trainer.optimizer.no_decay:
        # However often the model is wrapped, its names begin with as many of these.
        if not any(
            fnmatch.filter([depth * "module." + name for name in names], pattern) for depth in range(3)
        ):
            raise ConfigError(
                f"trainer.optimizer.no_decay: '{pattern}' fits no parameter; there are, for example, {names[0]} and "
                f"{names[-1]}"
            )


def check_loadable(directory: Path, key: str, *, without: tuple[str, ...] = ()) -> None:
    """That the trainer can load a model directory, as far as its config and the headers of its weights tell.

    Args:
        key: of the option that names it, for messages.
        without: tensors that may be missing.

    Raises ConfigError.
    """
    check_family(directory, key)
    try:
        stored = read_weight_files(directory)
        check_tensors(stored, ModelShape.read(directory), source=directory, without=without)
        check_scales(stored, read_json(directory / "config.json"), source=directory)
    except ValueError as error:
        sentence = str(error).removeprefix("model.path: ")
        raise ConfigError(f"{key}: {sentence}") from error


def check_fp8_engines(config: RunConfig, shape: ModelShape) -> None:
    """That engines can divide the model's FP8 matrices among their ranks. Raises ConfigError."""
    if config.weight_sync.dtype != "fp8_block":
        return
    # What is true of one expert is true of all.
    shapes = {
        name: size
        for name, size in expected_tensors(shape)
        if ".experts." not in name or ".experts.0." in name
    }
    with as_config_error("weight_sync.dtype: fp8_block: "):
        check_engine_blocks(
            shapes,
            find_quantised(shapes),
            ranks=_engine_ranks(config, has_experts=shape.experts is not None),
            num_kv_heads=shape.num_kv_heads,
        )


REPLICATED_SHARED_EXPERTS = ("deepep", "mooncake", "nixl", "mori", "ascend_fuseep", "flashinfer")
"""Values of sglang.moe_a2a_backend with which every rank has a layer's shared expert whole, as SGLang 0.5.23 has it in
`glm4_moe.py` and `deepseek_v2.py`."""


def _engine_ranks(config: RunConfig, *, has_experts: bool) -> EngineRanks:
    """Over how many ranks SGLang divides what, by the section `sglang`."""
    ranks, section = config.engines.tensor_parallel, config.sglang
    is_replicated = section.get("moe_a2a_backend") in REPLICATED_SHARED_EXPERTS
    is_dense_whole = has_experts and section.get("moe_dense_tp_size") == 1
    return EngineRanks(
        attention=max(1, ranks // attention_parts(section)),
        experts=max(1, ranks // expert_parts(section)),
        shared_experts=1 if is_replicated else ranks,
        dense=1 if is_dense_whole else ranks,
    )


def check_rounding(config: RunConfig) -> list[str]:
    """A sentence where the engines sample from rounded weights and nothing in training makes up for it."""
    if config.weight_sync.dtype == "same" or all(
        algorithm.corrections or getattr(algorithm.loss, "anchor", None) == "behavior"
        for algorithm in (config.algorithm, *config.own_algorithms.values())
    ):
        return []
    return [
        f"weight_sync.dtype: {config.weight_sync.dtype}: the engines sample from weights rounded to FP8, and nothing "
        "in the loss makes up for it; add a correction (trainer.algorithm.corrections: [{kind: truncated_importance}]) "
        "or take trainer.algorithm.loss.anchor=behavior"
    ]


def check_shared_prefix(config: RunConfig) -> None:
    if config.trainer.shared_prefix != "tree":
        return
    if config.megatron.get("apply_rope_fusion"):
        raise ConfigError(
            "trainer.shared_prefix=tree follows the positions of a tree, and megatron.apply_rope_fusion counts from 0; "
            "turn one off"
        )
    if config.trainer.device == "cuda" and importlib.util.find_spec("transformer_engine") is not None:
        raise ConfigError(
            "trainer.shared_prefix=tree needs the attention of the torch layers, and with Transformer Engine installed "
            "its own is used; set it to group, which computes samples one by one"
        )


def check_routing_replay(config: RunConfig, shape: ModelShape) -> None:
    if config.engines.routing_replay and shape.experts is None:
        raise ConfigError("engines.routing_replay: the model has no experts; set it to false")


def check_sampling(config: RunConfig, shape: ModelShape) -> list[str]:
    """Sentences about tokens that are left out although nobody asked for it.

    Raises ConfigError for engines that do not tell what a token was drawn from.
    """
    sampling = config.rollout.sampling
    if sampling.is_restricted and config.sglang.get("speculative_algorithm") is not None:
        raise ConfigError(
            "rollout.sampling: engines that decode speculatively do not record what top_p, top_k and min_p leave of "
            "the vocabulary, and the trainer scores over that; unset sglang.speculative_algorithm, or sample from all"
        )
    if not sampling.cuts_off(shape.vocab_size):
        return []
    top_k = sampling.finite_top_k(shape.vocab_size)
    return [
        f"rollout.sampling: engines record what a token was drawn from only under a top_k, so that is {top_k:,} of the "
        f"{shape.vocab_size:,} tokens, and what is less likely is never sampled; the trainer scores over what was "
        "left, so ratios are exact. Set rollout.sampling.top_k to choose the number"
    ]


def check_reference(config: RunConfig, directory: Path) -> None:
    trainer, path = config.trainer, config.model.reference_path
    refresh = trainer.refresh_reference_every_steps
    if not trainer.needs_reference:
        for key, given in (
            ("model.reference_path", path),
            ("trainer.refresh_reference_every_steps", refresh),
        ):
            if given:
                raise ConfigError(
                    f"{key} is set, but nothing compares with a reference; set trainer.algorithm.kl"
                )
    if refresh and trainer.lora is not None:
        raise ConfigError(
            "trainer.refresh_reference_every_steps: with trainer.lora the reference is the model without adapters, "
            "which stays what it is; set it to 0"
        )
    if path is not None:
        source = resolve_model_path(path, key="model.reference_path")
        ours, theirs = read_json(directory / "config.json"), read_json(source / "config.json")
        with as_config_error():
            same_computation(ours, theirs, source=source, what="model.reference_path")
        check_loadable(source, "model.reference_path")


def check_critic(config: RunConfig, directory: Path) -> None:
    trainer = config.trainer
    if not trainer.uses_critic:
        return
    critic = trainer.critic
    parallel = critic.parallel if trainer.critic_has_ranks else trainer.parallel
    where = "trainer.critic.parallel" if trainer.critic_has_ranks else "trainer.parallel"
    if critic.path is not None:
        check_loadable(
            resolve_model_path(critic.path, key="trainer.critic.path"),
            "trainer.critic.path",
            without=(OUTPUT,),
        )
    shape = ModelShape.read(
        directory if critic.path is None else resolve_model_path(critic.path, key="trainer.critic.path")
    )
    fault = shape.explain_heads(parallel.tensor)
    if fault is not None:
        raise ConfigError(f"the critic's {where}.tensor is {parallel.tensor}, which {fault}")
    if trainer.global_batch_size < parallel.data:
        raise ConfigError(
            f"trainer.global_batch_size is {trainer.global_batch_size}, less than one episode for each of the "
            f"{where}.data={parallel.data} ranks; lower {where}.data"
        )


def check_memory(config: RunConfig, shape: ModelShape) -> None:
    """Compare the estimate with what there is.

    Raises:
        ConfigError: something cannot fit; a sentence for each, with what would.
    """
    misfits, _ = judge(config, shape, capacity_of(config), critic_shape(config))
    if misfits:
        raise ConfigError("\n".join(f"memory: {sentence}" for sentence in misfits))


def capacity_of(config: RunConfig) -> Capacity:
    """Of the GPU that `cluster.gpu` names, else of this machine's, else of the largest there is; and of this host.

    A preset is planned for another machine, and a cluster that is joined has several hosts: then nothing is known of
    the memory of hosts.
    """
    elsewhere = config.model.path.startswith(PRESET) or config.cluster.address is not None
    host = None if elsewhere else host_memory()
    local = None if elsewhere or config.cluster.gpu is not None else _local_gpu(config)
    if local is not None:
        return Capacity(gpu=local[1], gpu_name=local[0], host=host)
    named = named_capacity(config)
    uses_gpus = "cuda" in (config.trainer.device, config.engines.device)
    return Capacity(gpu=named.gpu if uses_gpus else None, gpu_name=named.gpu_name, host=host)


def critic_shape(config: RunConfig) -> ModelShape | None:
    """The shape of the critic's model, where that is not the policy's."""
    critic = config.trainer.critic
    if not config.trainer.uses_critic or critic.path is None:
        return None
    return ModelShape.read(resolve_model_path(critic.path, key="trainer.critic.path", needs_weights=False))


def _local_gpu(config: RunConfig) -> tuple[str, int] | None:
    """Name and bytes of the smallest GPU of this machine; None where there is none, or none is asked for."""
    if "cuda" not in (config.trainer.device, config.engines.device):
        return None
    if importlib.util.find_spec("torch") is None:
        return None
    import torch

    found = [torch.cuda.get_device_properties(index) for index in range(torch.cuda.device_count())]
    if not found:
        return None
    smallest = min(found, key=lambda properties: properties.total_memory)
    return f"this machine's {smallest.name}", int(smallest.total_memory)


ADAPTER_FAMILIES = ("llama", "qwen2", "qwen3")
"""By `model_type`: those whose linear layers SGLang gives adapters under the names that the trainer has for them."""


def check_weight_sync(config: RunConfig, directory: Path) -> None:
    """Whether the way of weight sync suits the rest of the config. `directory`: of the model."""
    kind = config.weight_sync.kind
    if kind == "adapter":
        if config.trainer.lora is None:
            raise ConfigError(
                "weight_sync.kind adapter sends LoRA's adapters: set trainer.lora, or another kind"
            )
        if config.checks.compares_weights:
            raise ConfigError(
                "checks.weights_equal compares weights that were sent, and weight_sync.kind adapter sends none of "
                "those that engines can sum up: set checks.weights_equal=false; "
                "checks.max_logprob_difference compares what both sides compute"
            )
        family = read_json(directory / "config.json").get("model_type")
        if family not in ADAPTER_FAMILIES:
            raise ConfigError(
                f"weight_sync.kind adapter is for models of {', '.join(ADAPTER_FAMILIES)}, not {family}: have the "
                "merged weights sent by another kind"
            )
    if kind == "tensors" and config.trainer.device == "cuda" and config.engines.placement != "shared":
        raise ConfigError(
            "weight_sync.kind tensors is for engines on the trainer's own GPUs: set engines.placement=shared, or "
            "another kind"
        )
