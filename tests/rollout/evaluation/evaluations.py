"""Evaluations made of scores, for tests."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from hypothesis import strategies as st

from polyturn.rollout.evaluation.records import EvaluatedEntry, Evaluation, Failure, ScoredEpisode


def episode(
    entry: str = "math", task: int = 0, sample: int = 0, score: float | None = 1.0, **values: Any
) -> ScoredEpisode:
    """An episode; without a score one that infrastructure failed."""
    failure = Failure.NONE if score is not None else Failure.INFRASTRUCTURE
    fields: dict[str, Any] = {
        "entry": entry,
        "task_index": task,
        "sample": sample,
        "task_id": f"task-{task}",
        "task_digest": f"{task:016x}",
        "seed": sample,
        "episode_id": f"{entry}-{task}-{sample}",
        "failure": failure,
        "score": score,
        "answer": None if score is None else str(score),
        "outcome": "failed" if score is None else "completed",
        "stop_reason": "environment_fault" if score is None else "terminated",
        "num_turns": 2,
        "num_prompt_tokens": 100,
        "num_completion_tokens": 20,
        "num_tool_calls": 1,
        "num_tool_errors": 0,
        "generate_s": 1.0,
        "tools_s": 0.5,
        "queue_s": 0.25,
        "total_s": 2.0,
        "error": "the search server is gone" if score is None else None,
    }
    return ScoredEpisode(**{**fields, **values})


def entry_of(
    scores: Sequence[Sequence[float | None]], name: str = "math", *, samples: int | None = None, **values: Any
) -> EvaluatedEntry:
    """An entry of the scores of each task's episodes."""
    fields: dict[str, Any] = {
        "environment": "polyturn/Math-v0",
        "split": "test",
        "num_tasks": len(scores),
        "samples_per_task": samples or max(len(task) for task in scores),
        "success_score": 1.0,
        "episodes": tuple(
            episode(name, task, sample, score)
            for task, found in enumerate(scores)
            for sample, score in enumerate(found)
        ),
    }
    return EvaluatedEntry(name=name, **{**fields, **values})


def evaluation_of(*entries: EvaluatedEntry, suite: str = "suite", policy: str = "model") -> Evaluation:
    return Evaluation(suite=suite, policy=policy, entries=entries)


SCORES = st.one_of(st.sampled_from([0.0, 1.0]), st.floats(0, 1), st.floats(-3, 3))
SECONDS = st.floats(0, 1e4)


@st.composite
def episodes(draw: st.DrawFn, name: str, task: int, sample: int) -> ScoredEpisode:
    failure = draw(
        st.sampled_from([Failure.NONE, Failure.NONE, Failure.NONE, Failure.INFRASTRUCTURE, Failure.SCORER])
    )
    failed = failure is not Failure.NONE
    return episode(
        name,
        task,
        sample,
        None if failed else draw(SCORES),
        failure=failure,
        answer=draw(st.sampled_from([None, "1", "2", "3"])),
        outcome="failed" if failed else draw(st.sampled_from(["completed", "truncated"])),
        stop_reason=draw(st.sampled_from(["max_turns", "max_tokens"])),
        num_tool_calls=draw(st.integers(0, 3)),
        generate_s=draw(SECONDS),
        cost=draw(st.one_of(st.none(), st.floats(0, 10))),
        metrics=draw(st.dictionaries(st.sampled_from("ab"), st.floats())),
        error="gone" if failed else None,
    )


@st.composite
def entries(draw: st.DrawFn, name: str) -> EvaluatedEntry:
    num_tasks, samples = draw(st.integers(1, 4)), draw(st.integers(1, 5))
    places = [(task, sample) for task in range(num_tasks) for sample in range(samples)]
    played = draw(st.lists(st.sampled_from(places), unique=True, max_size=len(places)))
    return EvaluatedEntry(
        name=name,
        environment="polyturn/Math-v0",
        split="test",
        num_tasks=num_tasks,
        samples_per_task=samples,
        success_score=draw(st.sampled_from([1.0, 0.5])),
        episodes=tuple(draw(episodes(name, task, sample)) for task, sample in played),
    )


@st.composite
def evaluations(draw: st.DrawFn) -> Evaluation:
    names = ["math", "search"][: draw(st.integers(1, 2))]
    return evaluation_of(*(draw(entries(name)) for name in names))
