"""Other trust regions than PPO's: a soft gate, and a bound on probabilities in place of ratios."""

from __future__ import annotations

import torch

from polyturn.configs.schema.objective import DPPOLoss, SAPOLoss
from polyturn.trainer.algorithms.losses.anchors import log_ratios, masked_advantages, token_ratios
from polyturn.trainer.algorithms.ratios import bounded_exp, is_beyond_bound
from polyturn.trainer.algorithms.registry import POLICY_LOSSES
from polyturn.trainer.algorithms.tokens import TokenBatch, TokenLoss


@POLICY_LOSSES.register(
    "sapo",
    config=SAPOLoss,
    paper="2511.20347",
    formula="-(4 / T) sigmoid(T (r - 1)) A, T by the sign of A",
    gradients={"loss": "on_policy_gradient"},
)
def sapo_loss(batch: TokenBatch, config: SAPOLoss) -> TokenLoss:
    """-(4 / T) sigmoid(T (r - 1)) A with T by the sign of A (arXiv 2511.20347, eqs. 5 and 6). Nothing is clipped.

    The factor makes the gradient at r = 1 that of the surrogate without a bound.
    """
    advantages = masked_advantages(batch)
    ratios = token_ratios(batch, config.anchor)
    temperature = torch.full_like(ratios, config.temperature_negative).masked_fill(
        advantages > 0, config.temperature_positive
    )
    gate = 4 / temperature * torch.sigmoid(temperature * (ratios - 1))
    return TokenLoss(values=-gate * advantages, clipped=torch.zeros_like(batch.mask))


@POLICY_LOSSES.register(
    "dppo",
    config=DPPOLoss,
    paper="2602.04879",
    formula="-1[D inside] r A + drift_penalty (log r)^2, D = p - p_anchor or the KL of two-way distributions",
    gradients={"loss": "on_policy_gradient"},
)
def dppo_loss(batch: TokenBatch, config: DPPOLoss) -> TokenLoss:
    """-r A of the tokens whose probability has not yet moved too far the way that A pushes it, and a pull back.

    DPPO (arXiv 2602.04879), with its binary approximations: total variation |p - p_anchor|, or
    KL(anchor || policy) of the two-way distribution (p, 1 - p). A ratio says little of how far a policy has moved: a
    token from 1e-6 to 1e-5 has one of 10, one from 0.5 to 0.9 has 1.8. The pull (log r)^2 is prime-rl's.
    """
    logs = log_ratios(batch, config.anchor)
    advantages = masked_advantages(batch)
    now = torch.where(batch.mask, batch.logprobs, 0.0).detach().exp()
    before = (torch.where(batch.mask, batch.logprobs, 0.0) - logs).detach().exp()
    if config.divergence == "total_variation":
        distance = (now - before).abs()
    else:
        distance = _two_way_kl(before, now)
    too_high = (advantages > 0) & (now > before) & (distance > config.threshold_high)
    too_low = (advantages < 0) & (now < before) & (distance > config.threshold_low)
    outside = (too_high | too_low) & batch.mask
    values = torch.where(outside, 0.0, -bounded_exp(logs) * advantages) + config.drift_penalty * logs.square()
    return TokenLoss(values=values, clipped=outside | is_beyond_bound(logs, batch.mask))


def _two_way_kl(before: torch.Tensor, now: torch.Tensor) -> torch.Tensor:
    """KL((q, 1 - q) || (p, 1 - p)) of probabilities q and p, kept off 0 and 1 by the smallest step of their type."""
    tiny = torch.finfo(now.dtype).eps
    q, p = before.clamp(tiny, 1 - tiny), now.clamp(tiny, 1 - tiny)
    return q * (q / p).log() + (1 - q) * ((1 - q) / (1 - p)).log()
