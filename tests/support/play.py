"""How tests have a player play policies that speak in messages."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from functools import partial

from polyturn.agents.chat import load_tokenizer
from polyturn.agents.deadlines import EpisodeLimits, Slots
from polyturn.agents.episode import Episode
from polyturn.agents.episode_loop import play_messages
from polyturn.agents.policy import SamplingParams
from polyturn.configs.models import resolve_model_path
from polyturn.configs.schema.run import RunConfig
from polyturn.envs.messages import Task
from polyturn.rollout.factory import build_player
from polyturn.rollout.groups import PromptCursor
from polyturn.rollout.player import Play
from tests.support.policies import Says


def play_first(config: RunConfig, say: Callable[[int, Task], str]) -> tuple[Episode, Says]:
    """An agent plays its config's first held-out task, with a policy that says `say(number of the answer, task)`."""
    model = resolve_model_path(config.model.path)
    player = build_player(config, model_path=model, split="heldout", sampling=SamplingParams())
    (prompt,) = PromptCursor(len(player.tasks), seed=0).take(1)
    task = player.tasks[prompt.task_index]
    policy = Says(load_tokenizer(model), lambda number: say(number, task))
    slots = Slots(asyncio.Semaphore(4), asyncio.Semaphore(4))

    async def run() -> Episode:
        assert player.serves is not None
        async with player.serves:
            return await player.play(prompt, 0, 0, policy=policy, slots=slots)

    try:
        return asyncio.run(run()), policy
    finally:
        player.close()


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
