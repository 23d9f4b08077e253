"""The critic's loss, token by token. A reduction weighs and sums it like a policy loss."""

from __future__ import annotations

import torch

from polyturn.trainer.algorithms.tokens import TokenLoss


def value_loss(
    values: torch.Tensor,
    returns: torch.Tensor,
    mask: torch.Tensor,
    *,
    old_values: torch.Tensor | None = None,
    clip: float | None = None,
) -> TokenLoss:
    """PPO's clipped loss of a critic: 0.5 max((V - R)^2, (clip(V, V_old - c, V_old + c) - R)^2).

    As in PPO's reference implementation (arXiv 1707.06347; described in 2005.12729). The larger of the two keeps the
    critic from moving further than c from where it was in one step, unless that brings it nothing.

    Args:
        values: [N], of the critic as it is, with gradient.
        returns: [N], what it should have expected.
        mask: [N] bool, the trainable tokens; the others have loss 0 and no gradient, whatever stands there.
        old_values: [N], of the critic at the start of the step; only used with `clip`.
        clip: c; None: the plain squared error.
    """
    values = torch.where(mask, values, 0.0)
    returns = torch.where(mask, returns, 0.0).detach()
    errors = (values - returns).square()
    if clip is None:
        return TokenLoss(values=0.5 * errors, clipped=torch.zeros_like(mask))
    assert old_values is not None, "to clip the change of values, the old ones are needed"
    old = torch.where(mask, old_values, 0.0).detach()
    bounded = old + (values - old).clamp(-clip, clip)
    bounded_errors = (bounded - returns).square()
    return TokenLoss(
        values=0.5 * torch.maximum(errors, bounded_errors),
        clipped=(bounded_errors > errors).detach() & mask,
    )
