"""The actions of a stored conversation are those that were taken, also where a call could not be read."""

from __future__ import annotations

import asyncio

from polyturn.agents.deadlines import EpisodeLimits
from polyturn.agents.episode_loop import play_messages
from polyturn.agents.policies.scripted import ScriptedPolicy
from polyturn.envs.messages import AssistantMessage
from polyturn.envs.registry import make
from polyturn.rollout.evaluation.rescore import actions_of
from polyturn.tools.types import ToolCall


def test_what_was_done_is_read_from_the_messages() -> None:
    unread = "The tool call could not be read: it has no end. Write it again."
    actions = [
        AssistantMessage(content="so", tool_calls=(ToolCall(id="0", name="", error=unread),)),
        AssistantMessage(tool_calls=(ToolCall(id="1", name="search", arguments={"query": "Ada"}),)),
        AssistantMessage(tool_calls=(ToolCall(id="2", name="search"),)),
        AssistantMessage(content="Ashford", reasoning="perhaps"),
    ]
    env = make("polyturn/TwoHopSearch-v0")
    try:
        episode = asyncio.run(
            play_messages(
                env=env,
                policy=ScriptedPolicy.saying(actions),
                task=env.tasks("heldout")[0],
                seed=0,
                limits=EpisodeLimits(),
                episode_id="e.0.0",
                group_id="e",
            )
        )
    finally:
        env.close()
    assert episode.messages[3]["content"] == unread
    assert actions_of(episode.messages) == actions
