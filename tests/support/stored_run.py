"""A small stored run and a small stored evaluation, for what reads stored episodes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from polyturn.agents.episode import Episode, EpisodeTimings, Outcome, TurnRecord
from polyturn.agents.ledger import Segment
from polyturn.rollout.store import TrajectoryStore, write_episodes
from polyturn.tools.types import ToolUsage

HOSTILE = (
    "\x1b]0;owned\x07\x1b]52;c;cm0gLXJm\x07\x1b]8;;http://x\x1b\\link"
    "\x9b31m a\u202eb\u2066 \U000e0041\u200b\r<script>"
)


def conversation(answer: str, *, query: str = "capital of France") -> tuple[dict[str, Any], ...]:
    call = {"id": "c1", "type": "function", "function": {"name": "search", "arguments": {"query": query}}}
    return (
        {"role": "system", "content": "You may search."},
        {"role": "user", "content": "Which city is it?"},
        {"role": "assistant", "content": "", "reasoning": "I should look it up.", "tool_calls": [call]},
        {"role": "tool", "name": "search", "tool_call_id": "c1", "content": "Paris is the capital."},
        {"role": "assistant", "content": answer},
    )


def segment(num_prompt: int = 3, num_sampled: int = 4) -> Segment:
    sampled = np.array([False] * num_prompt + [True] * num_sampled)
    return Segment(
        token_ids=np.arange(10, 10 + sampled.size, dtype=np.int32),
        sampled=sampled,
        logprobs=np.where(sampled, -0.5, 0).astype(np.float32),
        policy_versions=np.where(sampled, 2, -1).astype(np.int32),
        turns=np.zeros(sampled.size, dtype=np.int16),
    )


def episode(
    position: int, sample: int, *, reward: float | None = 1.0, attempt: int = 0, **values: Any
) -> Episode:
    """One that succeeded, or, without a reward, an attempt that failed."""
    group = f"g{position:08d}"
    failed = reward is None
    given: dict[str, Any] = {
        "env_id": "polyturn/TwoHop-v0",
        "task_id": f"task-{position}",
        "seed": 7,
        "outcome": Outcome.FAILED if failed else Outcome.COMPLETED,
        "stop_reason": "no_engine" if failed else "terminated",
        "error": "no engine answered\n  a trace" if failed else None,
        "messages": conversation(f"Answer {position}.{sample}"),
        "segments": () if failed else (segment(),),
        "turn_records": () if failed else (TurnRecord(), TurnRecord()),
        "num_turns": 2,
        "num_tool_calls": 1,
        "num_tool_errors": sample % 2,
        "num_drawn_tokens": 4,
        "tools": {"search": ToolUsage(num_calls=1, num_failures=sample % 2, seconds=0.25, max_seconds=0.25)},
        "timings": EpisodeTimings(generate_s=1.0, tools_s=0.25, total_s=1.5),
    }
    return Episode(
        episode_id=f"{group}.{sample}.{attempt}", group_id=group, reward=reward, **{**given, **values}
    )


def make_run(directory: Path) -> Path:
    """Two finished steps of two groups of two, a step under way with a failed attempt, and an evaluation after it."""
    store = TrajectoryStore(directory)
    for step in (1, 2):
        episodes = [
            episode(2 * step - 2 + group, sample, reward=float(sample))
            for group in (0, 1)
            for sample in (0, 1)
        ]
        store.write_step(
            step, episodes, advantages={one.episode_id: (one.reward or 0) - 0.5 for one in episodes}
        )
    # The journal of a finished step is kept until a checkpoint has it.
    store.journal(2, episode(2, 0, reward=0.0))
    store.journal(3, episode(4, 0, reward=None))
    store.journal(3, episode(4, 0, reward=0.25, attempt=1, messages=conversation(HOSTILE), tools={}))
    store.close()
    write_episodes(directory / "evaluation" / "after.parquet", [episode(0, 0)], step=0)
    return directory


def make_evaluation(directory: Path) -> Path:
    """Two entries, one finished, one under way."""
    done, under_way = (TrajectoryStore(directory / "entries" / name) for name in ("qa", "sums"))
    done.write_step(1, [episode(0, 0), episode(0, 1, reward=0.0)])
    under_way.journal(1, episode(1, 0))
    done.close()
    under_way.close()
    return directory
