"""Episodes of policies that are named: how a player plays them, and the model that is served as one of them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from polyturn.agents.deadlines import EpisodeLimits
from polyturn.agents.episode import Episode
from polyturn.agents.episode_loop import play_tokens
from polyturn.agents.policies.episodes import NamedPolicy
from polyturn.agents.policy import SamplingParams, TokenPolicy
from polyturn.configs.schema.run import RunConfig
from polyturn.envs.played_env import PlayedEnv
from polyturn.rollout.factory import dialect_of, episode_limits, player_of, renderer_of
from polyturn.rollout.player import EpisodePlayer, offer_engines


@dataclass(frozen=True, kw_only=True, slots=True)
class PolicyChoice:
    """A policy by its name, as `agents.policies.named.make_policy` takes it."""

    name: str
    options: Mapping[str, Any] = field(default_factory=dict)


class ModelEpisodes:
    """The policy `model`: tokens of engines, as an evaluation samples them."""

    max_at_once = None

    def __init__(
        self, config: RunConfig, *, model_path: Path, policy: TokenPolicy, sampling: SamplingParams
    ) -> None:
        """Raises `ValueError` when tokenizer or chat template cannot be used."""
        dialect = dialect_of(config.model, model_path)
        renderer = renderer_of(config.model, model_path, dialect)
        renderer.warm_up()
        self.label = str(model_path)
        self._policy = policy
        self._play = partial(
            play_tokens, renderer=renderer, dialect=dialect, sampling=sampling, policy=policy
        )

    def check(self, env: PlayedEnv) -> None:
        """It plays any."""

    async def play(self, **episode: Any) -> Episode:
        """Play one episode."""
        offer_engines(episode["env"], self._policy)
        return await self._play(**episode)

    async def aclose(self) -> None:
        """Whoever opened the engines closes them."""


def named_player(config: RunConfig, *, max_at_once: int | None = None) -> EpisodePlayer:
    """The player of the held-out tasks, for policies that are named.

    Raises `ValueError` when environment, tasks or rewards cannot be had.
    """
    if max_at_once is not None:
        # What waits for an endpoint waits here, where that is nobody's time.
        rollout = config.rollout
        at_once = {
            name: min(max_at_once, getattr(rollout, name))
            for name in ("max_concurrent_episodes", "max_concurrent_requests")
        }
        config = config.model_copy(update={"rollout": rollout.model_copy(update=at_once)})
    play = partial(_play, limits=episode_limits(config))
    return player_of(config, split=config.evaluation.split, play=play)


async def _play(*, policy: NamedPolicy, limits: EpisodeLimits, **episode: Any) -> Episode:
    return await policy.play(limits=limits, **episode)
