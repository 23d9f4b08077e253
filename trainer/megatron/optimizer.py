"""Megatron-core's distributed AdamW for a model, and one step of it.

Import only after `install_cpu_compatibility`.
"""

from __future__ import annotations

import fnmatch
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.optimizer import OptimizerConfig as MegatronOptimizerConfig
from megatron.core.optimizer import ParamKey, get_megatron_optimizer, get_standard_config_overrides
from megatron.core.optimizer.clip_grads import clip_grad_by_total_norm_fp32
from megatron.core.optimizer_param_scheduler import ParamGroupOverride
from megatron.core.transformer.transformer_config import TransformerConfig

from polyturn.configs.schema.trainer import OptimizerConfig
from polyturn.trainer.megatron.adam import use_fused_layout_adam


def make_optimizer(
    chunks: Sequence[torch.nn.Module],
    model_config: TransformerConfig,
    config: OptimizerConfig,
    *,
    extra: Mapping[str, Any],
) -> Any:
    """The optimizer of this rank's chunks of a model, which Megatron-core's DistributedDataParallel wraps.

    In bfloat16 its float32 weights are taken from the model's, so those must be loaded before. Collective.

    Args:
        extra: the user's further fields of Megatron-core's OptimizerConfig.

    Raises:
        ValueError: this machine cannot run what is asked for, or a pattern fits no parameter.
    """
    use_fused_layout_adam()
    try:
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
            **extra,
        )
    except (AssertionError, RuntimeError) as error:
        # What upstream says of fields that do not go together, or of packages that are missing.
        raise ValueError(f"megatron.optimizer: {error}") from error
    optimizer = get_megatron_optimizer(
        settings,
        list(chunks),
        config_overrides=_decay_overrides(chunks, settings, config),
        use_gloo_process_groups=False,
    )
    for group in optimizer.param_groups:
        group["weight_decay"] = config.weight_decay * group.get("wd_mult", 1.0)
    return optimizer


def _decay_overrides(
    chunks: Sequence[torch.nn.Module], settings: MegatronOptimizerConfig, config: OptimizerConfig
) -> dict[ParamKey, ParamGroupOverride]:
    """Which parameters do not decay: norms and biases, and what the user's patterns fit."""
    overrides = {} if config.decay_vectors else get_standard_config_overrides(settings)
    if not config.no_decay:
        return overrides
    names = [name for chunk in chunks for name, _ in chunk.named_parameters()]
    fits = torch.tensor([float(bool(fnmatch.filter(names, pattern))) for pattern in config.no_decay])
    fits = fits.to(next(chunks[0].parameters()).device)
    # A pattern may mean parameters of another pipeline stage.
    dist.all_reduce(fits, dist.ReduceOp.MAX)
    for pattern, fit in zip(config.no_decay, fits.tolist(), strict=True):
        if not fit:
            raise ValueError(
                f"trainer.optimizer.no_decay: '{pattern}' fits no parameter; there are, for example, {names[0]} and "
                f"{names[-1]}"
            )
    overrides[ParamKey(name=tuple(config.no_decay))] = ParamGroupOverride(wd_mult=0.0)
    return overrides


@dataclass(frozen=True, kw_only=True, slots=True)
class StepOutcome:
    """What a step of the optimizer came to."""

    grad_norm: float
    """The gradient's global norm before it was clipped."""
    skipped: bool
    """The gradient had exploded: weights and optimizer are as they were."""


@torch.no_grad()
def step(optimizer: Any, config: OptimizerConfig, *, learning_rate: float) -> StepOutcome:
    """Clip the gradient that the buffers hold and update the weights, unless it has exploded. Collective.

    Megatron-core's own `step` updates the weights before anybody has seen the norm.

    Raises:
        FloatingPointError: the gradient has exploded, and the config says stop.
    """
    for group in optimizer.param_groups:
        group["lr"] = learning_rate * group.get("lr_mult", 1.0)
    optimizer.prepare_grads()
    grad_norm = float(optimizer.get_grad_norm())
    fault = _find_explosion(grad_norm, config.max_grad_norm)
    if fault is not None:
        if config.on_exploding == "stop":
            raise FloatingPointError(fault)
        return StepOutcome(grad_norm=grad_norm, skipped=True)
    for part in optimizer.chained_optimizers:
        params = [] if part.is_stub_optimizer else part.get_parameters()
        if params:
            clip_grad_by_total_norm_fp32(
                params,
                max_norm=config.clip_grad,
                total_norm=grad_norm,
                use_decoupled_grad=part.config.use_precision_aware_optimizer_no_fp8_or_ds_fp8,
            )
    optimizer.step_with_ready_grads()
    return StepOutcome(grad_norm=grad_norm, skipped=False)


def _find_explosion(grad_norm: float, limit: float | None) -> str | None:
    if not math.isfinite(grad_norm):
        return f"the gradient norm is {grad_norm}, though every trainable token is finite"
    if limit is not None and grad_norm > limit:
        return f"the gradient norm is {grad_norm:g}, larger than trainer.optimizer.max_grad_norm={limit:g}"
    return None
