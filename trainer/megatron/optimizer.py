"""Megatron-core's distributed AdamW for a model, one step of it, and the schedule of its learning rate.

Where neither Transformer Engine nor Apex is installed, on torch's own kernels with the state of their FusedAdam.
"""

from __future__ import annotations

import fnmatch
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Self

import megatron.core.optimizer as megatron_optimizer
import megatron.core.optimizer.distrib_optimizer as distributed
import torch
import torch.distributed as dist
from megatron.core.optimizer import OptimizerConfig as MegatronOptimizerConfig
from megatron.core.optimizer import ParamKey, get_megatron_optimizer, get_standard_config_overrides
from megatron.core.optimizer.clip_grads import clip_grad_by_total_norm_fp32
from megatron.core.optimizer_param_scheduler import ParamGroupOverride
from megatron.core.transformer.transformer_config import TransformerConfig
from torch.optim.adam import adam
from torch.optim.adamw import adamw

from polyturn.configs.schema.trainer import ConstantSchedule, OptimizerConfig, StableDecaySchedule


class FusedLayoutAdam(torch.optim.Optimizer):
    """AdamW (arXiv 1711.05101), or Adam with `adam_w_mode=False`."""

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        adam_w_mode: bool = True,
    ) -> None:
        self.adam_w_mode = adam_w_mode
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """One update of every parameter that has a gradient."""
        assert closure is None
        for group in self.param_groups:
            group["step"] = int(group.get("step", 0)) + 1
            params = [param for param in group["params"] if param.grad is not None]
            if not params:
                continue
            for param in params:
                state = self.state[param]
                if "exp_avg" not in state:
                    state["exp_avg"] = torch.zeros_like(param)
                    state["exp_avg_sq"] = torch.zeros_like(param)
            beta1, beta2 = group["betas"]
            device = params[0].device
            steps = [torch.tensor(group["step"] - 1.0, device=device) for _ in params]
            (adamw if self.adam_w_mode else adam)(
                params,
                [param.grad for param in params],
                [self.state[param]["exp_avg"] for param in params],
                [self.state[param]["exp_avg_sq"] for param in params],
                [],
                steps,
                fused=True,
                amsgrad=False,
                beta1=beta1,
                beta2=beta2,
                lr=group["lr"],
                weight_decay=group["weight_decay"],
                eps=group["eps"],
                maximize=False,
            )


def use_fused_layout_adam() -> None:
    """Make Megatron-core's optimizer build this AdamW where neither Transformer Engine nor Apex is installed."""
    if megatron_optimizer.USING_PYTORCH_OPTIMIZER:
        megatron_optimizer.Adam, megatron_optimizer.USING_PYTORCH_OPTIMIZER = FusedLayoutAdam, False
        distributed.Adam, distributed.HAVE_APEX_OR_TE, distributed.USING_APEX_OPTIMIZER = (
            FusedLayoutAdam,
            True,
            True,
        )


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


@dataclass(frozen=True, kw_only=True, slots=True)
class LearningRateSchedule:
    """Linear warm-up to the peak over the first updates, then constant or down to a fraction of it."""

    peak: float
    warmup_updates: int = 0
    kind: Literal["constant", "cosine", "linear", "wsd"] = "constant"
    num_updates: int | None = None
    """The update at which the way down ends; the rate stays there. Only constant needs none."""
    final_fraction: float = 0.1
    """Where it ends, as a fraction of the peak."""
    decay_fraction: float = 0.2
    """Of wsd: the part of all updates that the way down takes."""

    def __post_init__(self) -> None:
        assert self.kind == "constant" or self.num_updates is not None, f"a {self.kind} schedule has an end"

    @classmethod
    def from_config(cls, config: OptimizerConfig, *, num_updates: int | None) -> Self:
        """The schedule of a run of `num_updates` updates; None: it has no end.

        Raises:
            ValueError: the schedule needs an end, and neither it nor the run has one.
        """
        peak, warmup = config.learning_rate, config.warmup_updates
        schedule = config.schedule
        if isinstance(schedule, ConstantSchedule):
            return cls(peak=peak, warmup_updates=warmup)
        end = schedule.num_updates or num_updates
        if end is None:
            raise ValueError(
                f"trainer.optimizer.schedule.num_updates must be set: a {schedule.kind} schedule has an end"
            )
        return cls(
            peak=peak,
            warmup_updates=warmup,
            kind=schedule.kind,
            num_updates=end,
            final_fraction=schedule.final_fraction,
            decay_fraction=schedule.decay_fraction if isinstance(schedule, StableDecaySchedule) else 0.2,
        )

    def __call__(self, update: int) -> float:
        """The rate of update number `update`, counted from 0."""
        if update < self.warmup_updates:
            return self.peak * (update + 1) / self.warmup_updates
        if self.num_updates is None:
            return self.peak
        start = self.warmup_updates
        if self.kind == "wsd":
            start = max(start, self.num_updates - round(self.decay_fraction * self.num_updates))
        progress = min(max(update - start, 0) / max(self.num_updates - start, 1), 1.0)
        left = (1 + math.cos(math.pi * progress)) / 2 if self.kind == "cosine" else 1 - progress
        return self.peak * (self.final_fraction + (1 - self.final_fraction) * left)
