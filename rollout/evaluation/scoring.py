"""From an episode that has ended to the line that an evaluation keeps of it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from polyturn.agents.episode import Episode, Outcome, sentence_of
from polyturn.rollout.evaluation.records import Failure, ScoredEpisode
from polyturn.rollout.groups import Prompt, parse_episode_id

GROUP = "eval"
SCORERS = frozenset(("grade", "reward", "answer_of"))
"""What of an environment fails an episode that was played to its end."""
PER_TOKENS = 1_000_000
"""Of how many tokens a price is."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Prices:
    """What tokens cost, by a million of them."""

    prompt: float
    completion: float
    cached_prompt: float
    """Of prompt tokens that were known already, as a server with a cache of prefixes knows those of earlier turns."""

    def cost_of(self, *, prompt: int, completion: int, cached: int) -> float:
        """What an episode cost."""
        paid = (prompt - cached) * self.prompt + cached * self.cached_prompt + completion * self.completion
        return paid / PER_TOKENS


def evaluation_prompt(task_index: int) -> Prompt:
    """The prompt of a task, which every evaluation plays under the same identity and so with the same seeds."""
    return Prompt(task_index=task_index, epoch=0, position=task_index, group_id=f"{GROUP}{task_index:06d}")


def played_place(episode: Episode) -> tuple[int, int, int]:
    """Task index, sample and attempt of an evaluation's episode."""
    group_id, sample, attempt = parse_episode_id(episode.episode_id)
    return int(group_id.removeprefix(GROUP)), sample, attempt


def failure_of(episode: Episode) -> Failure:
    """Why an episode has no score."""
    if episode.outcome is not Outcome.FAILED:
        return Failure.NONE
    return Failure.SCORER if episode.failed_part in SCORERS else Failure.INFRASTRUCTURE


def scored(episode: Episode, *, entry: str, prices: Prices | None) -> ScoredEpisode:
    """The line of an episode."""
    task_index, sample, _ = played_place(episode)
    num_prompt, num_completion, num_cached = num_tokens(episode)
    cost = None
    if prices is not None:
        cost = prices.cost_of(prompt=num_prompt, completion=num_completion, cached=num_cached)
    return ScoredEpisode(
        entry=entry,
        task_index=task_index,
        sample=sample,
        task_id=episode.task_id,
        task_digest=episode.task_digest,
        seed=episode.seed,
        episode_id=episode.episode_id,
        failure=failure_of(episode),
        score=episode.reward,
        answer=episode.answer,
        outcome=str(episode.outcome),
        stop_reason=episode.stop_reason,
        num_turns=episode.num_turns,
        num_prompt_tokens=num_prompt,
        num_completion_tokens=num_completion,
        num_tool_calls=episode.num_tool_calls,
        num_tool_errors=episode.num_tool_errors,
        generate_s=episode.timings.generate_s,
        tools_s=episode.timings.tools_s,
        queue_s=episode.timings.queue_s,
        total_s=episode.timings.total_s,
        cost=cost,
        metrics=_recorded(episode.metrics),
        error=None if episode.error is None else sentence_of(episode.error),
    )


def num_tokens(episode: Episode) -> tuple[int, int, int]:
    """Tokens of prompts, of completions, and those of the prompts that were known already.

    Counted as they are paid for: every request has the whole conversation so far as its prompt. Where engines gave the
    tokens they are counted in the ledger; else as the endpoint counted them.
    """
    if not episode.segments:
        counted = [
            int(episode.metrics.get(f"policy_{kind}_tokens", 0))
            for kind in ("prompt", "completion", "cached")
        ]
        return counted[0], counted[1], min(counted[2], counted[0])
    num_prompt = num_cached = 0
    for segment in episode.segments:
        starts = np.flatnonzero(np.diff(segment.sampled.astype(np.int8), prepend=0) == 1)
        num_prompt += int(starts.sum())
        num_cached += int(starts[:-1].sum())
    return num_prompt, max(episode.num_drawn_tokens, episode.num_sampled_tokens), num_cached


def _recorded(metrics: Mapping[str, float]) -> dict[str, float]:
    return {name: float(value) for name, value in metrics.items()}
