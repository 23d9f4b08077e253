"""Adapters as a PEFT directory: `adapter_config.json` and `adapter_model.safetensors`.

Import only after `install_cpu_compatibility`.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from safetensors.torch import save

from polyturn.configs.schema.trainer import LoraConfig
from polyturn.configs.sizing.model_shape import num_experts
from polyturn.rollout.whole_file import whole_file
from polyturn.trainer.megatron.hf_directory import read_config
from polyturn.trainer.megatron.lora import adapters_of

WEIGHTS_NAME = "adapter_model.safetensors"
CONFIG_NAME = "adapter_config.json"
PREFIX = "base_model.model."
"""What PEFT puts before the names of the model's own modules."""


def named_adapter_tensors(models: Sequence[torch.nn.Module]) -> dict[str, torch.Tensor]:
    """Every A and B under PEFT's name, whole, on the CPU of every rank.

    Collective over tensor and pipeline parallelism. `models` are the parts of the model that this rank holds.
    """
    own: dict[str, torch.Tensor] = {}
    for model in models:
        for adapter in adapters_of(model):
            for name in adapter.targets:
                for letter, param in zip("AB", adapter.pair(name), strict=True):
                    own[f"{PREFIX}{name}.lora_{letter}.weight"] = _gather(param)
    size = parallel_state.get_pipeline_model_parallel_world_size()
    stages: list[dict[str, torch.Tensor]] = [own] * size
    if size > 1:
        dist.all_gather_object(stages, own, group=parallel_state.get_pipeline_model_parallel_group())
    return {name: tensor for stage in stages for name, tensor in stage.items()}


def _gather(param: Any) -> torch.Tensor:
    """The whole tensor of the tensor-parallel ranks' parts."""
    part: torch.Tensor = param.detach()
    size = parallel_state.get_tensor_model_parallel_world_size()
    if size > 1 and param.tensor_model_parallel:
        parts = [torch.empty_like(part) for _ in range(size)]
        dist.all_gather(parts, part.contiguous(), group=parallel_state.get_tensor_model_parallel_group())
        part = torch.cat(parts, param.partition_dim)
    return part.reshape(-1, part.size(-1)).cpu()


def _target_modules(names: Iterable[str], *, has_experts: bool) -> list[str]:
    """The modules with adapters: by the last parts of their names, or in a model with experts by their whole names.

    There `gate_proj` alone would also mean the routed experts', which have none. With transformers 5, PEFT 0.21 takes
    even the whole name of a shared expert's for the routed ones', and cannot read it.
    """
    modules = {name.removeprefix(PREFIX).rpartition(".lora_")[0] for name in names}
    return sorted(modules if has_experts else {name.rpartition(".")[2] for name in modules})


def save_adapter(
    directory: Path, tensors: dict[str, torch.Tensor], *, lora: LoraConfig, base_model: Path
) -> None:
    """Write what `peft.PeftModel.from_pretrained` reads, whole or not at all for each file."""
    directory.mkdir(parents=True, exist_ok=True)
    content = save({name: tensor.contiguous() for name, tensor in tensors.items()}, metadata={"format": "pt"})
    with whole_file(directory / WEIGHTS_NAME) as file:
        file.write(content)
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": str(base_model),
        "r": lora.rank,
        "lora_alpha": lora.alpha,
        "lora_dropout": 0.0,
        "target_modules": _target_modules(tensors, has_experts=num_experts(read_config(base_model)) > 0),
        "bias": "none",
        "fan_in_fan_out": False,
        "init_lora_weights": True,
        "use_rslora": False,
        "inference_mode": True,
    }
    with whole_file(directory / CONFIG_NAME) as file:
        file.write((json.dumps(config, indent=2) + "\n").encode())
