"""How tests have a player play policies that speak in messages."""

from __future__ import annotations

import json
from functools import partial

from polyturn.agents.deadlines import EpisodeLimits
from polyturn.agents.episode_loop import play_messages
from polyturn.rollout.player import Play


def message_play(*, limits: EpisodeLimits) -> Play:
    """Episodes of a policy that speaks in messages."""
    return partial(play_messages, limits=limits)


def call(name: str, text: str) -> str:
    """What a policy of the Hermes style writes to call a tool of one argument."""
    return (
        '<tool_call>\n{"name": "' + name + '", "arguments": {"text": ' + json.dumps(text) + "}}\n</tool_call>"
    )


def thinking(thought: str, rest: str) -> str:
    """An answer with a thought in front."""
    return f"<think>\n{thought}\n</think>\n\n{rest}"
