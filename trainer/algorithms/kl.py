"""Estimators of KL(policy || other) from one sample per token (Schulman 2020), with d = log policy - log other.

Their expectations under the policy agree (k2's only nearly); their gradients do not. In expectation over tokens drawn
from the policy, by where they are used (the tests compute each exactly):

| | term of the loss | of the loss, times the detached ratio | of the loss, times the ratio | in the reward |
|---|---|---|---|---|
| k1 | 0 | 0 | KL(policy, other) | KL(policy, other) |
| k2 | KL(policy, other) | KL(policy, other), off-policy too | that of E[d^2 / 2] | that of E[d^2 / 2] less k2's own |
| k3 | KL(other, policy) | KL(other, policy) | KL(policy, other) | KL(policy, other) - KL(other, policy) |

The ratio is policy / behavior, not policy / proximal: the tokens were drawn by the sampler.
"""

from __future__ import annotations

import torch

from polyturn.configs.schema.objective import KLInLoss
from polyturn.trainer.algorithms.registry import KL_ESTIMATORS
from polyturn.trainer.algorithms.tokens import MAX_LOG_RATIO, TokenBatch, bounded_exp, log_ratio


@KL_ESTIMATORS.register(
    "k1",
    paper="Schulman 2020",
    formula="d",
    gradients={
        "loss": "zero",
        "loss_times_detached_ratio": "zero",
        "loss_times_ratio": "reverse_kl",
        "reward": "reverse_kl",
    },
)
def k1(logprobs: torch.Tensor, other: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """d: unbiased, of any sign."""
    return log_ratio(logprobs, other, mask)


@KL_ESTIMATORS.register(
    "k2",
    paper="Schulman 2020",
    formula="d^2 / 2",
    gradients={
        "loss": "reverse_kl",
        "loss_times_detached_ratio": "reverse_kl",
        "loss_times_ratio": "biased",
        "reward": "biased",
    },
)
def k2(logprobs: torch.Tensor, other: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """d^2 / 2. Nothing is clamped: the further a token drifted, the harder it is pulled back."""
    return log_ratio(logprobs, other, mask).square() / 2


@KL_ESTIMATORS.register(
    "k3",
    paper="Schulman 2020",
    formula="exp(-d) - 1 + d",
    gradients={
        "loss": "forward_kl",
        "loss_times_detached_ratio": "forward_kl",
        "loss_times_ratio": "reverse_kl",
        "reward": "reverse_minus_forward_kl",
    },
)
def k3(logprobs: torch.Tensor, other: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """exp(-d) - 1 + d: unbiased and never negative.

    Its value is not clamped, which would take the gradient from the tokens that drifted most; where -d is beyond
    MAX_LOG_RATIO, the exponential goes on as its tangent.
    """
    difference = log_ratio(logprobs, other, mask)
    within = (-difference).clamp(max=MAX_LOG_RATIO)
    beyond = -difference - within
    return torch.expm1(within) + beyond * within.detach().exp() + difference


def kl_penalty(batch: TokenBatch, config: KLInLoss) -> torch.Tensor:
    """The penalty of each token, [N], without its coefficient; 0 where the mask is."""
    anchors = {
        "reference": batch.reference_logprobs,
        "proximal": batch.proximal_logprobs,
        "behavior": batch.behavior_logprobs,
        "teacher": batch.teacher_logprobs,
    }
    anchor = anchors[config.anchor]
    assert anchor is not None, f"a KL penalty to the {config.anchor} needs {config.anchor} logprobs"
    values: torch.Tensor = KL_ESTIMATORS[config.estimator].function(
        batch.logprobs, anchor.detach(), batch.mask
    )
    if config.ratio == "none":
        return values
    ratio = bounded_exp(log_ratio(batch.logprobs, batch.behavior_logprobs.detach(), batch.mask))
    return values * (ratio.detach() if config.ratio == "detached" else ratio)
