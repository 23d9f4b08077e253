"""Stored episodes are graded again, and no policy is asked.

Where an environment can be rebuilt from its seed and actions (`ToolEnv.is_replayable`), and where an episode was one
answer and nothing else, its messages are said to the environment once more, which grades as it would have: what it
answers must be what is stored. Elsewhere a reward that needs no environment sees the stored conversation.
"""

from __future__ import annotations

import asyncio
import itertools
import re
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence, Set
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from polyturn.agents.deadlines import Slots
from polyturn.agents.episode import Episode, Outcome, sentence_of
from polyturn.agents.policies.episodes import MessageEpisodes
from polyturn.agents.policies.scripted import ScriptedPolicy
from polyturn.agents.policy import MessagePolicy
from polyturn.configs.schema.run import RunConfig
from polyturn.envs.faults import EnvironmentFault, describe
from polyturn.envs.messages import AssistantMessage, EpisodeView, Message, Reward, as_score
from polyturn.envs.played_env import PlayedEnv
from polyturn.envs.registry import make
from polyturn.rollout.evaluation.conduct import prices_of
from polyturn.rollout.evaluation.control import sole_player
from polyturn.rollout.evaluation.directory import entry_directory
from polyturn.rollout.evaluation.plan import EvaluationPlan
from polyturn.rollout.evaluation.recorder import Recorder
from polyturn.rollout.evaluation.records import Failure, ScoredEpisode
from polyturn.rollout.evaluation.scoring import Prices, evaluation_prompt, failure_of, played_place, scored
from polyturn.rollout.evaluation.who_plays import WhoPlays, served
from polyturn.rollout.factory import run_reward
from polyturn.rollout.named_play import named_player
from polyturn.rollout.player import EpisodePlayer
from polyturn.rollout.store import TrajectoryStore
from polyturn.tools.types import ToolCall

SCORER_FAILED = "scorer_failed"


@dataclass(frozen=True, kw_only=True, slots=True)
class Rescored:
    """What came of it."""

    num_scored: int
    num_failed: int
    """That have no score now, either: their lines say why."""
    num_kept: int
    """That were not graded at all, as a limit ended them: they keep the score that they have."""


def wanted(lines: Mapping[Any, ScoredEpisode], name: str, *, everything: bool) -> set[str]:
    """The ids of an entry's episodes that are to be graded: those whose scorer failed, or all that were played."""
    return {
        line.episode_id
        for line in lines.values()
        if line.entry == name
        and (line.failure is Failure.SCORER or (everything and line.failure is Failure.NONE))
    }


def rescore(
    directory: Path,
    plan: EvaluationPlan,
    configs: Sequence[RunConfig],
    *,
    everything: bool,
    on_begin: Callable[[int], object] = lambda _: None,
    on_line: Callable[[ScoredEpisode], object] = lambda _: None,
) -> dict[str, Rescored]:
    """Grade the stored episodes of an evaluation by these configs, one for each entry; what came of each entry.

    Args:
        everything: All that were played; else those alone whose scorer failed.

    Raises:
        EngineError: a judge did not come up.
        ValueError: another process plays the evaluation, or what grades cannot be had.
    """
    prices = prices_of(plan)
    names = [entry.name for entry in plan.entries]
    nobody = WhoPlays(name="oracle")
    results: dict[str, Rescored] = {}
    with sole_player(directory), closing(Recorder(directory, names, prices=prices)) as recorder:
        ids = {name: wanted(recorder.lines, name, everything=everything) for name in names}
        on_begin(sum(map(len, ids.values())))
        if not any(ids.values()):
            return {}
        with served(configs, nobody, log_directory=directory / "logs") as (at_judges, _):
            for name, config in zip(names, at_judges, strict=True):
                if ids[name]:
                    grading = _grade_entry(
                        directory, name, config, recorder, ids=ids[name], prices=prices, on_line=on_line
                    )
                    results[name] = asyncio.run(grading)
    return results


async def _grade_entry(
    directory: Path,
    name: str,
    config: RunConfig,
    recorder: Recorder,
    *,
    ids: Set[str],
    prices: Prices | None,
    on_line: Callable[[ScoredEpisode], object],
) -> Rescored:
    """Grade the stored episodes of these ids of an entry, and write their lines."""
    counts = {"scored": 0, "failed": 0, "kept": 0}
    with (
        closing(named_player(config)) as player,
        closing(make(config.environment.id, **config.environment.options)) as env,
    ):
        grader = _Grader(player, env, run_reward(config))
        at_once = asyncio.Semaphore(player.limits.max_concurrent_episodes)

        async def grade(episode: Episode) -> None:
            async with at_once:
                graded = await grader.grade(episode)
            if graded is None:
                counts["kept"] += 1
                return
            line = scored(graded, entry=name, prices=prices)
            recorder.say(line)
            on_line(line)
            counts["scored" if line.failure is Failure.NONE else "failed"] += 1

        stored = (episode for episode in stored_episodes(directory, name) if episode.episode_id in ids)
        async with asyncio.TaskGroup() as group:
            for episode in stored:
                group.create_task(grade(episode))
    return Rescored(num_scored=counts["scored"], num_failed=counts["failed"], num_kept=counts["kept"])


def stored_episodes(directory: Path, name: str) -> Iterator[Episode]:
    """All stored attempts of an entry."""
    store = TrajectoryStore(entry_directory(directory, name))
    try:
        for step in store.begun_after(-1):
            yield from store.journaled(step)
    finally:
        store.close()


class _Grader:
    """Grades stored episodes of one entry."""

    def __init__(self, player: EpisodePlayer, env: PlayedEnv, reward: Reward | None) -> None:
        self._player, self._env, self._reward = player, env, reward
        limits = player.limits
        self._slots = Slots(
            requests=asyncio.Semaphore(limits.max_concurrent_requests),
            steps=asyncio.Semaphore(limits.max_concurrent_tools),
        )

    async def grade(self, episode: Episode) -> Episode | None:
        """The episode with its new grade, or with why it has none; None: a limit ended it, and nothing grades it."""
        if episode.outcome is Outcome.TRUNCATED:
            return None
        said = actions_of(episode.messages)
        if not said:
            return _without_score(episode, "nothing was said in it")
        is_rebuilt = self._env.is_replayable or (len(said) == 1 and not episode.num_tool_calls)
        if is_rebuilt:
            return await self._said_again(episode, said)
        task = await self._player.task(evaluation_prompt(played_place(episode)[0]))
        reward = task.reward or self._reward
        if reward is None or getattr(reward, "uses_environment_grade", False):
            return _without_score(
                episode,
                f"{self._env.env_id} grades what it has seen, and does not say that it can be rebuilt (is_replayable); "
                "`polyturn eval resume` plays it again",
            )
        view = EpisodeView(
            task=task,
            message=said[-1],
            messages=episode.messages,
            metrics=dict(episode.metrics),
        )
        try:
            value = reward(view)
            score = as_score(await value if isinstance(value, Awaitable) else value)
        except EnvironmentFault as fault:
            return _without_score(episode, str(fault))
        except Exception as error:  # noqa: BLE001  a user's reward may fail in any way: that is a scorer's failure
            return _without_score(episode, describe(error))
        turns = episode.reward_parts.get("turns", 0.0)
        return replace(
            _played(episode),
            reward=turns + score.value,
            reward_parts={**score.parts, **({"turns": turns} if turns else {})},
            answer=self._env.answer_of(said[-1]),
        )

    async def _said_again(self, episode: Episode, said: Sequence[AssistantMessage]) -> Episode:
        """Say its messages to the environment once more."""

        def repeat(env: PlayedEnv, seed: int) -> MessagePolicy:
            del env, seed
            return ScriptedPolicy.saying(said)

        task_index, sample, attempt = played_place(episode)
        again = await self._player.play(
            evaluation_prompt(task_index),
            sample,
            attempt,
            policy=MessageEpisodes("stored", repeat),  # type: ignore[arg-type]
            slots=self._slots,
        )
        if again.outcome is Outcome.FAILED:
            why = sentence_of(again.error or again.stop_reason)
            failed = _without_score(episode, why)
            return (
                failed
                if failure_of(again) is Failure.SCORER
                else replace(failed, failed_part=again.failed_part)
            )
        if _contents(again.messages) != _contents(episode.messages):
            return _without_score(
                episode, "the environment does not say again what it said when it was played"
            )
        return replace(
            _played(episode),
            outcome=again.outcome,
            stop_reason=again.stop_reason,
            reward=again.reward,
            reward_parts=again.reward_parts,
            role_rewards=again.role_rewards,
            turn_records=again.turn_records,
            answer=again.answer,
            metrics={**episode.metrics, **again.metrics},
        )


UNREAD = re.compile(r"The (tool call|call|arguments) could not be read")
"""Begins what a policy is told of a call that nobody could read: the record of the call has nothing of it."""


def actions_of(messages: Sequence[Message]) -> list[AssistantMessage]:
    """The actions of a stored conversation, in order. A call that could not be read is one again."""
    actions = []
    for place, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        told = {
            answer.get("tool_call_id", ""): answer["content"]
            for answer in itertools.takewhile(lambda each: each["role"] == "tool", messages[place + 1 :])
        }
        calls = tuple(_call_of(call, told.get(call["id"], "")) for call in message.get("tool_calls", ()))
        actions.append(
            AssistantMessage(content=message["content"], reasoning=message.get("reasoning"), tool_calls=calls)
        )
    return actions


def _call_of(call: Mapping[str, Any], told: str) -> ToolCall:
    name, arguments = call["function"]["name"], call["function"]["arguments"]
    is_unread = not arguments and UNREAD.match(told)
    return ToolCall(id=call["id"], name=name, arguments=arguments, error=told if is_unread else None)


def _played(episode: Episode) -> Episode:
    """The episode as one that came to its end."""
    return replace(
        episode, outcome=Outcome.COMPLETED, stop_reason="terminated", reward=0.0, error=None, failed_part=""
    )


def _without_score(episode: Episode, why: str) -> Episode:
    return replace(
        episode,
        outcome=Outcome.FAILED,
        stop_reason=SCORER_FAILED,
        reward=None,
        reward_parts={},
        role_rewards={},
        turn_records=(),
        answer=None,
        error=why,
        failed_part="grade",
    )


def _contents(messages: Sequence[Message]) -> list[tuple[str, str]]:
    return [(message["role"], message["content"]) for message in messages]
