"""What turns rewards into gradients: how rewards become advantages, and which objective these enter."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal, Self

from pydantic import (
    Field,
    NonNegativeFloat,
    PositiveFloat,
    PositiveInt,
    ValidationError,
    model_validator,
)

from polyturn.configs.schema.objective import (
    KL,
    ClipLoss,
    Correction,
    CorrectionSection,
    EntropyControl,
    KLInLoss,
    KLInReward,
    Loss,
    NoEntropyControl,
    NoKL,
    Reduction,
    TokenMean,
)
from polyturn.configs.schema.section import Plugin, Section

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


class NoAdvantage(AdvantageSection):
    """No advantage of the reward: what `distillation` adds, or a KL in the loss, is all that is trained on."""

    kind: Literal["none"]


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


class TreeAdvantage(ScaledSection):
    """Tree-GRPO for episodes that branch: GRPO among the group's leaves plus GRPO among those of one tree; a turn that
    several leaves share is worth their mean (arXiv 2509.21240, 2507.19849)."""

    kind: Literal["tree_grpo"]
    tree_weight: NonNegativeFloat = 1.0
    """Weight of the comparison within a tree beside the one within the group."""


class NoDistillation(Section):
    """Teachers have no part in the advantage."""

    kind: Literal["none"] = "none"


class DistillationInAdvantage(Section):
    """Each token's advantage gets coefficient (log teacher - log proximal): minus an estimate of the reverse KL to the
    teacher at this token (arXiv 2306.08543; Thinking Machines 2025; docs/distillation.md)."""

    kind: Literal["in_advantage"]
    coefficient: PositiveFloat = 1.0
    """Weight of that beside the advantage of the reward."""
    max_difference: PositiveFloat | None = None
    """The difference of logprobs is bounded to so much on both sides; null: it is not, as the KL's gradient wants."""


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
    | TreeAdvantage
    | NoAdvantage
    | Plugin,
    Field(discriminator="kind"),
]
Distillation = Annotated[NoDistillation | DistillationInAdvantage, Field(discriminator="kind")]
RewardShaping = Annotated[NoShaping | OverlongShaping | Plugin, Field(discriminator="kind")]


class EntropyTarget(Section):
    """The entropy bonus follows the entropy: its weight goes up by a step after each update below the target and down
    after each above, and counts only while the entropy is at most the target (Skywork-OR1, arXiv 2505.22312)."""

    entropy: PositiveFloat
    """The mean over trainable tokens, in nats, that is held."""
    step: PositiveFloat = 5e-3
    """By how much the weight changes after each update."""
    most: PositiveFloat = 0.1
    """The largest weight; the least is 0."""


class AlgorithmConfig(Section):
    """What turns rewards into gradients."""

    reward_shaping: RewardShaping = NoShaping()
    """What is done to the rewards before they are compared. Groups whose own rewards do not differ stay alike: what
    answers are worth belongs in `reward`."""
    truncated: Literal["train", "mask", "drop"] = "train"
    """Episodes that a limit ended: like others, or compared with but not trained on, or as if never played."""
    advantage: Advantage = GroupAdvantage()
    distillation: Distillation = NoDistillation()
    """What teachers add to the advantages."""
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
    entropy_target: EntropyTarget | None = None
    """Moves the weight of the entropy bonus from update to update, towards an entropy; null: it stays."""
    entropy_control: EntropyControl = NoEntropyControl()
    """What is done about the few tokens that take most of the policy's entropy."""

    @property
    def needs_reference(self) -> bool:
        """Whether the logprobs of a frozen reference policy are needed."""
        return isinstance(self.kl, KLInReward) or (
            isinstance(self.kl, KLInLoss) and self.kl.anchor == "reference"
        )

    @property
    def needs_teacher(self) -> bool:
        """Whether the logprobs of a teacher are needed."""
        return isinstance(self.distillation, DistillationInAdvantage) or (
            isinstance(self.kl, KLInLoss) and self.kl.anchor == "teacher"
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
        if getattr(self.loss, "anchor", "behavior") in ("proximal", None):
            user = "loss.anchor is proximal; take loss.anchor: behavior"
        elif self.corrections:
            user = "corrections compare the two; leave them out"
        elif self.entropy_control.kind != "none":
            user = "entropy_control goes by the logprobs of the step's start; leave it out"
        elif isinstance(self.kl, KLInReward) or (
            isinstance(self.kl, KLInLoss) and self.kl.anchor == "proximal"
        ):
            user = "the KL is one of the proximal policy; take kl in_loss to another"
        if user is not None:
            raise ValueError(
                f"proximal: behavior leaves the step's start unscored, but {user}, or proximal: scored"
            )
        return self


class EnvironmentAlgorithm(Section):
    """What the episodes of one environment are trained by: a loss of its own, over denominators of its own. What is not
    set is as in `trainer.algorithm`."""

    environment: str
    """The id of the environment, such as `polyturn/TwoHopSearch-v0`."""
    weight: PositiveFloat | None = None
    """Of its loss in the sum; null: its share of the update's trainable tokens."""
    reward_shaping: RewardShaping | None = None
    """As `trainer.algorithm.reward_shaping`."""
    truncated: Literal["train", "mask", "drop"] | None = None
    """As `trainer.algorithm.truncated`."""
    advantage: Advantage | None = None
    """As `trainer.algorithm.advantage`."""
    distillation: Distillation | None = None
    """As `trainer.algorithm.distillation`."""
    loss: Loss | None = None
    """As `trainer.algorithm.loss`."""
    corrections: list[Correction] | None = None
    """As `trainer.algorithm.corrections`."""
    kl: KL | None = None
    """As `trainer.algorithm.kl`."""
    reduction: Reduction | None = None
    """As `trainer.algorithm.reduction`."""
    entropy_coefficient: NonNegativeFloat | None = None
    """As `trainer.algorithm.entropy_coefficient`."""
    entropy_control: EntropyControl | None = None
    """As `trainer.algorithm.entropy_control`."""

    def over(self, base: AlgorithmConfig) -> AlgorithmConfig:
        """The whole algorithm: `base` with what is set here in its place.

        Raises:
            ValueError: the two do not go together.
        """
        own = {
            "reward_shaping": self.reward_shaping,
            "truncated": self.truncated,
            "advantage": self.advantage,
            "distillation": self.distillation,
            "loss": self.loss,
            "corrections": self.corrections,
            "kl": self.kl,
            "reduction": self.reduction,
            "entropy_coefficient": self.entropy_coefficient,
            "entropy_control": self.entropy_control,
        }
        given = {name: value for name, value in own.items() if value is not None}
        try:
            return AlgorithmConfig.model_validate({**dict(base), **given})
        except ValidationError as error:
            (finding, *_) = error.errors(include_url=False)
            raise ValueError(f"environment {self.environment}: {finding['msg']}") from error
