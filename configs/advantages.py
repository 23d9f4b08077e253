"""How rewards become advantages: what is done to them first, and the estimators' sections."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal, Self

from pydantic import Field, NonNegativeFloat, PositiveFloat, PositiveInt, model_validator

from polyturn.configs.plugins import Plugin
from polyturn.configs.section import Section

Discount = Annotated[float, Field(ge=0, le=1)]


class AdvantageSection(Section):
    """What all estimators have in common."""

    needs_critic: ClassVar[bool] = False
    """Whether the estimator reads a critic's values."""
    takes_penalties: ClassVar[bool] = True
    """Whether a KL penalty may be part of the reward: not where rewards are divided by what they have in a group."""

    whiten: bool = False
    """Subtract the mean over the step's trainable tokens from the advantages, and divide by the standard deviation."""


class GroupedSection(AdvantageSection):
    """What the estimators have in common that compare within a group."""

    singletons: Literal["drop", "zero", "batch_mean"] = "drop"
    """An episode alone in its group leaves the batch, stays with advantage 0, or is compared with all episodes."""
    uniform: Literal["zero", "drop"] = "zero"
    """A group whose rewards do not differ stays with advantage 0, or leaves the batch, as in DAPO."""
    uniform_by: str | None = None
    """The part of the reward by which groups differ or not, such as the one for the right answer; null: the reward
    itself, before shaping."""


class ScaledSection(GroupedSection):
    """What the estimators have in common that divide by a group's standard deviation."""

    takes_penalties: ClassVar[bool] = False
    epsilon: PositiveFloat = 1e-6
    """Added to the standard deviation."""
    min_spread: NonNegativeFloat = 1e-4
    """A group whose rewards differ by less counts as uniform: dividing by its deviation would blow noise up."""


class GroupAdvantage(ScaledSection):
    """GRPO: (r - mean of the group) / (std of the group + epsilon) (arXiv 2402.03300)."""

    kind: Literal["grpo"] = "grpo"


class CentredAdvantage(GroupedSection):
    """Dr.GRPO: r - mean of the group (arXiv 2503.20783)."""

    kind: Literal["dr_grpo"]


class LeaveOneOutAdvantage(GroupedSection):
    """RLOO: r - mean of the group's other episodes (arXiv 2402.14740)."""

    kind: Literal["rloo"]


class GPGAdvantage(GroupedSection):
    """GPG: r - mean of the group, times groups over groups that are not uniform (arXiv 2504.02546)."""

    kind: Literal["gpg"]


class OptimalBaselineAdvantage(GroupedSection):
    """OPO: r - mean of the group weighted by the lengths of its answers (arXiv 2505.23585)."""

    kind: Literal["opo"]


class MaxRLAdvantage(GroupedSection):
    """MaxRL: (r - mean of the group) / mean of the group, for rewards that are not negative (arXiv 2602.02710)."""

    takes_penalties: ClassVar[bool] = False
    kind: Literal["maxrl"]
    min_mean: PositiveFloat = 1e-6
    """A group whose mean is less has advantage 0."""


class GDPOAdvantage(ScaledSection):
    """GDPO: each part of the reward as in GRPO, their weighted sum, normalised over the batch (arXiv 2601.05242)."""

    kind: Literal["gdpo"]
    weights: dict[str, float] = {}
    """By part of the reward; empty: all parts that there are, with weight 1."""
    normalize_batch: bool = True
    """Divide by the standard deviation over all episodes, each counted once, after subtracting their mean."""


class ReinforcePlusPlusAdvantage(AdvantageSection):
    """REINFORCE++: the return over the sampled tokens, whitened over the batch (arXiv 2501.03262)."""

    kind: Literal["reinforce_plus_plus"]
    gamma: Discount = 1.0
    """Discount from one sampled token to the next."""
    pay_turns: bool = False
    """Pay the reward of each turn at its last token; off: all of it at the last token of the episode."""
    whiten: bool = True
    """Subtract the mean over the step's trainable tokens from the advantages, and divide by the standard deviation."""


class ReinforcePlusPlusBaselineAdvantage(GroupedSection):
    """REINFORCE++-baseline: r - mean of the group, whitened over the batch (arXiv 2501.03262)."""

    kind: Literal["reinforce_plus_plus_baseline"]
    gamma: Discount = 1.0
    """Discount from one sampled token to the next."""
    whiten: bool = True
    """Subtract the mean over the step's trainable tokens from the advantages, and divide by the standard deviation."""


class GAEAdvantage(AdvantageSection):
    """PPO's generalised advantage estimation from a critic's values, over the sampled tokens (arXiv 1506.02438)."""

    needs_critic: ClassVar[bool] = True
    kind: Literal["ppo_gae"]
    gamma: Discount = 1.0
    """Discount of what comes later."""
    gae_lambda: Discount = 0.95
    """Weight of later differences: 0 trusts the critic, 1 the rewards."""
    per: Literal["token", "turn"] = "token"
    """Whether gamma and gae_lambda apply from token to token, or only from one turn to the next."""
    length_adaptive: NonNegativeFloat = 0.0
    """VAPO's alpha: lambda is 1 - 1 / (alpha * sampled tokens) of an episode (arXiv 2504.05118). 0: `gae_lambda`."""
    pay_turns: bool = True
    """Pay the reward of each turn at its last token; off: all of it at the last token of the episode."""
    whiten: bool = True
    """Subtract the mean over the step's trainable tokens from the advantages, and divide by the standard deviation."""


class TurnAdvantage(ScaledSection):
    """Turn-level credit: the return from each turn on, against the group's at the same turn (arXiv 2505.11821)."""

    kind: Literal["turn_level"]
    gamma: Discount = 1.0
    """Discount from one turn to the next."""
    scale: Literal["std", "none"] = "std"
    """Divide by the standard deviation of the returns that are compared, or by nothing."""


class GiGPOAdvantage(ScaledSection):
    """GiGPO: the episode's advantage plus that of each step among steps from an equal state (arXiv 2505.10978)."""

    kind: Literal["gigpo"]
    gamma: Discount = 0.95
    """Discount from one turn to the next, in the return of a step."""
    step_weight: NonNegativeFloat = 1.0
    """Weight of the step's advantage beside the episode's."""
    scale: Literal["std", "none"] = "std"
    """Divide by the standard deviation of what is compared, or by nothing."""


class NoShaping(Section):
    """The rewards as the environment gave them."""

    kind: Literal["none"] = "none"


class OverlongShaping(Section):
    """DAPO's soft punishment of long answers, added to the reward (arXiv 2503.14476)."""

    kind: Literal["overlong"]
    max_tokens: PositiveInt
    """Sampled tokens of an episode at which the punishment is `factor`."""
    buffer_tokens: PositiveInt
    """Over how many tokens before that it grows from 0."""
    factor: PositiveFloat = 1.0
    """The largest punishment."""

    @model_validator(mode="after")
    def _starts_within(self) -> Self:
        if self.buffer_tokens > self.max_tokens:
            raise ValueError(
                f"buffer_tokens {self.buffer_tokens} is more than max_tokens {self.max_tokens}: the punishment would "
                "begin before the answer"
            )
        return self


Advantage = Annotated[
    GroupAdvantage
    | CentredAdvantage
    | LeaveOneOutAdvantage
    | GPGAdvantage
    | OptimalBaselineAdvantage
    | MaxRLAdvantage
    | GDPOAdvantage
    | ReinforcePlusPlusAdvantage
    | ReinforcePlusPlusBaselineAdvantage
    | GAEAdvantage
    | TurnAdvantage
    | GiGPOAdvantage
    | Plugin,
    Field(discriminator="kind"),
]
RewardShaping = Annotated[NoShaping | OverlongShaping | Plugin, Field(discriminator="kind")]
