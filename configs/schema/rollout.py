"""How episodes are sampled, how many are played, and which of their groups a step is trained on."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import (
    Field,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    field_validator,
    model_validator,
)

from polyturn.configs.schema.branching import Branching, NoBranching
from polyturn.configs.schema.concurrency import Concurrency, FixedConcurrency
from polyturn.configs.schema.section import Plugin, Section

TopP = Annotated[float, Field(gt=0, le=1)]
MinP = Annotated[float, Field(ge=0, lt=1)]
LARGEST_TOP_K = 4096
"""The engines record what a token was drawn from up to about so many tokens."""


class SamplingConfig(Section):
    """The sampling contract. What top-p, top-k and min-p leave of the vocabulary is recorded, and the trainer scores
    over that. Penalties are refused: it could not replay them."""

    temperature: Annotated[float, Field(ge=0.01)] = 1.0
    """Of the training episodes; the trainer's logprobs are taken at it too."""
    top_p: TopP = 1.0
    """Draw from the likeliest tokens that have so much of the probability together; 1.0: from all."""
    top_k: int = -1
    """Draw from the so many likeliest tokens, 2 to 4,096; -1: from all, or from 4,096 where top_p or min_p is set."""
    min_p: MinP = 0.0
    """Draw from the tokens of this share of the likeliest one's probability, or more; 0.0: from all."""
    seeded: bool = False
    """Give every request a seed of its own, so that a synchronous run repeats."""

    @field_validator("top_k")
    @classmethod
    def _can_be_recorded(cls, value: int) -> int:
        if value == 1:
            raise ValueError("top_k must not be 1: a token that is drawn from itself alone teaches nothing")
        if value != -1 and not 1 < value <= LARGEST_TOP_K:
            raise ValueError(
                f"top_k must be -1 or from 2 to {LARGEST_TOP_K}, got {value}: the engines record no more of what a "
                "token was drawn from"
            )
        return value

    @property
    def is_restricted(self) -> bool:
        """Whether tokens are drawn from a part of the vocabulary."""
        return self.top_p < 1 or self.top_k != -1 or self.min_p > 0

    def finite_top_k(self, vocab_size: int) -> int:
        """The top-k that engines are asked for: they record nothing without one."""
        return min(LARGEST_TOP_K if self.top_k == -1 else self.top_k, vocab_size)

    @property
    def largest_support(self) -> int | None:
        """The most tokens that one may be drawn from: more than top-k, for tokens with the probability of its last one
        are not told apart, and engines abort what they cannot record. None where nothing is left out."""
        return 2 * self.finite_top_k(LARGEST_TOP_K) + 64 if self.is_restricted else None

    def cuts_off(self, vocab_size: int) -> bool:
        """Whether that leaves out tokens that nobody asked to leave out."""
        return self.is_restricted and self.top_k == -1 and vocab_size > LARGEST_TOP_K


class WindowedOrder(Section):
    """Complete groups among the first `window` of those under way, the earliest drawn in front.

    A group that is slow is overtaken by so many and no more, so that what is quick is not trained on before its time.
    """

    kind: Literal["windowed_fifo"] = "windowed_fifo"
    window: PositiveInt | None = None
    """Groups; null: (1 + max_staleness / 2) x prompts_per_step."""


class FifoOrder(Section):
    """The groups that were drawn first, complete or not: a step waits for its slowest."""

    kind: Literal["fifo"]


Order = Annotated[WindowedOrder | FifoOrder | Plugin, Field(discriminator="kind")]


class NoFilter(Section):
    """Every group is trained on."""

    kind: Literal["none"] = "none"


class NonzeroDeviation(Section):
    """Groups whose rewards differ by more than `min_spread` (DAPO's dynamic sampling, arXiv 2503.14476)."""

    kind: Literal["nonzero_deviation"]
    min_spread: NonNegativeFloat = 1e-4
    """The largest difference of rewards that is none."""
    reward_part: str | None = None
    """The part of the reward that is looked at, such as the one for the right answer; null: the reward itself."""


class MeanRange(Section):
    """Groups whose mean reward is from `low` to `high`."""

    kind: Literal["mean_range"]
    low: float
    """The smallest mean that is kept."""
    high: float
    """The largest mean that is kept."""
    reward_part: str | None = None
    """The part of the reward that is looked at; null: the reward itself."""

    @model_validator(mode="after")
    def _is_a_range(self) -> Self:
        if self.low > self.high:
            raise ValueError(f"low {self.low:g} is more than high {self.high:g}: no group would be kept")
        return self


GroupFilter = Annotated[NoFilter | NonzeroDeviation | MeanRange | Plugin, Field(discriminator="kind")]


class RolloutConfig(Section):
    """How many episodes, how many at once, and how far ahead of the trainer."""

    prompts_per_step: PositiveInt
    """Tasks in a step: one group of episodes each."""
    samples_per_prompt: PositiveInt
    """Episodes of one task, which share a baseline."""
    branching: Branching = NoBranching()
    """Whether some samples of a group begin as branches of others, from a turn of theirs on."""
    max_staleness: NonNegativeInt = 0
    """How many steps old a token may be when it is trained on. 0: a step is played by the weights that it trains; 1: it
    is played while the step before is trained on; more: episodes go on through as many updates of the weights."""
    on_stale: Literal["wait", "drop", "retry"] = "wait"
    """Groups that would become older than that: the step waits for them, or they are dropped, or played anew."""
    order: Order = WindowedOrder()
    """Which of the complete groups a step is trained on."""
    oversample: Annotated[float, Field(ge=1)] = 1.0
    """Times prompts_per_step: groups in play for a step. What it does not need becomes stale, unless max_staleness
    keeps it for the next."""
    filter: GroupFilter = NoFilter()
    """Which complete groups are trained on; others are counted, and the next prompts take their place."""
    max_filtered_per_step: PositiveInt | None = None
    """A step makes do with what it has after the filter took so many groups; null: 16 x prompts_per_step."""
    play_while_training: bool = True
    """Go on playing while the trainer trains; off: the engines rest, and answers that were cut off go on afterwards
    from their tokens, on any engine (partial rollout)."""
    kv_after_update: Literal["recompute", "keep"] = "recompute"
    """What becomes of the KV cache of answers under way when the weights change: computed anew by the new weights, or
    kept as the old ones made it, cached prefixes included, which is quicker and is not what the trainer scores."""
    replay: Path | None = None
    """The run directory whose steps are trained on, as they are stored there, in place of playing: no engines are
    started, and nothing is evaluated."""
    num_workers: NonNegativeInt = 0
    """Processes of the Ray cluster that episodes are played in, each with environments and tools of its own; 0: the
    driver's."""
    max_concurrent_requests: PositiveInt = 256
    """Generation requests at once."""
    max_concurrent_episodes: PositiveInt = 256
    """Episodes under way at once."""
    max_concurrent_tools: PositiveInt = 32
    """Resets and steps of environments at once."""
    concurrency: Concurrency = FixedConcurrency()
    queue_timeout_s: PositiveFloat = 3600.0
    """An episode that waits for one of these slots for so many seconds fails, and is played again."""
    max_lost_threads: NonNegativeInt = 32
    """The run stops when more calls of environments than this were given up, never returned, and hold their threads."""
    max_worker_deaths: NonNegativeInt = 16
    """The run stops when more processes of `num_workers` than this have died within an hour; each is replaced."""
    max_retries: NonNegativeInt = 2
    """How often a failed episode is played again before it is dropped and counted."""
    max_failure_share: Annotated[float, Field(gt=0, le=1)] = 0.5
    """The run stops when a larger share of the attempts of one step failed, or of an environment's newest, once there
    are enough to tell."""
    sampling: SamplingConfig = SamplingConfig()

    @property
    def num_trunks(self) -> int:
        """Samples of a group that are played from the start."""
        if isinstance(self.branching, NoBranching):
            return self.samples_per_prompt
        return self.branching.num_trunks or max(1, self.samples_per_prompt // 2)

    @property
    def window(self) -> int:
        """Groups that a windowed order chooses from."""
        given = self.order.window if isinstance(self.order, WindowedOrder) else None
        return given or self.prompts_per_step + self.prompts_per_step * self.max_staleness // 2

    @property
    def num_spare(self) -> int:
        """Groups in play beyond what steps need."""
        return round((self.oversample - 1) * self.prompts_per_step)

    @model_validator(mode="after")
    def _something_is_left_to_branch(self) -> Self:
        if not isinstance(self.branching, NoBranching) and self.num_trunks >= self.samples_per_prompt:
            raise ValueError(
                f"branching: {self.num_trunks} of {self.samples_per_prompt} samples_per_prompt are trunks, so that "
                "none is left to branch from them; set branching.num_trunks to less, or branching.kind to none"
            )
        return self

    @model_validator(mode="after")
    def _what_is_left_over_goes_somewhere(self) -> Self:
        if self.num_spare and self.on_stale == "wait":
            raise ValueError(
                f"oversample {self.oversample:g} leaves groups that no step waits for; say with on_stale: drop or "
                "on_stale: retry what becomes of them when they are stale"
            )
        return self

    @model_validator(mode="after")
    def _a_window_holds_a_step(self) -> Self:
        if self.window < self.prompts_per_step:
            raise ValueError(
                f"order.window {self.window} is less than prompts_per_step {self.prompts_per_step}: no step could be "
                "filled from it"
            )
        return self

    @model_validator(mode="after")
    def _kept_caches_are_of_what_is_under_way(self) -> Self:
        if self.kv_after_update == "keep" and not self.max_staleness:
            raise ValueError(
                "kv_after_update: keep has answers go on through an update of the weights, which max_staleness: 0 does "
                "not allow; what is played after it would begin with cached prefixes of the old weights"
            )
        return self

    @model_validator(mode="after")
    def _what_is_cut_off_may_be_older(self) -> Self:
        if not self.play_while_training and not self.max_staleness:
            raise ValueError(
                "play_while_training: false cuts answers off and goes on with them by newer weights, which "
                "max_staleness: 0 does not allow; with 0 nothing is played while the trainer trains anyway"
            )
        return self
