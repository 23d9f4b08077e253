"""What an evaluation came to: scores with intervals and coverage, what was spent, and what failed, apart.

A score is the mean over tasks of each task's mean over its scored episodes, so that a task counts the same however many
of its episodes failed. Over all entries it is the mean of the entries' scores. An episode that failed is in no score;
`Coverage` stands beside each and says what share of what was asked for is behind it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from polyturn.rollout.evaluation.records import Evaluation

COVERAGE_FLOOR = 0.95
"""Below this share of scored episodes a score is shown, but is no verdict."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Coverage:
    """Where the episodes that were asked for are: scored + infrastructure + scorer + missing = asked."""

    num_asked: int
    num_scored: int
    num_infrastructure: int
    """An engine, an environment or a tool failed them."""
    num_scorer: int
    """Played to their end, but what grades gave no verdict."""
    num_missing: int
    """Not played, or not to their end."""
    num_tasks: int
    """Tasks that were asked for."""
    num_scored_tasks: int
    """Tasks with at least one scored episode."""
    share: float
    """Scored of asked; 0 where nothing was asked for."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Estimate:
    """A mean over tasks, with its 95 % interval."""

    mean: float
    low: float | None
    """None, as `high`: what was measured has no interval, such as one task whose scores have no known bounds."""
    high: float | None
    method: str
    """How the interval was made: the name of a section of docs/evaluation_statistics.md."""
    num_tasks: int
    """Tasks behind it."""
    coverage: float
    """The share of what it needs that was there: of episodes for a score, of tasks for what needs k of each."""


@dataclass(frozen=True, kw_only=True, slots=True)
class AtK:
    """An estimate for k samples of each task; tasks with fewer scored ones are left out."""

    k: int
    estimate: Estimate


@dataclass(frozen=True, kw_only=True, slots=True)
class Spread:
    """How a quantity lies over scored episodes."""

    mean: float
    p50: float
    p90: float
    p99: float
    total: float


@dataclass(frozen=True, kw_only=True, slots=True)
class Spending:
    """What scored episodes took."""

    turns: Spread
    prompt_tokens: Spread
    completion_tokens: Spread
    tool_calls: Spread
    tool_errors: Spread
    tool_error_share: float
    """Of all tool calls; 0 where there were none."""
    policy_s: Spread
    """Seconds in which the policy generated."""
    tools_s: Spread
    queue_s: Spread
    """Seconds in which the episode waited for its turn."""
    total_s: Spread


@dataclass(frozen=True, kw_only=True, slots=True)
class Cost:
    """In the currency of the prices that were given. Episodes that failed were paid for, too."""

    total: float
    num_priced: int
    """Episodes with a price."""
    per_episode: float
    per_success: float | None
    """The total over the successes; None where there are none."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Figures:
    """The figures of one entry, or of all of them."""

    coverage: Coverage
    verdict: float | None
    """The score, where coverage reaches the floor; else None."""
    score: Estimate | None
    """avg@k, k the samples of each task. None: nothing was scored."""
    bounds: tuple[float, float] | None
    """Of the score, whatever those without one had got, from 0 to 1 (Manski 1989); None where scores leave 0 to 1."""
    success: Estimate | None
    """The share of scored episodes that reached `success_score`."""
    pass_at: tuple[AtK, ...]
    """pass@k: at least one of k succeeds."""
    pass_all: tuple[AtK, ...]
    """pass^k: all k succeed."""
    majority: tuple[AtK, ...]
    """majority@k: the score of the answer that most of k gave."""
    no_answer_share: float | None
    """Of scored episodes."""
    truncated: Mapping[str, int]
    """Scored episodes that a limit ended, by the limit."""
    spending: Spending | None
    cost: Cost | None
    metrics: Mapping[str, float]
    """What environments counted: means over the scored episodes that have it."""
    errors: Mapping[str, int]
    """The most frequent sentences of failed episodes, with their counts."""


@dataclass(frozen=True, kw_only=True, slots=True)
class EntryReport:
    """One entry of the suite."""

    name: str
    environment: str
    split: str
    num_tasks: int
    samples_per_task: int
    success_score: float
    figures: Figures


@dataclass(frozen=True, kw_only=True, slots=True)
class Report:
    """What `polyturn eval report` prints, and report.json holds."""

    suite: str
    policy: str
    confidence: float
    coverage_floor: float
    entries: tuple[EntryReport, ...]
    overall: Figures
    """Means over entries, which count the same; counts, spending and cost are of all episodes together."""
    pooled: Estimate | None
    """The score over the tasks of all entries together, so that an entry counts as much as it has tasks."""


def report_of(evaluation: Evaluation, *, coverage_floor: float = COVERAGE_FLOOR) -> Report:
    """The report of an evaluation, whether or not that is complete."""
    raise NotImplementedError
