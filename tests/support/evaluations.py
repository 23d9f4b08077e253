"""Directories of evaluations with episodes of all kinds, made without playing any."""

from __future__ import annotations

from contextlib import closing
from dataclasses import replace
from pathlib import Path

import numpy as np

from polyturn.agents.episode import Episode, EpisodeTimings, Outcome, TurnRecord
from polyturn.agents.ledger import Segment
from polyturn.configs.models import resolve_model_path
from polyturn.envs.messages import Message
from polyturn.rollout.evaluation.directory import EpisodeLog, entry_directory, write_plan
from polyturn.rollout.evaluation.plan import EvaluationPlan, PlannedEntry, Player
from polyturn.rollout.evaluation.records import Failure, ScoredEpisode
from polyturn.rollout.store import TrajectoryStore

ENV_ID = "polyturn/TwoHopSearch-v0"
HOSTILE = "</script>\u2028\u2029\x85\x1b[31m\u202e\x00 ${jndi} \U0001f600\r\n{'a': \"b\"}"
SECRET = "sk-live0123456789abcdef0123"
"""Looks like a key, and is none."""


def conversation(question: str, town: str = "Carnwick") -> tuple[Message, ...]:
    """Two turns with a call in the first, as a dialect numbers calls: each turn's from 0."""
    call = {
        "id": "call_0",
        "type": "function",
        "function": {"name": "search", "arguments": {"query": question}},
    }
    return (
        {"role": "system", "content": "Answer with a name only. Use the search tool to look things up."},
        {"role": "user", "content": question},
        {"role": "assistant", "content": "", "reasoning": "Look it up.", "tool_calls": [call]},
        {"role": "tool", "content": f"It is {town}. {question}", "tool_call_id": "call_0", "name": "search"},
        {"role": "assistant", "content": "", "tool_calls": [call]},
        {"role": "tool", "content": town, "tool_call_id": "call_0", "name": "search"},
        {"role": "assistant", "content": town},
    )


def tokens(length: int = 12, *, first: int = 3) -> Segment:
    """A segment in which every third token was sampled."""
    sampled = np.arange(length) % 3 == 2
    return Segment(
        token_ids=np.arange(first, first + length, dtype=np.int32),
        sampled=sampled,
        logprobs=np.where(sampled, -0.5, 0.0).astype(np.float32),
        policy_versions=np.where(sampled, 0, -1).astype(np.int32),
        turns=(np.arange(length) // 4).astype(np.int16),
    )


def episode(task: int, sample: int, reward: float | None, **changes: object) -> Episode:
    """One play of a task."""
    made = Episode(
        episode_id=f"eval{task:06d}.{sample}.0",
        group_id=f"eval{task:06d}",
        env_id=ENV_ID,
        task_id=f"task-{task}",
        task_digest=f"digest{task}",
        seed=sample,
        outcome=Outcome.FAILED if reward is None else Outcome.COMPLETED,
        stop_reason="terminated",
        reward=reward,
        reward_parts={} if reward is None else {"exact_match": reward},
        metrics={"hops": 2.0},
        num_turns=3,
        turn_records=(TurnRecord(),) * (0 if reward is None else 3),
        num_tool_calls=2,
        messages=conversation(f"In which town is employer {task} of {sample} based?"),
        segments=(tokens(first=3 + task + sample),),
        timings=EpisodeTimings(generate_s=0.5, tools_s=0.25, total_s=1.0),
        error="the engine was away" if reward is None else None,
    )
    return replace(made, **changes)  # type: ignore[arg-type]


def episodes() -> list[Episode]:
    """Of one task each: two that passed, of which one in fewer turns; hostile texts; a key in a text; one that a limit
    ended; one that failed; and one whose conversation another task had, too."""
    hostile = (*conversation(HOSTILE, HOSTILE)[:6], {"role": "assistant", "content": HOSTILE})
    secret = conversation(f"My api_key={SECRET} is new")
    return [
        episode(0, 0, 1.0),
        episode(0, 1, 1.0, num_turns=2, turn_records=(TurnRecord(),) * 2),
        episode(1, 0, 1.0, messages=hostile, task_id=f"../{HOSTILE}"),
        episode(2, 0, 1.0, messages=secret),
        episode(3, 0, 0.0, outcome=Outcome.TRUNCATED, stop_reason="max_turns"),
        episode(4, 0, None),
        episode(5, 0, 1.0, messages=episode(0, 0, 1.0).messages),
        episode(6, 0, 0.25, segments=()),
    ]


def make_evaluation(directory: Path, *, entries: tuple[str, ...] = ("one",)) -> Path:
    """An evaluation of the tiny model in which every entry has these episodes, and a line without a trajectory."""
    model = str(resolve_model_path("builtin:tiny-searcher"))
    write_plan(
        directory,
        EvaluationPlan(
            suite="two",
            player=Player(name="model", label="tiny", model=model),
            package="1.0",
            created="2026-01-31T12:00:00+00:00",
            entries=[
                PlannedEntry(
                    name=name,
                    environment=ENV_ID,
                    split="heldout",
                    num_tasks=9,
                    samples_per_task=2,
                    success_score=1.0,
                    config={"environment": {"id": ENV_ID}},
                )
                for name in entries
            ],
        ),
    )
    with closing(EpisodeLog(directory)) as log:
        for name in entries:
            store = TrajectoryStore(entry_directory(directory, name))
            for each in episodes():
                store.journal(0, each)
                log.append(scored(name, each))
            log.append(scored(name, episode(8, 0, 1.0)))
            store.close()
    return directory


def scored(entry: str, each: Episode) -> ScoredEpisode:
    """The line of an episode."""
    return ScoredEpisode(
        entry=entry,
        task_index=int(each.group_id.removeprefix("eval")),
        sample=each.seed,
        task_id=each.task_id,
        task_digest=each.task_digest,
        seed=each.seed,
        episode_id=each.episode_id,
        failure=Failure.NONE if each.reward is not None else Failure.INFRASTRUCTURE,
        score=each.reward,
        answer=None if each.reward is None else each.messages[-1]["content"],
        outcome=str(each.outcome),
        stop_reason=each.stop_reason,
        num_turns=each.num_turns,
        num_prompt_tokens=8,
        num_completion_tokens=4,
        num_tool_calls=2,
        num_tool_errors=0,
        generate_s=0.5,
        tools_s=0.25,
        queue_s=0.0,
        total_s=1.0,
        error=each.error,
    )
