"""What an evaluation keeps of each episode, one line for each, and how it is read back.

The directory of an evaluation:

    evaluation.yaml           what was asked for: the suite, as it was resolved, and who plays
    episodes.jsonl            a line for each episode that has ended, as it ends: a `ScoredEpisode`
    entries/NAME/             the trajectories and logs of one entry of the suite, as `rollout.store` keeps them

The last line of an entry, task and sample is the one that holds: an episode that was lost may have been played again.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum


class Failure(StrEnum):
    """Why an episode has no score."""

    NONE = ""
    """It has one."""
    INFRASTRUCTURE = "infrastructure"
    """An engine, an environment or a tool failed it."""
    SCORER = "scorer"
    """It was played to its end, but what grades could not be had or gave no verdict."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ScoredEpisode:
    """One episode of an evaluation."""

    entry: str
    """The name of the entry of the suite."""
    task_index: int
    """Its place in the split."""
    sample: int
    """Which of the episodes of its task, from 0."""
    task_id: str
    task_digest: str
    """As `envs.tasks.order.task_digest` makes it: two evaluations measured one task where these are the same."""
    seed: int
    episode_id: str
    """In the entry's trajectories."""
    failure: Failure
    score: float | None
    """The reward; None where `failure` is not NONE, and then it is never counted as 0."""
    answer: str | None
    """What was answered, in a form that can be compared and counted; None: no answer was given."""
    outcome: str
    """As `agents.episode.Outcome`."""
    stop_reason: str
    num_turns: int
    num_prompt_tokens: int
    num_completion_tokens: int
    num_tool_calls: int
    num_tool_errors: int
    generate_s: float
    tools_s: float
    queue_s: float
    total_s: float
    cost: float | None = None
    """In the currency of the prices that were given; None: none were."""
    metrics: Mapping[str, float] = field(default_factory=dict)
    error: str | None = None
    """One sentence for each failure."""


@dataclass(frozen=True, kw_only=True, slots=True)
class EvaluatedEntry:
    """One entry of a suite, with every episode that holds, whether or not it has a score."""

    name: str
    environment: str
    split: str
    num_tasks: int
    """Tasks that were asked for."""
    samples_per_task: int
    success_score: float
    """A score of so much and more is a success, which pass@k and pass^k count."""
    episodes: tuple[ScoredEpisode, ...]
    sampling: Mapping[str, object] = field(default_factory=dict)
    """Temperature, limits of tokens and turns, and whatever else of how it was played changes a score: a comparison
    warns where two evaluations differ in it."""
    scorer: str = ""
    """Names what gave the scores, and changes with it, such as a digest of the reward's settings."""

    @property
    def num_asked(self) -> int:
        """Episodes that were asked for; coverage is the share of them that has a score."""
        return self.num_tasks * self.samples_per_task


@dataclass(frozen=True, kw_only=True, slots=True)
class Evaluation:
    """One policy on one suite."""

    suite: str
    policy: str
    """Who played: a label for people."""
    entries: tuple[EvaluatedEntry, ...]
