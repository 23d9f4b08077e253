"""AdamW whose state looks like the one of Transformer Engine's and Apex's FusedAdam, on torch's own kernels.

Megatron-core's distributed optimizer expects that layout (a step count per parameter group; per parameter only
`exp_avg` and `exp_avg_sq`), so with it the state means the same on machines with and without those packages.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch.optim.adam import adam
from torch.optim.adamw import adamw


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
    import megatron.core.optimizer as optimizer
    import megatron.core.optimizer.distrib_optimizer as distributed

    if optimizer.USING_PYTORCH_OPTIMIZER:
        optimizer.Adam, optimizer.USING_PYTORCH_OPTIMIZER = FusedLayoutAdam, False
        distributed.Adam, distributed.HAVE_APEX_OR_TE, distributed.USING_APEX_OPTIMIZER = (
            FusedLayoutAdam,
            True,
            True,
        )
