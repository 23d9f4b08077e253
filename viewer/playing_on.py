"""Playing an episode on from one of its turns, with a policy that is served.

The environment is made anew with the run's options and reset with the episode's task and seed, and the stored messages
of the turns before are stepped again. Where it then answers otherwise than it did, the page is told where.
"""

from __future__ import annotations

import asyncio
import hmac
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from pydantic import ValidationError

from polyturn.agents.episode import Episode, failure_text, sentence_of
from polyturn.agents.policies.episodes import MessageEpisodes
from polyturn.agents.policy import MessagePolicy, Reply
from polyturn.configs.errors import ConfigError
from polyturn.configs.loading.loader import load_config
from polyturn.configs.schema.run import RunConfig
from polyturn.envs.messages import AssistantMessage, EnvironmentChoice, Message, Task, TaskSource
from polyturn.envs.played_env import PlayedEnv
from polyturn.envs.process_env import make_for_rollout
from polyturn.envs.tasks.order import task_digest
from polyturn.rollout.evaluation.directory import read_plan
from polyturn.rollout.factory import episode_limits, run_reward, tasks_of
from polyturn.tools.types import ToolCall, ToolSpec
from polyturn.viewer.answers import Answers, Conflict
from polyturn.viewer.catalogue import ViewedRun
from polyturn.viewer.conversation import shown_messages
from polyturn.viewer.episode_sets import EpisodeSet
from polyturn.viewer.parameters import BadParameter, NotThere, Parameters
from polyturn.viewer.plain_json import Json, finite, text_of

MAX_PLAYS = 32
"""Kept to be shown; older ones are forgotten."""
MAX_TASKS = 1_000_000


@dataclass(kw_only=True)
class _Play:
    """One episode that is played on."""

    messages: list[Message] = field(default_factory=list)
    differences: list[str] = field(default_factory=list)
    state: str = "playing"
    reason: str | None = None
    episode: Episode | None = None
    running: asyncio.Task[None] | None = None


class Replaying:
    """A policy that says what was said up to a turn, and then asks another one."""

    def __init__(
        self,
        said: Sequence[AssistantMessage],
        heard: Sequence[Sequence[Message]],
        then: MessagePolicy,
        play: _Play,
    ) -> None:
        """`heard[i]`: the conversation before the i-th answer, as it was stored."""
        self._said = said
        self._heard = heard
        self._then = then
        self._play = play
        self._turn = 0

    async def reply(
        self, *, messages: Sequence[Message], tools: Sequence[ToolSpec]
    ) -> AssistantMessage | Reply:
        self._play.messages = list(messages)
        turn, self._turn = self._turn, self._turn + 1
        if turn < len(self._heard) and (found := _difference(self._heard[turn], messages)):
            self._play.differences.append(f"before turn {turn + 1}: {found}")
        if turn < len(self._said):
            return self._said[turn]
        return await self._then.reply(messages=messages, tools=tools)


class PlayingOn:
    """Plays turns on, one request of the page at a time."""

    def __init__(self, answers: Answers, policy: MessageEpisodes) -> None:
        self._answers = answers
        self._policy = policy
        self._token = secrets.token_urlsafe(24)
        self._plays: dict[str, _Play] = {}
        answers.policy = {"label": policy.label, "token": self._token}

    def has_token(self, token: str) -> bool:
        """Whether a request came from the page."""
        return hmac.compare_digest(token.encode("utf-8", "surrogateescape"), self._token.encode())

    async def begin(self, wanted: Any) -> str:
        """Begin to play; the id to ask `played` by.

        Raises:
            BadParameter, NotThere, Conflict: it cannot be; one sentence.
        """
        run, one, episode, turn = await asyncio.to_thread(self._stored, wanted)
        env_and_task = await asyncio.to_thread(_rebuild, run, one, episode)
        play = _Play()
        identity = secrets.token_hex(8)
        self._plays[identity] = play
        for old in list(self._plays)[:-MAX_PLAYS]:
            if (running := self._plays.pop(old).running) is not None:
                running.cancel()
        play.running = asyncio.create_task(self._run(play, episode, turn, *env_and_task))
        return identity

    def played(self, identity: str) -> Json:
        """`Played`. Raises `NotThere`."""
        play = self._plays.get(identity)
        if play is None:
            raise NotThere("nothing is played under that id")
        episode = play.episode
        messages = play.messages if episode is None else episode.messages
        return {
            "id": identity,
            "state": play.state,
            "reason": play.reason,
            "reward": None if episode is None else finite(episode.reward),
            "outcome": None if episode is None else str(episode.outcome),
            "stop_reason": None if episode is None else episode.stop_reason,
            "messages": shown_messages(
                messages,
                num_turns=len(messages),
                show=None if episode is None else self._answers.renderer_of(episode.env_id),
            ),
            "differences": play.differences,
        }

    async def close(self) -> None:
        """End what is played, and close the policy's connections."""
        running = [play.running for play in self._plays.values() if play.running is not None]
        for task in running:
            task.cancel()
        await asyncio.gather(*running, return_exceptions=True)
        await self._policy.aclose()

    def _stored(self, wanted: Any) -> tuple[ViewedRun, EpisodeSet, Episode, int]:
        if not isinstance(wanted, dict):
            raise BadParameter("the body must be an object")
        names = ("run", "set", "step", "id", "turn")
        parameters = Parameters((name, str(wanted[name])) for name in names if wanted.get(name) is not None)
        turn = parameters.integer("turn", 0)
        run, one, episode = self._answers.stored_episode(parameters)
        if any(segment.role for segment in episode.segments):
            raise Conflict("an episode of several roles cannot be played on")
        if turn > episode.num_turns:
            raise BadParameter(f"turn: the episode has {episode.num_turns} turns")
        return run, one, episode, turn

    async def _run(
        self, play: _Play, episode: Episode, turn: int, env: PlayedEnv, task: Task, config: RunConfig
    ) -> None:
        said, heard = _turns(episode, turn)

        def make(inner: PlayedEnv, seed: int) -> MessagePolicy:
            return Replaying(said, heard, self._policy.make(inner, seed), play)

        policy = MessageEpisodes(self._policy.label, make, client=self._policy.client)
        try:
            play.episode = await policy.play(
                env=env,
                task=task,
                seed=episode.seed,
                limits=episode_limits(config),
                episode_id=f"{episode.episode_id}+",
                group_id=episode.group_id,
            )
            failure = play.episode.error
            play.state, play.reason = ("done", None) if failure is None else ("failed", sentence_of(failure))
        except Exception as error:  # noqa: BLE001  the border of one episode: the page is told
            play.state, play.reason = "failed", sentence_of(failure_text(error))
        finally:
            await asyncio.to_thread(env.close)


def _rebuild(run: ViewedRun, one: EpisodeSet, episode: Episode) -> tuple[PlayedEnv, Task, RunConfig]:
    """The episode's environment and task anew. Raises `Conflict` where they cannot be had."""
    try:
        config, split = _config_of(run, one)
        task = _find(tasks_of(config, split), episode)
        if task is not None:
            environment = config.environment
            chosen = task.environment or EnvironmentChoice(env_id=environment.id, options=environment.options)
            return (
                make_for_rollout(chosen.env_id, graded_by=run_reward(config), **chosen.options),
                task,
                config,
            )
    except (ConfigError, ValidationError, ValueError, OSError, ImportError) as fault:
        raise Conflict(f"the environment cannot be rebuilt: {fault}") from fault
    raise Conflict(
        f"the environment cannot be rebuilt: its tasks hold none with the id {episode.task_id!r} that is as it was then"
    )


def _config_of(run: ViewedRun, one: EpisodeSet) -> tuple[RunConfig, str]:
    """The config that an episode was played by, and the split that its task is in."""
    if one.kind == "entry":
        entry = next(entry for entry in read_plan(run.path).entries if entry.name == one.name)
        if not entry.config:
            raise ValueError("the evaluation does not hold the config of the entry")
        return RunConfig.model_validate(entry.config), entry.split
    config = load_config(run.path / "config.yaml")
    split = config.environment.train_split if one.kind == "train" else config.evaluation.split
    return config, split


def _find(tasks: TaskSource, episode: Episode) -> Task | None:
    """The task of an episode, which must be the one that it was then."""
    for index in range(min(len(tasks), MAX_TASKS)):
        task = tasks[index]
        if task.task_id == episode.task_id and episode.task_digest in ("", task_digest(task)):
            return task
    return None


def _turns(episode: Episode, turn: int) -> tuple[list[AssistantMessage], list[Sequence[Message]]]:
    """What was said in the turns before `turn`, and the conversation before each of them and before `turn`."""
    places = [place for place, message in enumerate(episode.messages) if message["role"] == "assistant"]
    own = places[max(0, len(places) - episode.num_turns) :]
    said = [_action(episode.messages[place]) for place in own[:turn]]
    heard: list[Sequence[Message]] = [episode.messages[:place] for place in own[: turn + 1]]
    return said, heard


def _action(message: Mapping[str, Any]) -> AssistantMessage:
    calls = message.get("tool_calls") or ()
    return AssistantMessage(
        content=text_of(message.get("content")),
        reasoning=message.get("reasoning"),
        tool_calls=tuple(
            ToolCall(
                id=text_of(call.get("id")),
                name=text_of(call["function"].get("name")),
                arguments=arguments
                if isinstance(arguments := call["function"].get("arguments"), dict)
                else {},
            )
            for call in calls
        ),
    )


def _difference(stored: Sequence[Message], heard: Sequence[Message]) -> str | None:
    """Where the environment now says something else; None where it does not."""
    for index, (before, after) in enumerate(zip(stored, heard, strict=False)):
        if (before["role"], before["content"]) != (after["role"], after["content"]):
            return f"message {index + 1} is another than it was"
    if len(stored) != len(heard):
        return f"there are {len(heard)} messages, and there were {len(stored)}"
    return None
