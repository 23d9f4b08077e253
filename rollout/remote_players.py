"""Episodes in several processes: each a Ray actor with an event loop, environments and tools on its own node.

The scheduler stays where it is and sees one stream of episodes. Each comes back whole as soon as it has ended, so that
a process that dies loses what is under way in it and nothing that had ended; that is played in another one.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray
from ray.exceptions import RayActorError, RayError

from polyturn.agents.deadlines import Slots
from polyturn.agents.episode import Episode
from polyturn.agents.forking import Fork
from polyturn.agents.policy import Policy
from polyturn.configs.schema.run import RunConfig
from polyturn.envs.faults import message_of
from polyturn.envs.messages import Task, TaskSource
from polyturn.envs.rewards.rubric import GroupCriterion
from polyturn.rollout.engines.fleet import Ailment, Traffic
from polyturn.rollout.engines.membership import Membership
from polyturn.rollout.factory import build_player, open_engines, training_sampling
from polyturn.rollout.groups import Prompt
from polyturn.rollout.limits import RolloutLimits, share_of, spare_what_stays
from polyturn.rollout.player import EpisodePlayer, RolloutError

logger = logging.getLogger(__name__)

MAX_DEATHS_OF_AN_ATTEMPT = 3
"""Processes that may die under one attempt before it ends the run: it is what kills them."""
DEATHS_WITHIN_S = 3600.0
"""The time in which so many may die and no more."""
START_TIMEOUT_S = 300.0
CLOSE_TIMEOUT_S = 30.0


class PlayerActor:
    """Plays attempts in a process of its own; an asynchronous Ray actor."""

    def __init__(self, config: RunConfig, model_path: str, url: str | Sequence[str]) -> None:
        rollout = config.rollout
        self._config = config
        self._model_path = Path(model_path)
        self._url = url
        self._open = AsyncExitStack()
        self._opening = asyncio.Lock()
        self._player: EpisodePlayer | None = None
        self._told = 0
        self._slots = Slots(
            requests=asyncio.Semaphore(share_of(rollout.max_concurrent_requests, rollout.num_workers)),
            steps=asyncio.Semaphore(share_of(rollout.max_concurrent_tools, rollout.num_workers)),
            timeout_s=rollout.queue_timeout_s,
        )

    async def ready(self) -> EpisodePlayer:
        """Make player and policy, the first time. Raises `ValueError` where the config's parts cannot be had here."""
        config, path = self._config, self._model_path
        async with self._opening:
            if self._player is None:
                player = build_player(
                    config,
                    model_path=path,
                    split=config.environment.train_split,
                    sampling=training_sampling(config, model_path=path),
                    with_teachers=True,
                )
                engines = open_engines(config, model_path=path, url=self._url)
                self._watch = await self._open.enter_async_context(engines)
                await self._open.enter_async_context(player.serves)
                self._player = player
                self._open.enter_context(spare_what_stays())
        return self._player

    async def wait_ready(self) -> None:
        """Wait until episodes can be played. Raises as `ready` does."""
        await self.ready()

    async def play(self, prompt: Prompt, sample: int, attempt: int, fork: Fork | None) -> Episode:
        """Play one attempt. Raises `RolloutError` when too many threads of this process are lost."""
        player = await self.ready()
        episode = await player.play(
            prompt, sample, attempt, policy=self._watch.fleet, slots=self._slots, fork=fork
        )
        player.check_threads()
        return episode

    async def take_traffic(self) -> dict[int, Traffic]:
        """By engine, what was answered to this process since the last call."""
        await self.ready()
        return self._watch.take_traffic()

    async def set_engines(self, members: Membership, order: int) -> None:
        """From now on these are asked. Of several calls the one of the largest `order` counts."""
        await self.ready()
        if order > self._told:
            self._told = order
            self._watch.set_engines(members)

    async def ailments(self) -> Mapping[int, Ailment]:
        """By engine, what is the matter with those that failed the last requests of this process."""
        return self._watch.ailments if self._player is not None else {}

    async def num_requests(self) -> dict[int, int]:
        """Of this process under way, by engine."""
        return self._watch.fleet.num_requests if self._player is not None else {}

    async def rest(self) -> None:
        """Let no further request begin."""
        self._slots.may_request.clear()

    async def go_on(self) -> None:
        """End a rest."""
        self._slots.may_request.set()

    async def close(self) -> None:
        """Close policy and environments."""
        await self._open.aclose()
        if self._player is not None:
            await asyncio.to_thread(self._player.close)


@dataclass(kw_only=True, slots=True, eq=False)
class _Remote:
    """One of the processes."""

    actor: Any
    num_playing: int = 0


class RemotePlayers:
    """The `Player` of `rollout.num_workers` Ray actors: they play; tasks and group rewards are read and made here."""

    def __init__(
        self, local: EpisodePlayer, config: RunConfig, *, model_path: Path, url: str | Sequence[str]
    ) -> None:
        """Start the processes; `local` reads tasks and adds group rewards. Ray must have been started."""
        self._local = local
        self._config = config
        self._model_path = model_path
        self._url = url
        self._is_resting = False
        self.num_deaths = 0
        """Processes that have died so far."""
        self._deaths: list[float] = []
        """When those of the last hour did, by the monotonic clock."""
        self._members: Membership | None = None
        self._num_told = 0
        self._remotes = [self._start() for _ in range(config.rollout.num_workers)]

    def _start(self) -> _Remote:
        at_once = self.limits.max_concurrent_episodes + 8
        actor = (
            ray.remote(PlayerActor)
            # Episodes wait for engines and tools more than they compute; ranks are what CPUs are counted for.
            .options(num_cpus=0, max_concurrency=at_once, scheduling_strategy="SPREAD")
            .remote(self._config, str(self._model_path), self._url)
        )
        return _Remote(actor=actor)

    @property
    def limits(self) -> RolloutLimits:
        return self._local.limits

    @property
    def tasks(self) -> TaskSource:
        return self._local.tasks

    @property
    def group_rewards(self) -> Sequence[GroupCriterion]:
        return self._local.group_rewards

    def prefetch(self, prompts: Sequence[Prompt]) -> None:
        self._local.prefetch(prompts)

    async def task(self, prompt: Prompt) -> Task:
        return await self._local.task(prompt)

    async def add_group_rewards(self, prompt: Prompt, episodes: Sequence[Episode]) -> tuple[Episode, ...]:
        return await self._local.add_group_rewards(prompt, episodes)

    def check_threads(self) -> None:
        self._local.check_threads()

    async def wait_ready(self) -> None:
        """Wait until all can play. Raises what the first raises that cannot."""
        waiting = [asyncio.wrap_future(remote.actor.wait_ready.remote().future()) for remote in self._remotes]
        async with asyncio.timeout(START_TIMEOUT_S):
            await asyncio.gather(*waiting)

    async def play(
        self,
        prompt: Prompt,
        sample: int,
        attempt: int,
        *,
        policy: Policy,  # noqa: ARG002 (each process has its own)
        slots: Slots,  # noqa: ARG002
        fork: Fork | None = None,
    ) -> Episode:
        """Play one attempt where the fewest are under way; where its process dies, in another one.

        `policy` and `slots` are those of this process, which nothing is played in; `fork` goes with the attempt.

        Raises:
            RolloutError: process after process has died under this attempt.
        """
        for _ in range(MAX_DEATHS_OF_AN_ATTEMPT):
            remote = min(self._remotes, key=lambda one: one.num_playing)
            remote.num_playing += 1
            try:
                reference = remote.actor.play.remote(prompt, sample, attempt, fork)
                try:
                    episode: Episode = await asyncio.wrap_future(reference.future())
                except asyncio.CancelledError:
                    ray.cancel(reference)
                    raise
                return episode
            except RayActorError as death:
                self._replace(remote, death)
            finally:
                remote.num_playing -= 1
        raise RolloutError(
            f"{MAX_DEATHS_OF_AN_ATTEMPT} rollout workers have died while {prompt.group_id}.{sample}.{attempt} was "
            "played in them; its environment may need more memory than there is, or end its process"
        )

    async def take_traffic(self) -> list[dict[int, Traffic]]:
        """By process and engine, what was answered since the last call; one that has died, or hangs, tells nothing."""
        return await self._told_by_all(lambda actor: actor.take_traffic.remote())

    async def ailments(self) -> list[Mapping[int, Ailment]]:
        """By process and engine, what is the matter with those that failed their last requests."""
        return await self._told_by_all(lambda actor: actor.ailments.remote())

    async def num_requests(self) -> list[dict[int, int]]:
        """Under way, by process and engine."""
        return await self._told_by_all(lambda actor: actor.num_requests.remote())

    async def _told_by_all(self, ask: Callable[[Any], Any]) -> list[Any]:
        """What those processes answer that are there, and do not hang."""
        asked = [
            asyncio.wait_for(asyncio.wrap_future(ask(remote.actor).future()), CLOSE_TIMEOUT_S)
            for remote in self._remotes
        ]
        told = await asyncio.gather(*asked, return_exceptions=True)
        return [answer for answer in told if not isinstance(answer, BaseException)]

    def set_engines(self, members: Membership) -> None:
        """From now on these engines are asked, by every process; returns at once."""
        self._members = members
        self._num_told += 1
        for remote in self._remotes:
            remote.actor.set_engines.remote(members, self._num_told)

    def _replace(self, dead: _Remote, death: RayActorError) -> None:
        """Start another process in place of one that died; whoever notices first does."""
        if dead not in self._remotes:
            return
        logger.warning("a rollout worker died with %d episodes: %s", dead.num_playing, death)
        now, most = time.monotonic(), self._config.rollout.max_worker_deaths
        self.num_deaths += 1
        self._deaths = [died for died in self._deaths if now - died < DEATHS_WITHIN_S] + [now]
        if len(self._deaths) > most:
            raise RolloutError(
                f"{len(self._deaths)} rollout workers have died within the last hour, and rollout.max_worker_deaths "
                f"allows {most}; the newest with: {message_of(death)}"
            )
        fresh = self._start()
        if self._is_resting:
            fresh.actor.rest.remote()
        if self._members is not None:
            fresh.actor.set_engines.remote(self._members, self._num_told)
        self._remotes[self._remotes.index(dead)] = fresh

    def rest(self) -> None:
        """Let no further request begin in any process."""
        self._is_resting = True
        for remote in self._remotes:
            remote.actor.rest.remote()

    def go_on(self) -> None:
        """End a rest."""
        self._is_resting = False
        for remote in self._remotes:
            remote.actor.go_on.remote()

    def close(self) -> None:
        """End the processes, and what is here."""
        closing = [remote.actor.close.remote() for remote in self._remotes]
        with contextlib.suppress(RayError):
            ray.wait(closing, num_returns=len(closing), timeout=CLOSE_TIMEOUT_S)
        for remote in self._remotes:
            ray.kill(remote.actor)
        self._local.close()
