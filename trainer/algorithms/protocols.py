"""The functions that make up an algorithm: what they are given, and what they give back.

All are pure: they see tensors or rewards, never processes. The registered ones take their section of the config as a
further argument `config`; what is called here has it bound already (`plugins.bind`). A plug-in is a function with such
a signature and its options as further keyword arguments, or a class that is made with the options and whose objects are
called so.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from polyturn.envs.plugins import Signature

if TYPE_CHECKING:
    import torch

    from polyturn.trainer.algorithms.advantages import Advantages, RewardBatch, RewardPart
    from polyturn.trainer.algorithms.tokens import GlobalCounts, TokenBatch, TokenLoss


class PolicyLoss(Protocol):
    """From a micro-batch to the loss of each of its tokens."""

    def __call__(self, batch: TokenBatch) -> TokenLoss:
        """Tokens where the mask is False have value 0 and no gradient, whatever stands in their columns."""


class KLEstimator(Protocol):
    """From two log-probabilities of a sampled token to an estimate of KL(policy || other), token by token."""

    def __call__(self, logprobs: torch.Tensor, other: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """All of shape [N]. 0 where the mask is False; `logprobs` carries the gradient, if there is one."""


class Reducer(Protocol):
    """From a micro-batch and the counts of the whole update to the weight of each token in the loss."""

    def __call__(self, mask: torch.Tensor, batch: TokenBatch, counts: GlobalCounts) -> torch.Tensor:
        """Weights [N], 0 where the mask is False; the loss is the sum of weight times value over all micro-batches."""


class AdvantageEstimator(Protocol):
    """From the rewards of a whole step to what each of its tokens is worth."""

    def __call__(self, step: RewardBatch) -> Advantages:
        """Raises `ValueError` for a reward that is not finite."""


@dataclass(frozen=True, kw_only=True, slots=True)
class CorrectionWeights:
    """What a correction makes of the tokens of a step."""

    weights: torch.Tensor
    """[N], without gradient: the factor of each token's loss; 0 where it is rejected or the mask is False."""
    metrics: dict[str, float]
    """Figures of the step, such as the fraction that was rejected."""
    clipped: torch.Tensor | None = None
    """bool [N]: tokens whose weight was bounded; None where none can be."""


class Correction(Protocol):
    """From the log-probabilities under sampler and trainer to how much each token of a step counts."""

    def __call__(
        self,
        behavior: torch.Tensor,
        proximal: torch.Tensor,
        mask: torch.Tensor,
        sequence_index: torch.Tensor,
        advantages: torch.Tensor,
    ) -> CorrectionWeights:
        """All of shape [N], the tokens of the whole step; `sequence_index` says which sequence a token is of."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TokenControl:
    """What is done about tokens that take the policy's entropy."""

    weights: torch.Tensor
    """[N], without gradient: the factor of each token's policy loss; 0 where the mask is False."""
    kl_weights: torch.Tensor
    """[N], without gradient: of |log p - log proximal| of each token in the loss; 0 where the mask is False."""
    metrics: dict[str, float]
    """Figures of the step."""


class EntropyControl(Protocol):
    """From the logprobs at the step's start and the advantages of a whole step to what is done about each token."""

    def __call__(self, logprobs: torch.Tensor, advantages: torch.Tensor, mask: torch.Tensor) -> TokenControl:
        """All of shape [N], the tokens of the whole step."""


class RewardPostprocessor(Protocol):
    """From the rewards of a step to those that advantages are estimated from."""

    def __call__(self, rewards: Sequence[float], parts: Sequence[RewardPart]) -> Sequence[float]:
        """One reward for each part, in their order. `rewards` are those so far, after earlier steps of this kind."""


POLICY_LOSS = Signature(
    what="policy loss",
    arguments=("batch",),
    text="def loss(batch: TokenBatch, **options) -> TokenLoss",
)
ADVANTAGE = Signature(
    what="advantage",
    arguments=("step",),
    text="def advantage(step: RewardBatch, **options) -> Advantages",
)
CORRECTION = Signature(
    what="correction",
    arguments=("behavior", "proximal", "mask", "sequence_index", "advantages"),
    text="def correction(behavior, proximal, mask, sequence_index, advantages, **options) -> CorrectionWeights",
)
ENTROPY_CONTROL = Signature(
    what="entropy control",
    arguments=("logprobs", "advantages", "mask"),
    text="def control(logprobs, advantages, mask, **options) -> TokenControl",
)
REDUCER = Signature(
    what="reduction",
    arguments=("mask", "batch", "counts"),
    text="def reduction(mask: Tensor, batch: TokenBatch, counts: GlobalCounts, **options) -> Tensor",
)
KL_ESTIMATOR = Signature(
    what="KL estimator",
    arguments=("logprobs", "other", "mask"),
    text="def estimator(logprobs: Tensor, other: Tensor, mask: Tensor, **options) -> Tensor",
)
REWARD_POSTPROCESSOR = Signature(
    what="reward post-processing",
    arguments=("rewards", "parts"),
    text="def postprocess(rewards: Sequence[float], parts: Sequence[RewardPart], **options) -> Sequence[float]",
)
