"""The best of several samples of a policy: of whole episodes, or of the messages of one turn.

What is chosen is no sample of the policy any more: its tokens are likelier among the chosen than among the sampled. So
each such episode says of how many it was chosen (`BEST_OF_SAMPLES`), and the trainer refuses it.
"""

from __future__ import annotations

import asyncio
import json
from collections import Counter
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from polyturn.agents.episode import BEST_OF_SAMPLES, POLICY_FAULT, Episode, Outcome, derive_seed
from polyturn.agents.policies.episodes import NamedPolicy
from polyturn.agents.policy import MessagePolicy, PolicyFault, Reply, as_reply
from polyturn.configs.schema.policies import BestOf
from polyturn.envs.faults import describe
from polyturn.envs.messages import AssistantMessage, EpisodeView, Message, Task, as_score
from polyturn.envs.played_env import PlayedEnv
from polyturn.envs.plugins import Signature, load_plugin
from polyturn.envs.rewards.answers import normalise_answer
from polyturn.envs.rewards.factory import REWARD
from polyturn.tools.types import ToolSpec

MESSAGE_SCORE = Signature(
    what="score of a message",
    arguments=("messages", "message"),
    text="def score(messages: Sequence[Message], message: AssistantMessage) -> float",
    may_be_async=True,
    wrong_results=(str, bytes, list, tuple, dict),
)
COUNTED = "policy_"
"""Begins the names of what a policy counts; of what was chosen among several, over all of them."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Choice:
    """By what one of several is chosen."""

    label: str
    by: str
    score: Callable[..., Any] | None = None
    """A plug-in."""

    async def score_of(self, *arguments: Any) -> float:
        """What the plug-in says. Raises `PolicyFault` where it fails, or gives no number."""
        assert self.score is not None
        try:
            value = self.score(*arguments)
            return as_score(await value if isinstance(value, Awaitable) else value).value
        except Exception as error:  # a user's function may fail in any way: that fails this episode
            raise PolicyFault(f"best_of: the score {self.label}: {describe(error)}") from error


def make_choice(settings: BestOf) -> Choice:
    """What the settings say. Raises `ValueError` for a score that there is not, or that cannot be called so."""
    if settings.by in ("majority", "grade"):
        if settings.by_options:
            raise ValueError(f"best_of: by_options are of a score of one's own, and {settings.by!r} has none")
        if settings.by == "grade" and settings.per == "turn":
            raise ValueError(
                "best_of: a turn has no grade; take per 'episode', or a score of one's own for messages"
            )
        upper = " (an upper bound: no policy knows it)"
        label = f"the environment's grade{upper}" if settings.by == "grade" else settings.by
        return Choice(label=label, by=settings.by)
    signature = REWARD if settings.per == "episode" else MESSAGE_SCORE
    score = load_plugin(signature, settings.by, settings.by_options)
    return Choice(label=settings.by, by="score", score=score)


class BestOfTurns:
    """Asks a policy for several messages in each turn, at once, and says one of them."""

    def __init__(self, policy: MessagePolicy, num_samples: int, choice: Choice) -> None:
        self._policy, self._num_samples, self._choice = policy, num_samples, choice

    async def reply(self, *, messages: Sequence[Message], tools: Sequence[ToolSpec]) -> Reply:
        """The message that is chosen; among those that are whole where there are such.

        Raises:
            PolicyFault: one of the samples, or the score, failed.
        """
        ask = self._policy.reply
        asked = [asyncio.ensure_future(ask(messages=messages, tools=tools)) for _ in range(self._num_samples)]
        try:
            given = await asyncio.gather(*asked)
        finally:
            for one in asked:
                one.cancel()  # those that still run when another failed
        replies = [as_reply(each) for each in given]
        whole = [each for each in replies if each.finish_reason == "stop"] or replies
        if self._choice.score is None:
            chosen = whole[most_common([_said(each.message) for each in whole])]
        else:
            scores = [await self._choice.score_of(messages, each.message) for each in whole]
            chosen = whole[scores.index(max(scores))]
        counts = _summed(each.counts for each in replies)
        return replace(
            chosen,
            counts={**counts, BEST_OF_SAMPLES: float(self._num_samples)},
            waited_s=min(each.waited_s for each in replies),
        )


class BestOfEpisodes:
    """Plays a task several times, one after the other, each time with a seed of its own, and keeps one episode."""

    def __init__(self, inner: NamedPolicy, num_samples: int, choice: Choice, *, label: str) -> None:
        self._inner, self._num_samples, self._choice = inner, num_samples, choice
        self.label = label

    @property
    def max_at_once(self) -> int | None:
        return self._inner.max_at_once

    def check(self, env: PlayedEnv) -> None:
        """What the policy itself says."""
        self._inner.check(env)

    async def play(self, *, env: PlayedEnv, task: Task, seed: int, **episode: Any) -> Episode:
        """The episode that is chosen, with what all of them counted.

        Where one fails all of it has failed: to choose among fewer would be another policy.
        """
        played: list[Episode] = []
        for sample in range(self._num_samples):
            own_seed = derive_seed(seed, "best_of", sample)
            one = await self._inner.play(env=env, task=task, seed=own_seed, **episode)
            if one.outcome is Outcome.FAILED:
                return one
            played.append(one)
        try:
            chosen = played[await self._choose(played, task)]
        except PolicyFault as fault:
            return replace(
                played[0],
                outcome=Outcome.FAILED,
                stop_reason=POLICY_FAULT,
                reward=None,
                reward_parts={},
                role_rewards={},
                turn_records=(),
                error=str(fault),
            )
        counted = _summed(
            {name: value for name, value in one.metrics.items() if name.startswith(COUNTED)} for one in played
        )
        return replace(
            chosen, metrics={**chosen.metrics, **counted, BEST_OF_SAMPLES: float(self._num_samples)}
        )

    async def aclose(self) -> None:
        """Close the policy."""
        await self._inner.aclose()

    async def _choose(self, played: Sequence[Episode], task: Task) -> int:
        """The place of the chosen one: the first among equals."""
        if self._choice.by == "majority":
            return most_common([normalise_answer(_answer(one).content) for one in played])
        if self._choice.score is None:
            scores = [one.reward or 0.0 for one in played]
        else:
            scores = [await self._choice.score_of(_seen(one, task)) for one in played]
        return scores.index(max(scores))


def most_common(values: Sequence[str]) -> int:
    """The place of the first of the values that are given most often."""
    counts = Counter(values)
    return values.index(max(values, key=lambda value: counts[value]))


def _seen(episode: Episode, task: Task) -> EpisodeView:
    """An episode as its policy saw it: no label, no grade."""
    return EpisodeView(
        task=replace(task, label=None, reward=None), message=_answer(episode), messages=episode.messages
    )


def _answer(episode: Episode) -> AssistantMessage:
    said = [message["content"] for message in episode.messages if message["role"] == "assistant"]
    return AssistantMessage(content=said[-1] if said else "")


def _said(message: AssistantMessage) -> str:
    """What two messages have in common that do the same: their calls without ids, or their text, normalised."""
    if message.tool_calls:
        calls = [(call.name, dict(call.arguments), call.error) for call in message.tool_calls]
        return json.dumps(calls, sort_keys=True, default=str)
    return normalise_answer(message.content)


def _summed(counts: Iterable[Mapping[str, float]]) -> dict[str, float]:
    total: dict[str, float] = {}
    for one in counts:
        for name, value in one.items():
            total[name] = total.get(name, 0.0) + value
    return total
