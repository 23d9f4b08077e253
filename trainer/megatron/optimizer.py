"""Megatron-core's distributed AdamW for a model.

Import only after `install_cpu_compatibility`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from megatron.core.optimizer import OptimizerConfig as MegatronOptimizerConfig
from megatron.core.optimizer import get_megatron_optimizer, get_standard_config_overrides
from megatron.core.transformer.transformer_config import TransformerConfig

from polyturn.configs.optimizer import OptimizerConfig
from polyturn.trainer.megatron.adam import use_fused_layout_adam


def make_optimizer(
    chunks: Sequence[torch.nn.Module], model_config: TransformerConfig, config: OptimizerConfig
) -> Any:
    """The optimizer of this rank's chunks of a model, which Megatron-core's DistributedDataParallel wraps.

    In bfloat16 its float32 weights are taken from the model's, so those must be loaded before.
    """
    use_fused_layout_adam()
    settings = MegatronOptimizerConfig(
        optimizer="adam",
        lr=config.learning_rate,
        weight_decay=config.weight_decay,
        adam_beta1=config.beta1,
        adam_beta2=config.beta2,
        adam_eps=config.epsilon,
        clip_grad=config.clip_grad,
        params_dtype=model_config.params_dtype,
        bf16=model_config.bf16,
        use_distributed_optimizer=True,
    )
    optimizer = get_megatron_optimizer(
        settings,
        list(chunks),
        config_overrides=get_standard_config_overrides(settings),
        use_gloo_process_groups=False,
    )
    for group in optimizer.param_groups:
        # Norms and biases do not decay.
        group["weight_decay"] = config.weight_decay * group.get("wd_mult", 1.0)
    return optimizer
