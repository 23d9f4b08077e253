"""How two policies compare on the tasks that both were measured on: paired by task, entry by entry and over all.

B is compared with A: an effect above 0 says that B is better.
"""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from statistics import fmean

import numpy as np

from polyturn.rollout.evaluation.paired import (
    Array,
    Effect,
    effect_of,
    holm,
    mean_effect,
    sign_flip_p_value,
)
from polyturn.rollout.evaluation.records import EvaluatedEntry, Evaluation, Failure, ScoredEpisode
from polyturn.rollout.evaluation.report import COVERAGE_FLOOR, score_of
from polyturn.rollout.evaluation.statistics import CONFIDENCE


class Verdict(StrEnum):
    """What a comparison says at 5 %."""

    BETTER = "better"
    """B scores higher than A."""
    WORSE = "worse"
    UNDECIDED = "undecided"
    """No difference was found; the smallest that would have been is `minimal_detectable_effect`."""
    NONE = "none"
    """Too little of what was asked for was scored to say."""


@dataclass(frozen=True, kw_only=True, slots=True)
class LeftOut:
    """Tasks that are not compared, and why."""

    only_in_a: int
    """B has no episode of them, or other tasks by their digest."""
    only_in_b: int
    unscored_in_a: int
    """Played by both, but A has no scored episode."""
    unscored_in_b: int
    """Played by both, but B has no scored episode; where neither has, they count under A."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TaskPair:
    """One task as both did it."""

    entry: str
    task_id: str
    task_digest: str
    a: float
    """The mean score of A's episodes."""
    b: float


@dataclass(frozen=True, kw_only=True, slots=True)
class PairedResult:
    """A paired test over tasks."""

    num_tasks: int
    a: float
    """The mean over these tasks."""
    b: float
    effect: float
    """b - a."""
    low: float | None
    """The 95 % interval of the effect; None, as `high`: scores that leave 0 to 1 and are all the same have none."""
    high: float | None
    p_value: float
    """Two-sided, of no difference."""
    p_adjusted: float
    """After Holm, over the entries; the same as `p_value` over all."""
    minimal_detectable_effect: float | None
    """The true difference that a test like this finds with 80 % power; None as `low`, and where scores from 0 to 1
    allow none so large: of so few tasks no difference is found."""
    verdict: Verdict


@dataclass(frozen=True, kw_only=True, slots=True)
class EntryComparison:
    """One entry of both evaluations."""

    name: str
    left_out: LeftOut
    result: PairedResult | None
    """None: no task was measured in both."""
    gained: tuple[TaskPair, ...]
    """Tasks that most of A's episodes failed and most of B's solved."""
    lost: tuple[TaskPair, ...]
    """Tasks that most of A's episodes solved and most of B's failed."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Comparison:
    """What `polyturn eval compare` prints."""

    a: str
    """The policy of A: a label for people."""
    b: str
    confidence: float
    coverage_floor: float
    warnings: tuple[str, ...]
    """Where the two were not measured alike: suites, sampling, scorers, success scores, samples of each task."""
    entries: tuple[EntryComparison, ...]
    """Those of both, in A's order."""
    entries_left_out: Mapping[str, str]
    """Names of entries in one of them alone, and in which."""
    overall: PairedResult
    """The mean over entries, which count the same."""


def compare(a: Evaluation, b: Evaluation, *, coverage_floor: float = COVERAGE_FLOOR) -> Comparison:
    """Compare B with A.

    Raises `ValueError` where no task was measured in both.
    """
    of_b = {entry.name: entry for entry in b.entries}
    pairs = [_pair(entry, of_b[entry.name]) for entry in a.entries if entry.name in of_b]
    measured = [pair for pair in pairs if pair.tasks]
    if not measured:
        raise ValueError(_nothing_shared(a, b, pairs))
    p_values = [sign_flip_p_value(pair.differences) for pair in measured]
    adjusted = dict(
        zip([pair.name for pair in measured], zip(p_values, holm(p_values), strict=True), strict=True)
    )
    weights = [pair.differences / (len(pair.tasks) * len(measured)) for pair in measured]
    overall_p = p_values[0] if len(measured) == 1 else sign_flip_p_value(np.concatenate(weights))
    covered = {pair.name: min(_coverage(pair.a), _coverage(pair.b)) >= coverage_floor for pair in pairs}
    only_a = {entry.name: "only in A" for entry in a.entries if entry.name not in of_b}
    only_b = {entry.name: "only in B" for entry in b.entries if entry.name not in {e.name for e in a.entries}}
    return Comparison(
        a=a.policy,
        b=b.policy,
        confidence=CONFIDENCE,
        coverage_floor=coverage_floor,
        warnings=(
            *_suite_warnings(a, b),
            *(said for pair in pairs for said in _warnings(pair, coverage_floor)),
        ),
        entries=tuple(
            EntryComparison(
                name=pair.name,
                left_out=pair.left_out,
                result=_result(pair.effect, [pair], *adjusted[pair.name], is_covered=covered[pair.name])
                if pair.tasks
                else None,
                gained=tuple(task for task, was, is_now in pair.solved if was < 0.5 < is_now),
                lost=tuple(task for task, was, is_now in pair.solved if is_now < 0.5 < was),
            )
            for pair in pairs
        ),
        entries_left_out=only_a | only_b,
        overall=_result(
            mean_effect([pair.effect for pair in measured]),
            measured,
            overall_p,
            overall_p,
            is_covered=all(covered.values()),
        ),
    )


@dataclass(frozen=True, kw_only=True, slots=True)
class _Pair:
    """One entry of both, with the tasks that were measured in both."""

    a: EvaluatedEntry
    b: EvaluatedEntry
    tasks: tuple[TaskPair, ...]
    solved: tuple[tuple[TaskPair, float, float], ...]
    """Each with the share of A's and of B's episodes that are successes."""
    left_out: LeftOut
    num_changed: int
    """Tasks of one id that are others by their digest."""

    @property
    def name(self) -> str:
        return self.a.name

    @property
    def differences(self) -> Array:
        return np.array([task.b - task.a for task in self.tasks], dtype=np.float64)

    @property
    def effect(self) -> Effect:
        return effect_of(self.differences, scale=self.scale)

    @property
    def scale(self) -> float:
        """The largest difference that scores allow: 1, or how far those lie apart that leave 0 to 1."""
        scores = [score for task in self.tasks for score in (task.a, task.b)]
        low, high = min(scores), max(scores)
        return 1.0 if low >= 0 and high <= 1 else high - low


def _pair(a: EvaluatedEntry, b: EvaluatedEntry) -> _Pair:
    of_a, of_b = _episodes_by_task(a), _episodes_by_task(b)
    tasks, solved, unscored_in_a, unscored_in_b = [], [], 0, 0
    for key in (key for key in of_a if key in of_b):
        scored_a, scored_b = _scored(of_a[key]), _scored(of_b[key])
        if not scored_a:
            unscored_in_a += 1
        elif not scored_b:
            unscored_in_b += 1
        else:
            first = of_a[key][0]
            task = TaskPair(
                entry=a.name,
                task_id=first.task_id,
                task_digest=first.task_digest,
                a=_mean(scored_a),
                b=_mean(scored_b),
            )
            tasks.append(task)
            solved.append((task, _success_share(scored_a, a), _success_share(scored_b, b)))
    only_a, only_b = of_a.keys() - of_b.keys(), of_b.keys() - of_a.keys()
    ids_a = {of_a[key][0].task_id for key in only_a}
    return _Pair(
        a=a,
        b=b,
        tasks=tuple(tasks),
        solved=tuple(solved),
        left_out=LeftOut(
            only_in_a=len(only_a),
            only_in_b=len(only_b),
            unscored_in_a=unscored_in_a,
            unscored_in_b=unscored_in_b,
        ),
        num_changed=len(ids_a & {of_b[key][0].task_id for key in only_b}),
    )


def _episodes_by_task(entry: EvaluatedEntry) -> Mapping[tuple[str, int], Sequence[ScoredEpisode]]:
    """By digest and how often it stands before: a task that a split has twice counts twice, as in a report."""
    places: dict[int, list[ScoredEpisode]] = defaultdict(list)
    for episode in sorted(entry.episodes, key=lambda episode: (episode.task_index, episode.sample)):
        places[episode.task_index].append(episode)
    num_before: Counter[str] = Counter()
    tasks: dict[tuple[str, int], list[ScoredEpisode]] = {}
    for episodes in places.values():
        identity = episodes[0].task_digest or f"id {episodes[0].task_id}"
        tasks[identity, num_before[identity]] = episodes
        num_before[identity] += 1
    return tasks


def _scored(episodes: Sequence[ScoredEpisode]) -> list[float]:
    return [score_of(episode) for episode in episodes if episode.failure is Failure.NONE]


def _mean(scores: Sequence[float]) -> float:
    return math.fsum(scores) / len(scores)


def _success_share(scores: Sequence[float], entry: EvaluatedEntry) -> float:
    return fmean(score >= entry.success_score for score in scores)


def _coverage(entry: EvaluatedEntry) -> float:
    num_scored = sum(episode.failure is Failure.NONE for episode in entry.episodes)
    return num_scored / entry.num_asked if entry.num_asked else 0.0


def _result(
    effect: Effect, pairs: Sequence[_Pair], p_value: float, p_adjusted: float, *, is_covered: bool
) -> PairedResult:
    low, high = effect.interval or (None, None)
    detectable, is_bounded = effect.minimal_detectable, all(pair.scale == 1 for pair in pairs)
    if low is not None and high is not None and is_bounded:
        low, high = max(low, -1.0), min(high, 1.0)
    if detectable is not None and detectable > 1 and is_bounded:
        detectable = None
    return PairedResult(
        num_tasks=sum(len(pair.tasks) for pair in pairs),
        a=fmean(_mean([task.a for task in pair.tasks]) for pair in pairs),
        b=fmean(_mean([task.b for task in pair.tasks]) for pair in pairs),
        effect=effect.mean,
        low=low,
        high=high,
        p_value=p_value,
        p_adjusted=p_adjusted,
        minimal_detectable_effect=detectable,
        verdict=_verdict(effect, p_adjusted) if is_covered else Verdict.NONE,
    )


def _verdict(effect: Effect, p_value: float) -> Verdict:
    if p_value >= 1 - CONFIDENCE:
        return Verdict.UNDECIDED
    return Verdict.BETTER if effect.mean > 0 else Verdict.WORSE


def _nothing_shared(a: Evaluation, b: Evaluation, pairs: Sequence[_Pair]) -> str:
    if not pairs:
        return (
            f"A and B share no entry: A has {_listed(entry.name for entry in a.entries)}, "
            f"B has {_listed(entry.name for entry in b.entries)}; compare evaluations of one suite"
        )
    if any(pair.num_changed for pair in pairs):
        return "A and B share task ids, but the tasks themselves are others (by digest): evaluate one of them again"
    unscored = sum(pair.left_out.unscored_in_a + pair.left_out.unscored_in_b for pair in pairs)
    if unscored:
        return f"A and B share {unscored} tasks, but none of them has a score in both: polyturn eval resume plays them"
    return "A and B share entries, but no task in them: compare evaluations of one suite and split"


def _suite_warnings(a: Evaluation, b: Evaluation) -> list[str]:
    return [f"suites differ: A played '{a.suite}', B '{b.suite}'"] if a.suite != b.suite else []


def _warnings(pair: _Pair, coverage_floor: float) -> list[str]:
    """What stands in the way of calling a difference one of the policies."""
    a, b, name = pair.a, pair.b, pair.name
    compared = [
        ("environment", a.environment, b.environment),
        ("split", a.split, b.split),
        ("scorer", a.scorer, b.scorer),
        ("success score", a.success_score, b.success_score),
        ("samples of each task", a.samples_per_task, b.samples_per_task),
        *(
            (f"sampling.{key}", a.sampling.get(key), b.sampling.get(key))
            for key in sorted({*a.sampling, *b.sampling})
        ),
    ]
    said = [
        f"{name}: {what} differs: {of_a!r} in A, {of_b!r} in B"
        for what, of_a, of_b in compared
        if of_a != of_b
    ]
    if pair.num_changed:
        said.append(f"{name}: {pair.num_changed} tasks have one id in both, but are others by their digest")
    for side, entry in (("A", a), ("B", b)):
        if (share := _coverage(entry)) < coverage_floor:
            said.append(
                f"{name}: {share:.1%} of {side}'s episodes have a score, {coverage_floor:.0%} are needed"
            )
    return said


def _listed(names: Iterable[str]) -> str:
    return ", ".join(f"'{name}'" for name in names) or "none"
