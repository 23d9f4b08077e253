"""How two policies compare on the tasks that both were measured on: paired by task, entry by entry and over all.

B is compared with A: an effect above 0 says that B is better.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum

from polyturn.rollout.evaluation.records import Evaluation
from polyturn.rollout.evaluation.report import COVERAGE_FLOOR


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
    """B was not asked for them, or they are other tasks there by their digest."""
    only_in_b: int
    unscored_in_a: int
    """Asked of both, but A has no scored episode."""
    unscored_in_b: int
    """Asked of both, but B has no scored episode; in neither: counted under A."""


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
    """The 95 % interval of the effect; None, as `high`: one task has none."""
    high: float | None
    p_value: float
    """Two-sided, of no difference."""
    p_adjusted: float
    """After Holm, over the entries; the same as `p_value` over all."""
    minimal_detectable_effect: float | None
    """The true difference that a test like this finds with 80 % power; None for one task."""
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
    raise NotImplementedError
