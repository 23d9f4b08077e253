"""What turns rewards into gradients: advantages, losses, penalties and reductions."""

from __future__ import annotations

from typing import Literal, Self

from pydantic import NonNegativeFloat, model_validator

from polyturn.configs.advantages import Advantage, GroupAdvantage, NoShaping, RewardShaping
from polyturn.configs.corrections import Correction, CorrectionSection
from polyturn.configs.kl import KL, KLInLoss, KLInReward, NoKL
from polyturn.configs.losses import ClipLoss, Loss
from polyturn.configs.reductions import Reduction, TokenMean
from polyturn.configs.section import Section


class AlgorithmConfig(Section):
    """What turns rewards into gradients."""

    reward_shaping: RewardShaping = NoShaping()
    """What is done to the rewards before they are compared. Groups whose own rewards do not differ stay alike: what
    answers are worth belongs in `reward`."""
    truncated: Literal["train", "mask", "drop"] = "train"
    """Episodes that a limit ended: like others, or compared with but not trained on, or as if never played."""
    advantage: Advantage = GroupAdvantage()
    loss: Loss = ClipLoss()
    proximal: Literal["scored", "behavior"] = "scored"
    """The logprobs of the step's start are scored by the trainer, or taken to be the sampler's: this saves a forward
    pass over every step, and the in-run checks that compare the two are off."""
    corrections: list[Correction] = []
    """What makes up for the difference of sampler and trainer; the weights of several are multiplied."""
    kl: KL = NoKL()
    reduction: Reduction = TokenMean()
    """How the losses of tokens become one number."""
    entropy_coefficient: NonNegativeFloat = 0.0
    """Weight of an entropy bonus in the loss."""

    @property
    def needs_reference(self) -> bool:
        """Whether the logprobs of a frozen reference policy are needed."""
        return isinstance(self.kl, KLInReward) or (
            isinstance(self.kl, KLInLoss) and self.kl.anchor == "reference"
        )

    @model_validator(mode="after")
    def _shaped_rewards_are_compared(self) -> Self:
        if self.advantage.kind == "gdpo" and self.reward_shaping.kind != "none":
            raise ValueError(
                f"reward_shaping {self.reward_shaping.kind}: it changes the reward, and the advantage 'gdpo' compares "
                "the reward's parts, which it leaves as they are; make it a part of the reward, or take grpo"
            )
        if self.advantage.kind == "maxrl" and self.reward_shaping.kind == "overlong":
            raise ValueError(
                "reward_shaping overlong: the advantage 'maxrl' divides by the mean of a group's rewards, which the "
                "punishment makes negative, and a group with such a mean teaches nothing; take grpo"
            )
        return self

    @model_validator(mode="after")
    def _penalties_are_part_of_the_return(self) -> Self:
        advantage = self.advantage
        if isinstance(self.kl, KLInReward) and not getattr(advantage, "takes_penalties", True):
            raise ValueError(
                f"kl in_reward: the advantage {advantage.kind!r} divides rewards by what they have in their group, and "
                "with them the penalty, so it would not be the KL's gradient; take kl in_loss, or an advantage that "
                "sums rewards, such as rloo, dr_grpo, reinforce_plus_plus or ppo_gae"
            )
        return self

    @model_validator(mode="after")
    def _each_difference_is_corrected_once(self) -> Self:
        weighing = [c for c in self.corrections if isinstance(c, CorrectionSection) and c.weighs]
        if len(weighing) > 1:
            kinds = " and ".join(repr(section.kind) for section in weighing)
            raise ValueError(
                f"corrections: {kinds} are both importance weights of the same ratio, so that it would count twice; "
                "keep one of them, and for the rest take rejections or a veto"
            )
        if weighing and getattr(self.loss, "anchor", None) == "behavior":
            raise ValueError(
                f"corrections: the loss {self.loss.kind!r} has its ratio against behavior, which makes up for the "
                f"difference that {weighing[0].kind!r} corrects, so that it would count twice; take loss.anchor: "
                "proximal, or leave the correction out"
            )
        return self

    @model_validator(mode="after")
    def _nobody_asks_for_what_is_not_scored(self) -> Self:
        if self.proximal == "scored":
            return self
        user = None
        if getattr(self.loss, "anchor", "behavior") == "proximal":
            user = "loss.anchor is proximal; take loss.anchor: behavior"
        elif self.corrections:
            user = "corrections compare the two; leave them out"
        elif isinstance(self.kl, KLInReward) or (
            isinstance(self.kl, KLInLoss) and self.kl.anchor == "proximal"
        ):
            user = "the KL is one of the proximal policy; take kl in_loss to another"
        if user is not None:
            raise ValueError(
                f"proximal: behavior leaves the step's start unscored, but {user}, or proximal: scored"
            )
        return self
