"""The record of one episode: what the trajectory store keeps and the trainer reads."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum

from polyturn.agents.ledger import Segment
from polyturn.envs.messages import Message
from polyturn.tools.metrics import ToolUsage


class Outcome(StrEnum):
    """Why an episode ended."""

    COMPLETED = "completed"
    """The task came to its end."""
    TRUNCATED = "truncated"
    """A limit of turns, tokens or time was reached."""
    FAILED = "failed"
    """Infrastructure failed. Never a reward."""


@dataclass(frozen=True, kw_only=True, slots=True)
class EpisodeTimings:
    """Where the seconds of one episode went."""

    generate_s: float = 0.0
    tools_s: float = 0.0
    queue_s: float = 0.0
    total_s: float = 0.0


@dataclass(frozen=True, kw_only=True, slots=True)
class TurnRecord:
    """One turn of an episode: who took it, in which state, and what it was paid."""

    role: str = ""
    """As `Segment.role`."""
    reward: float = 0.0
    """Paid by the environment for this step; 0 for an answer that a limit cut off before the environment saw it."""
    anchor: str = ""
    """Names the state in which the turn was taken, so that turns of several episodes can be compared."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Episode:
    """One play of one task by one policy, from reset to its end."""

    episode_id: str
    group_id: str
    """Episodes with one group id share a baseline; membership is by this identity, never by position."""
    env_id: str
    task_id: str
    seed: int
    outcome: Outcome
    stop_reason: str
    """`terminated`, or the limit that was reached, or the fault."""
    reward: float | None
    """None when the episode failed."""
    task_digest: str = ""
    """Of the task that was played, as `envs.tasks.digest` makes it: an id or a place may come to mean another task."""
    group_reward: float | None = None
    """What group rewards have added to `reward` and `role_rewards`; None: nothing has been added yet."""
    reward_parts: Mapping[str, float] = field(default_factory=dict)
    role_rewards: Mapping[str, float] = field(default_factory=dict)
    """In an episode of several agents the reward of each, by `Segment.role`; one without an entry has `reward`."""
    metrics: Mapping[str, float] = field(default_factory=dict)
    """What the environment counted without rewarding it."""
    num_turns: int = 0
    turn_records: tuple[TurnRecord, ...] = ()
    """Of all turns, in order; empty for a failed episode. Group rewards come on top of what turns were paid."""
    num_tool_calls: int = 0
    num_tool_errors: int = 0
    tools: Mapping[str, ToolUsage] = field(default_factory=dict)
    """By tool: its calls, how they went and what they took; calls of no tool under `(unknown)`."""
    messages: tuple[Message, ...] = ()
    segments: tuple[Segment, ...] = ()
    timings: EpisodeTimings = field(default_factory=EpisodeTimings)
    error: str | None = None
    """Why it failed: a sentence, and in the lines under it a bounded traceback where there is one."""

    def __post_init__(self) -> None:
        failed = self.outcome is Outcome.FAILED
        assert failed == (self.reward is None), "a failed episode has no reward, every other one has"

    def part_id(self, role: str) -> str:
        """The id of what one role wrote; without roles that of the episode."""
        return f"{self.episode_id}/{role}" if role else self.episode_id

    def reward_of(self, role: str) -> float | None:
        """The reward of one role; the episode's own where the role has none of its own. None for a failed episode."""
        return self.role_rewards.get(role, self.reward)

    @property
    def num_sampled_tokens(self) -> int:
        return sum(segment.num_sampled for segment in self.segments)
