"""What simulated episodes are like: from distributions with long tails, or as a real run played them."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import NormalDist
from typing import Protocol

from polyturn.configs.schema.run import RunConfig


@dataclass(frozen=True, kw_only=True, slots=True)
class TurnShape:
    """One turn."""

    num_sampled: int
    num_observed: int
    """Tokens of what the environment says afterwards."""
    tool_s: float


@dataclass(frozen=True, kw_only=True, slots=True)
class EpisodeShape:
    """An episode before it is played."""

    num_prompt: int
    turns: tuple[TurnShape, ...]
    reward: float

    @property
    def num_sampled(self) -> int:
        """Sampled tokens of all turns."""
        return sum(turn.num_sampled for turn in self.turns)


class Workload(Protocol):
    """Says what each attempt is like."""

    def __call__(self, *, position: int, sample: int, attempt: int) -> EpisodeShape:
        """The same for the same numbers; all samples of a position have prompts of one length."""
        ...


@dataclass(frozen=True, kw_only=True, slots=True)
class LogNormalWorkload:
    """Log-normal lengths and tool times: a few episodes take many times the mean.

    How long an episode is depends on its task and on chance, in equal parts of the variance of the logarithm. Whether
    it succeeds is correlated with that, through a normal variable each.
    """

    seed: int = 0
    mean_turns: float = 4.0
    max_turns: int = 8
    mean_tokens: float = 256.0
    """Sampled tokens of a turn."""
    max_tokens: int = 2048
    """Of a turn."""
    tail: float = 1.0
    """Deviation of the logarithm of an episode's length."""
    num_prompt: int = 512
    num_observed: int = 128
    """Tokens of what the environment says in a turn."""
    mean_tool_s: float = 1.0
    tool_tail: float = 1.0
    """Deviation of the logarithm of a tool call's seconds."""
    success: float = 0.5
    """Share of episodes with reward 1, the others have 0."""
    length_correlation: float = 0.0
    """Of success with length: below 0 long episodes fail more often."""

    def __call__(self, *, position: int, sample: int, attempt: int) -> EpisodeShape:
        """As the protocol says."""
        of_task = random.Random(f"{self.seed}/{position}")
        of_sample = random.Random(f"{self.seed}/{position}/{sample}/{attempt}")
        length = math.sqrt(0.5) * (of_task.gauss() + of_sample.gauss())
        chance = math.sqrt(1 - self.length_correlation**2) * of_sample.gauss()
        is_right = self.length_correlation * length + chance > NormalDist().inv_cdf(1 - self.success)
        factor = math.exp(self.tail * length - self.tail**2 / 2)
        num_turns = 1 + int(of_sample.expovariate(1.0) * max(0.0, self.mean_turns - 1))
        num_turns = min(self.max_turns, num_turns)
        return EpisodeShape(
            num_prompt=self.num_prompt,
            turns=tuple(
                TurnShape(
                    num_sampled=min(self.max_tokens, max(1, round(self.mean_tokens * factor))),
                    num_observed=self.num_observed,
                    tool_s=self.mean_tool_s
                    * math.exp(self.tool_tail * of_sample.gauss() - self.tool_tail**2 / 2),
                )
                for _ in range(num_turns)
            ),
            reward=float(is_right),
        )


@dataclass(frozen=True, slots=True)
class ReplayedWorkload:
    """Groups of episodes as they were played, in their order, again and again."""

    groups: Sequence[Sequence[EpisodeShape]]

    def __call__(self, *, position: int, sample: int, attempt: int) -> EpisodeShape:
        """As the protocol says; an attempt is like the one before."""
        del attempt
        group = self.groups[position % len(self.groups)]
        return group[sample % len(group)]


def workload_of(config: RunConfig) -> LogNormalWorkload:
    """Episodes within the recipe's limits: a quarter of the tokens and half of the turns that they may have."""
    environment = config.environment
    return LogNormalWorkload(
        seed=config.seed,
        mean_turns=max(1.0, environment.max_turns / 2),
        max_turns=environment.max_turns,
        mean_tokens=max(1.0, environment.max_tokens_per_turn / 4),
        max_tokens=environment.max_tokens_per_turn,
        num_prompt=max(1, environment.max_tokens_per_episode // 8),
        num_observed=max(1, environment.max_tokens_per_episode // (8 * environment.max_turns)),
    )
