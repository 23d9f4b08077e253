"""What an evaluation came to: scores with intervals and coverage, what was spent, and what failed, apart.

A score is the mean over tasks of each task's mean over its scored episodes, so that a task counts the same however many
of its episodes failed. Over all entries it is the mean of the entries' scores. An episode that failed is in no score;
`Coverage` stands beside each and says what share of what was asked for is behind it.
"""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from statistics import fmean
from typing import Literal, TypedDict

import numpy as np

from polyturn.agents.episode import Outcome, sentence_of
from polyturn.rollout.evaluation.estimators import majority_at_k, pass_all_k, pass_at_k
from polyturn.rollout.evaluation.records import EvaluatedEntry, Evaluation, Failure, ScoredEpisode
from polyturn.rollout.evaluation.statistics import CONFIDENCE, Interval, finite_mean, interval, mean_interval

MAX_ERRORS = 5
"""Sentences of failed episodes in a report."""
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
    method: Literal["wilson", "student", "combined", "none"]
    """How the interval was made, as in docs/evaluation_statistics.md."""
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
    entries = tuple(
        EntryReport(
            name=entry.name,
            environment=entry.environment,
            split=entry.split,
            num_tasks=entry.num_tasks,
            samples_per_task=entry.samples_per_task,
            success_score=entry.success_score,
            figures=_figures_of(entry, coverage_floor),
        )
        for entry in evaluation.entries
    )
    return Report(
        suite=evaluation.suite,
        policy=evaluation.policy,
        confidence=CONFIDENCE,
        coverage_floor=coverage_floor,
        entries=entries,
        overall=_overall(evaluation.entries, [entry.figures for entry in entries]),
        pooled=_pooled(evaluation.entries),
    )


def scored_tasks(entry: EvaluatedEntry) -> list[list[ScoredEpisode]]:
    """The scored episodes of each task that has any, in the order of tasks and samples."""
    tasks: dict[int, list[ScoredEpisode]] = defaultdict(list)
    for episode in sorted(entry.episodes, key=lambda episode: (episode.task_index, episode.sample)):
        if episode.failure is Failure.NONE:
            tasks[episode.task_index].append(episode)
    return list(tasks.values())


def score_of(episode: ScoredEpisode) -> float:
    """The score of an episode that has one."""
    assert episode.score is not None, "an episode that did not fail has a score"
    return episode.score


def _figures_of(entry: EvaluatedEntry, coverage_floor: float) -> Figures:
    tasks = scored_tasks(entry)
    coverage = _coverage([entry])
    score = _estimate([[score_of(episode) for episode in task] for task in tasks], coverage.share)
    successes = [[float(score_of(episode) >= entry.success_score) for episode in task] for task in tasks]
    return Figures(
        coverage=coverage,
        score=score,
        verdict=score.mean if score is not None and coverage.share >= coverage_floor else None,
        bounds=_bounds(entry),
        success=_estimate(successes, coverage.share),
        pass_at=_at_each_k(entry, tasks, partial(_passed, entry, pass_at_k)),
        pass_all=_at_each_k(entry, tasks, partial(_passed, entry, pass_all_k)),
        majority=_at_each_k(entry, tasks, _majority),
        **_counted([entry]),
    )


def _overall(entries: Sequence[EvaluatedEntry], figures: Sequence[Figures]) -> Figures:
    """Means over entries for scores, everything together for what was counted."""
    bounds = [figure.bounds for figure in figures if figure.bounds is not None]
    verdicts = [figure.verdict for figure in figures if figure.verdict is not None]
    return Figures(
        coverage=_coverage(entries),
        score=_mean_estimate([figure.score for figure in figures]),
        verdict=fmean(verdicts) if verdicts and len(verdicts) == len(figures) else None,
        bounds=(fmean(low for low, _ in bounds), fmean(high for _, high in bounds))
        if bounds and len(bounds) == len(figures)
        else None,
        success=_mean_estimate([figure.success for figure in figures]),
        pass_at=_mean_at_each_k([figure.pass_at for figure in figures]),
        pass_all=_mean_at_each_k([figure.pass_all for figure in figures]),
        majority=_mean_at_each_k([figure.majority for figure in figures]),
        **_counted(entries),
    )


def _coverage(entries: Sequence[EvaluatedEntry]) -> Coverage:
    failures = Counter(episode.failure for entry in entries for episode in entry.episodes)
    num_asked = sum(entry.num_asked for entry in entries)
    scored = failures[Failure.NONE]
    return Coverage(
        num_asked=num_asked,
        num_scored=scored,
        num_infrastructure=failures[Failure.INFRASTRUCTURE],
        num_scorer=failures[Failure.SCORER],
        num_missing=num_asked - failures.total(),
        num_tasks=sum(entry.num_tasks for entry in entries),
        num_scored_tasks=sum(len(scored_tasks(entry)) for entry in entries),
        share=scored / num_asked if num_asked else 0.0,
    )


def _estimate(tasks: Sequence[Sequence[float]], coverage: float) -> Estimate | None:
    if not tasks:
        return None
    found = interval(tasks)
    return Estimate(
        mean=found.mean,
        low=found.low,
        high=found.high,
        method=found.method,
        num_tasks=len(tasks),
        coverage=coverage,
    )


def _mean_estimate(estimates: Sequence[Estimate | None]) -> Estimate | None:
    """The mean over entries, of those that have one."""
    there = [estimate for estimate in estimates if estimate is not None]
    if not there:
        return None
    found = mean_interval([_interval_of(estimate) for estimate in there])
    return Estimate(
        mean=found.mean,
        low=found.low,
        high=found.high,
        method=found.method,
        num_tasks=sum(estimate.num_tasks for estimate in there),
        coverage=sum(estimate.coverage for estimate in there) / len(estimates),
    )


def _interval_of(estimate: Estimate) -> Interval:
    return Interval(mean=estimate.mean, low=estimate.low, high=estimate.high, method=estimate.method)


def _pooled(entries: Sequence[EvaluatedEntry]) -> Estimate | None:
    tasks = [[score_of(episode) for episode in task] for entry in entries for task in scored_tasks(entry)]
    return _estimate(tasks, _coverage(entries).share)


def _bounds(entry: EvaluatedEntry) -> tuple[float, float] | None:
    scores = [score_of(episode) for task in scored_tasks(entry) for episode in task]
    if entry.num_asked == 0 or not all(0 <= score <= 1 for score in scores):
        return None
    low = math.fsum(scores) / entry.num_asked
    return low, min(1.0, low + (entry.num_asked - len(scores)) / entry.num_asked)


Estimator = Callable[[Sequence[ScoredEpisode], int], float]
"""What k samples of one task are worth."""


def _passed(
    entry: EvaluatedEntry, estimator: Callable[[int, int, int], float], task: Sequence[ScoredEpisode], k: int
) -> float:
    num_successes = sum(score_of(episode) >= entry.success_score for episode in task)
    return estimator(len(task), num_successes, k)


def _majority(task: Sequence[ScoredEpisode], k: int) -> float:
    return majority_at_k([episode.answer for episode in task], [score_of(episode) for episode in task], k)


def _at_each_k(
    entry: EvaluatedEntry,
    tasks: Sequence[Sequence[ScoredEpisode]],
    estimator: Estimator,
) -> tuple[AtK, ...]:
    """For k = 1, 2, 4 and so on, and for all samples of a task."""
    found = []
    for k in _each_k(entry.samples_per_task):
        values = [[estimator(task, k)] for task in tasks if len(task) >= k]
        if values:
            estimate = _estimate(values, len(values) / entry.num_tasks)
            assert estimate is not None
            found.append(AtK(k=k, estimate=estimate))
    return tuple(found)


def _each_k(samples_per_task: int) -> list[int]:
    powers = [1 << power for power in range(samples_per_task.bit_length())]
    return sorted({*powers, samples_per_task})


def _mean_at_each_k(entries: Sequence[tuple[AtK, ...]]) -> tuple[AtK, ...]:
    """Over all entries, for each k that all of them have: another k would be a mean of others."""
    by_k: dict[int, list[Estimate | None]] = defaultdict(list)
    for entry in entries:
        for at_k in entry:
            by_k[at_k.k].append(at_k.estimate)
    means = {k: _mean_estimate(found) for k, found in sorted(by_k.items()) if len(found) == len(entries)}
    return tuple(AtK(k=k, estimate=mean) for k, mean in means.items() if mean is not None)


class _Counted(TypedDict):
    """The figures that are counted, of one entry or of all."""

    no_answer_share: float | None
    truncated: Mapping[str, int]
    spending: Spending | None
    cost: Cost | None
    metrics: Mapping[str, float]
    errors: Mapping[str, int]


def _counted(entries: Sequence[EvaluatedEntry]) -> _Counted:
    scored = [episode for entry in entries for task in scored_tasks(entry) for episode in task]
    truncated = Counter(episode.stop_reason for episode in scored if episode.outcome == Outcome.TRUNCATED)
    failed = [
        episode for entry in entries for episode in entry.episodes if episode.failure is not Failure.NONE
    ]
    errors = Counter(sentence_of(episode.error or episode.stop_reason) for episode in failed)
    return _Counted(
        no_answer_share=fmean(episode.answer is None for episode in scored) if scored else None,
        truncated=dict(sorted(truncated.items())),
        spending=_spending(scored) if scored else None,
        cost=_cost(entries),
        metrics=_mean_metrics(scored),
        errors=dict(sorted(errors.items(), key=lambda item: (-item[1], item[0]))[:MAX_ERRORS]),
    )


def _spending(scored: Sequence[ScoredEpisode]) -> Spending:
    num_calls = sum(episode.num_tool_calls for episode in scored)
    return Spending(
        turns=_spread([episode.num_turns for episode in scored]),
        prompt_tokens=_spread([episode.num_prompt_tokens for episode in scored]),
        completion_tokens=_spread([episode.num_completion_tokens for episode in scored]),
        tool_calls=_spread([episode.num_tool_calls for episode in scored]),
        tool_errors=_spread([episode.num_tool_errors for episode in scored]),
        tool_error_share=sum(episode.num_tool_errors for episode in scored) / num_calls if num_calls else 0.0,
        policy_s=_spread([episode.generate_s for episode in scored]),
        tools_s=_spread([episode.tools_s for episode in scored]),
        queue_s=_spread([episode.queue_s for episode in scored]),
        total_s=_spread([episode.total_s for episode in scored]),
    )


def _spread(values: Sequence[float]) -> Spread:
    p50, p90, p99 = np.percentile(np.asarray(values, dtype=np.float64), (50, 90, 99)).tolist()
    total = math.fsum(values)
    return Spread(mean=total / len(values), p50=p50, p90=p90, p99=p99, total=total)


def _cost(entries: Sequence[EvaluatedEntry]) -> Cost | None:
    costs = [episode.cost for entry in entries for episode in entry.episodes if episode.cost is not None]
    if not costs:
        return None
    num_successes = sum(
        score_of(episode) >= entry.success_score
        for entry in entries
        for task in scored_tasks(entry)
        for episode in task
    )
    total = math.fsum(costs)
    return Cost(
        total=total,
        num_priced=len(costs),
        per_episode=total / len(costs),
        per_success=total / num_successes if num_successes else None,
    )


def _mean_metrics(scored: Sequence[ScoredEpisode]) -> dict[str, float]:
    """Without those that are no finite number: JSON has none of them."""
    values: dict[str, list[float]] = defaultdict(list)
    for episode in scored:
        for name, value in episode.metrics.items():
            if math.isfinite(value):
                values[name].append(value)
    return {name: finite_mean(found) for name, found in sorted(values.items())}
