"""How many episodes at once: additive increase, multiplicative decrease, on what the engines say of themselves.

The rule is TCP's (Chiu and Jain, "Analysis of the increase and decrease algorithms for congestion avoidance in computer
networks", 1989): it goes to the edge of what the engines hold and back, whatever a token costs there. Pure functions of
samples; who waits is decided in `agents/live_episodes.py`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from polyturn.configs.schema.concurrency import AdaptiveConcurrency
from polyturn.rollout.engines.fleet import Traffic
from polyturn.rollout.engines.load import EngineLoad


@dataclass(frozen=True, kw_only=True, slots=True)
class Feedback:
    """What happened since the last sample."""

    kv_use: float
    """The largest share of its KV that any engine uses."""
    queue_share: float
    """Requests in the engines' queues over all that the engines have."""
    num_retractions: int
    """Requests that lost their place in a batch for want of KV."""
    cache_loss_rate: float
    """Of tokens that an engine had computed for the same episode, the share that it computed again."""
    is_limited: bool
    """Whether an episode waits for room: only then would a higher limit change anything."""

    @classmethod
    def of(cls, loads: Sequence[EngineLoad], traffic: Traffic, *, is_limited: bool) -> Feedback:
        """Of engines that said how they are, and of what was answered."""
        num_waiting = sum(load.num_waiting for load in loads)
        num_all = num_waiting + sum(load.num_running for load in loads)
        return cls(
            kv_use=max((load.kv_use for load in loads), default=0.0),
            queue_share=num_waiting / num_all if num_all else 0.0,
            num_retractions=traffic.num_retractions,
            cache_loss_rate=traffic.num_lost_tokens / max(1, traffic.num_known_tokens),
            is_limited=is_limited,
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class Rule:
    """The constants of the feedback."""

    smallest: int
    largest: int
    high_kv_use: float = 0.9
    """From here on the limit falls."""
    low_kv_use: float = 0.8
    """Up to here it rises."""
    high_queue_share: float = 0.25
    high_cache_loss_rate: float = 0.1
    increase: float = 0.02
    """Of `largest`, and 1 at least, with each sample."""
    decrease: float = 0.8
    """What is left of the limit."""
    patience: int = 5
    """Samples after a fall in which it does not fall again: what is under way must end first."""

    @classmethod
    def from_config(cls, config: AdaptiveConcurrency, *, smallest: int, largest: int) -> Rule:
        """As a run config says it, within the bounds of one rollout worker."""
        return cls(
            smallest=smallest,
            largest=largest,
            high_kv_use=config.high_kv_use,
            low_kv_use=config.low_kv_use,
            increase=config.increase,
            decrease=config.decrease,
        )

    def __post_init__(self) -> None:
        assert 1 <= self.smallest <= self.largest
        assert 0 < self.decrease < 1 and self.low_kv_use <= self.high_kv_use


@dataclass(frozen=True, kw_only=True, slots=True)
class Limit:
    """Where the limit stands, between `Rule.smallest` and `Rule.largest`."""

    value: float
    hold: int = 0
    """Samples until it may fall again."""

    @property
    def episodes(self) -> int:
        """The limit as a number of episodes."""
        return int(self.value)


def is_pressed(feedback: Feedback, rule: Rule) -> bool:
    """Whether the engines have more than they can hold."""
    return (
        feedback.num_retractions > 0
        or feedback.kv_use > rule.high_kv_use
        or feedback.queue_share > rule.high_queue_share
        or feedback.cache_loss_rate > rule.high_cache_loss_rate
    )


def adapt(limit: Limit, feedback: Feedback, rule: Rule) -> Limit:
    """The limit after one sample."""
    hold = max(0, limit.hold - 1)
    if is_pressed(feedback, rule):
        if limit.hold:
            return replace(limit, hold=hold)
        return Limit(value=max(float(rule.smallest), limit.value * rule.decrease), hold=rule.patience)
    if feedback.is_limited and feedback.kv_use <= rule.low_kv_use:
        step = max(1.0, rule.increase * rule.largest)
        return Limit(value=min(float(rule.largest), limit.value + step), hold=hold)
    return replace(limit, hold=hold)
