"""Policies that play whole episodes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Protocol

from polyturn.agents.deadlines import EpisodeLimits, Slots
from polyturn.agents.episode import Episode
from polyturn.agents.episode_loop import play_messages
from polyturn.agents.policy import MessagePolicy
from polyturn.envs.messages import Task
from polyturn.envs.played_env import PlayedEnv
from polyturn.tools.chat.client import ChatClient

MARGIN_S = 5.0
"""So much later than the endpoint's client an episode gives up: the client says what was wrong."""


class NamedPolicy(Protocol):
    """Plays episodes, each as if there were no other."""

    @property
    def label(self) -> str:
        """What reports call it."""
        ...

    @property
    def max_at_once(self) -> int | None:
        """How many episodes it plays at once; None: any number."""
        ...

    def check(self, env: PlayedEnv) -> None:
        """Raise `ValueError` where it cannot play an environment of this kind."""
        ...

    async def play(
        self,
        *,
        env: PlayedEnv,
        task: Task,
        seed: int,
        limits: EpisodeLimits,
        episode_id: str,
        group_id: str,
        slots: Slots | None = None,
    ) -> Episode:
        """Play one episode. What raises in it is an episode that failed."""
        ...

    async def aclose(self) -> None:
        """Free what it holds."""
        ...


class MessageEpisodes:
    """Plays each episode with a policy of its own that speaks in messages."""

    def __init__(
        self,
        label: str,
        make: Callable[[PlayedEnv, int], MessagePolicy],
        *,
        max_at_once: int | None = None,
        client: ChatClient | None = None,
    ) -> None:
        """
        Args:
            make: The policy of an episode, from the environment under all wrappers and the episode's seed. Raises
                `ValueError` for an environment that it cannot play.
            max_at_once: How many episodes it plays at once; None: any number.
            client: Of the endpoint that is asked, whose deadline then holds for a request. Closed at the end.
        """
        self.label = label
        self.make = make
        self.max_at_once = max_at_once
        self.client = client

    def check(self, env: PlayedEnv) -> None:
        """Make a policy, and play nothing."""
        self.make(env.unwrapped, 0)

    async def play(
        self,
        *,
        env: PlayedEnv,
        task: Task,
        seed: int,
        limits: EpisodeLimits,
        episode_id: str,
        group_id: str,
        slots: Slots | None = None,
    ) -> Episode:
        """Play one episode."""
        if self.client is not None:
            limits = replace(limits, request_timeout_s=self.client.endpoint.timeout_s + MARGIN_S)
        return await play_messages(
            env=env,
            policy=self.make(env.unwrapped, seed),
            task=task,
            seed=seed,
            limits=limits,
            episode_id=episode_id,
            group_id=group_id,
            slots=slots,
        )

    async def aclose(self) -> None:
        """Close the connections."""
        if self.client is not None:
            await self.client.aclose()
