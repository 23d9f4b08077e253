"""What is done about a policy's entropy: about the tokens that take most of it, once a step over all tokens, and about
the weight of the entropy bonus, from update to update.

The change of the entropy in a step is about minus the covariance of log p and the advantage, token by token
(arXiv 2505.22617, theorem 1): few tokens, likely ones with a large advantage, make nearly all of it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Self

import torch

from polyturn.configs.schema.algorithm import EntropyTarget
from polyturn.configs.schema.objective import ClipCov, KLCov
from polyturn.trainer.algorithms.protocols import TokenControl
from polyturn.trainer.algorithms.registry import ENTROPY_CONTROLS


@dataclass(frozen=True, kw_only=True, slots=True)
class EntropyBonus:
    """The weight of the entropy bonus of the next update, where it follows a target."""

    level: float
    """What goes up and down, never below 0."""
    coefficient: float
    """What the next update uses: `level`, or 0 while the entropy is above the target."""

    @classmethod
    def first(cls, coefficient: float) -> Self:
        """Before the first update, whose entropy nobody knows."""
        return cls(level=coefficient, coefficient=coefficient)

    def after(self, entropy: float, target: EntropyTarget) -> Self:
        """c' = c + step where the update's entropy e is below the target, c - step where it is above; the coefficient
        c' 1[e <= target] (Skywork-OR1, arXiv 2505.22312, section 4), here of the next update: an update's own entropy
        is known once it is done.
        """
        change = (
            target.step if entropy < target.entropy else -target.step if entropy > target.entropy else 0.0
        )
        level = min(max(self.level + change, 0.0), target.most)
        return type(self)(level=level, coefficient=level if entropy <= target.entropy else 0.0)


def covariances(logprobs: torch.Tensor, advantages: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """(log p - mean log p) (A - mean A) over all trainable tokens of the step, [N] (arXiv 2505.22617, section
    4); 0 where the mask is False.

    Raises:
        ValueError: a logprob or an advantage of a trainable token is not finite.
    """
    found = torch.zeros_like(logprobs)
    if not mask.any():
        return found
    kept, worth = logprobs[mask], advantages[mask]
    if not bool((kept.isfinite() & worth.isfinite()).all()):
        raise ValueError("the covariance of a token whose logprob or advantage is not finite is asked for")
    found[mask] = (kept - kept.mean()) * (worth - worth.mean())
    return found


def num_chosen(fraction: float, mask: torch.Tensor) -> int:
    """The share of the step's N trainable tokens, at least one where there are any."""
    total = int(mask.sum())
    return min(max(int(fraction * total), 1), total)


@ENTROPY_CONTROLS.register(
    "clip_cov",
    config=ClipCov,
    paper="2505.22617",
    formula="no policy loss at fraction N tokens drawn among low <= (log p - mean log p)(A - mean A) <= high",
    example={"fraction": 0.2, "low": -0.3, "high": 2.0},
)
def clip_cov(
    logprobs: torch.Tensor, advantages: torch.Tensor, mask: torch.Tensor, config: ClipCov
) -> TokenControl:
    """0 in place of 1 at tokens drawn evenly among those whose covariance is between low and high.

    The draw goes by the bits of a token's own numbers: the same step draws the same tokens, in any order of its
    samples.
    """
    found = covariances(logprobs, advantages, mask)
    candidates = (mask & (found >= config.low) & (found <= config.high)).nonzero().flatten()
    drawn = _draw_keys(logprobs[candidates], advantages[candidates]).argsort(stable=True)
    chosen = candidates[drawn[: num_chosen(config.fraction, mask)]]
    weights = mask.to(logprobs.dtype)
    weights[chosen] = 0.0
    return TokenControl(
        weights=weights,
        kl_weights=torch.zeros_like(weights),
        metrics={
            "chosen_tokens": float(len(chosen)),
            "candidates": float(len(candidates)),
            "covariance": float(found.sum()) / max(int(mask.sum()), 1),
        },
    )


def _draw_keys(logprobs: torch.Tensor, advantages: torch.Tensor) -> torch.Tensor:
    """int64 [N] that look random, by splitmix64 of both numbers' bits."""
    bits = logprobs.double().view(torch.int64) * 31 + advantages.double().view(torch.int64)
    bits = (bits ^ (bits >> 30)) * -0x40A7B892E31B1A47
    bits = (bits ^ (bits >> 27)) * -0x6B2FB644ECCEEE15
    return bits ^ (bits >> 31)


@ENTROPY_CONTROLS.register(
    "kl_cov",
    config=KLCov,
    paper="2505.22617",
    formula="+ coefficient |log p - log proximal| at the fraction N tokens of largest (log p - mean log p)(A - mean A)",
    example={"fraction": 0.2},
)
def kl_cov(
    logprobs: torch.Tensor, advantages: torch.Tensor, mask: torch.Tensor, config: KLCov
) -> TokenControl:
    """A penalty at the tokens whose covariance ranks highest; the policy loss stays.

    The penalty is the authors' implementation's |log p - log proximal|: it has no gradient at the start of a step, and
    pulls back with constant strength what has moved.
    """
    found = covariances(logprobs, advantages, mask)
    ranked = torch.where(mask, found, -torch.inf).argsort(descending=True, stable=True)
    chosen = ranked[: num_chosen(config.fraction, mask)]
    weights = mask.to(logprobs.dtype)
    kl_weights = torch.zeros_like(weights)
    kl_weights[chosen] = config.coefficient
    return TokenControl(
        weights=weights,
        kl_weights=kl_weights,
        metrics={
            "chosen_tokens": float(len(chosen)),
            "covariance": float(found.sum()) / max(int(mask.sum()), 1),
        },
    )
