"""The record of one episode: what the trajectory store keeps and the trainer reads.

What is kept of an exception that ended one is a sentence, and a bounded traceback under it.
"""

from __future__ import annotations

import hashlib
import traceback
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum

from polyturn.agents.ledger import Segment
from polyturn.agents.policy import EngineUnavailable, PolicyFault
from polyturn.envs.faults import EnvironmentFault, UserFault, describe, message_of, printable, shortened
from polyturn.envs.messages import Message
from polyturn.tools.types import ToolUsage


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
    spans: tuple[tuple[str, float, float], ...] = field(default=(), compare=False)
    """What it waited for and when: `generate`, `tools` or `queue`, and seconds from its start, up to
    `deadlines.MAX_SPANS`. For those who look at it; no part of what episodes are compared by."""


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
    """As `envs.tasks.order.task_digest` makes it: an id or a place may come to mean another task."""
    group_reward: float | None = None
    """What group rewards have added to `reward` and `role_rewards`; None: nothing has been added yet."""
    reward_parts: Mapping[str, float] = field(default_factory=dict)
    parent_id: str = ""
    """The id of the episode, the trunk, that this one is a branch of; empty: it is none."""
    branch_turn: int = 0
    """The first turn that was sampled here: those before, counted from 0, are the trunk's. 0 with a parent: it was to
    be a branch, but the environment could not be rebuilt, so that it was played from the start."""
    role_rewards: Mapping[str, float] = field(default_factory=dict)
    """In an episode of several agents the reward of each, by `Segment.role`; one without an entry has `reward`."""
    metrics: Mapping[str, float] = field(default_factory=dict)
    """What the environment counted without rewarding it."""
    num_turns: int = 0
    turn_records: tuple[TurnRecord, ...] = ()
    """Of all turns, in order; empty for a failed episode. Group rewards come on top of what turns were paid."""
    num_tool_calls: int = 0
    num_tool_errors: int = 0
    num_recovered_calls: int = 0
    """Calls that were written with a slip that left one meaning, and made."""
    tools: Mapping[str, ToolUsage] = field(default_factory=dict)
    """By tool: its calls, how they went and what they took; calls of no tool under `(unknown)`."""
    answer: str | None = None
    """What was answered, as the environment says (`ToolEnv.answer_of`); None: no answer was given."""
    messages: tuple[Message, ...] = ()
    segments: tuple[Segment, ...] = ()
    num_drawn_tokens: int = 0
    """Tokens that engines sampled for it, counted where their answers come in; 0 where nobody counted."""
    timings: EpisodeTimings = field(default_factory=EpisodeTimings)
    error: str | None = None
    """Why it failed: a sentence, and in the lines under it a bounded traceback where there is one."""
    failed_part: str = ""
    """What of its environment failed it, such as `tool 'search'`; empty where nobody knows, and where it did not."""

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
    def is_branch(self) -> bool:
        """Whether its first turns are another episode's."""
        return self.branch_turn > 0

    @property
    def num_sampled_tokens(self) -> int:
        return sum(segment.num_sampled for segment in self.segments)

    @property
    def num_lost_tokens(self) -> int:
        """Tokens that engines sampled for it and that no segment has as sampled, so that nothing trains on them."""
        return max(0, self.num_drawn_tokens - self.num_sampled_tokens)


BEST_OF_SAMPLES = "best_of_samples"
"""The metric of an episode that was chosen, or in which messages were: how many were sampled for it. Its tokens are no
samples of the policy, and cannot be trained on."""
MAX_TRACEBACK_CHARS = 4_000
UNEXPECTED_ERROR = "unexpected_error"
POLICY_FAULT = "policy_fault"
USER_FAULT = "user_fault"
"""Stop reason of an attempt whose simulated user could not be played."""
NO_ENGINE = "no_engine"
"""Stop reason of an attempt that no engine answered, however often each was asked."""
PROMPT_TOO_LONG = "prompt_too_long"
LASTING = frozenset({PROMPT_TOO_LONG})
"""Stop reasons of attempts that would fail again however often they are made."""


def failure_reason(error: BaseException) -> str:
    """The stop reason of an attempt that an exception ended."""
    if isinstance(error, UserFault):
        return USER_FAULT
    if isinstance(error, EnvironmentFault):
        return "environment_fault"
    if isinstance(error, EngineUnavailable):
        return NO_ENGINE
    return POLICY_FAULT if isinstance(error, PolicyFault) else UNEXPECTED_ERROR


def failure_text(error: BaseException) -> str:
    """A sentence, and in the lines under it where it came from.

    A fault says itself what failed. Of any other exception the type is named too, and the traceback is kept; so is the
    traceback of what a fault was made of.
    """
    is_fault = failure_reason(error) != UNEXPECTED_ERROR
    sentence = message_of(error) if is_fault else describe(error)
    origin = error.__cause__ if is_fault else error
    if origin is None:
        return sentence
    return f"{sentence}\n{shortened(_trace(origin), MAX_TRACEBACK_CHARS)}"


def failed_part(error: BaseException) -> str:
    """What of an environment an exception came from; empty where it does not say."""
    return error.part if isinstance(error, EnvironmentFault) else ""


def sentence_of(text: str) -> str:
    """The sentence of a `failure_text`."""
    return text.partition("\n")[0]


def _trace(error: BaseException) -> str:
    """The frames, outermost first, and the exception; of what it came from only the nearest cause is named."""
    frames = "".join(traceback.format_tb(error.__traceback__))
    cause = error.__cause__ or error.__context__
    because = f"(after {describe(cause)})\n" if cause is not None else ""
    return printable(f"{because}{frames}{describe(error)}")


def derive_seed(*parts: int | str) -> int:
    """A seed in [0, 2^31) that follows from `parts` alone; different parts give unrelated seeds."""
    text = "/".join(str(part) for part in parts)
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=4).digest()) >> 1
