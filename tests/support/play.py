"""How tests have a player play policies that speak in messages."""

from __future__ import annotations

from functools import partial

from polyturn.agents.deadlines import EpisodeLimits
from polyturn.agents.episode_loop import play_messages
from polyturn.rollout.player import Play


def message_play(*, limits: EpisodeLimits) -> Play:
    """Episodes of a policy that speaks in messages."""
    return partial(play_messages, limits=limits)
