"""What was answered, as the environment says: in the episode, in its journal, and in the columnar file."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from polyturn.agents.deadlines import EpisodeLimits
from polyturn.agents.episode import Episode
from polyturn.agents.episode_loop import play_messages
from polyturn.agents.policies.scripted import ScriptedPolicy
from polyturn.envs.messages import AssistantMessage, ListTasks, Task
from polyturn.envs.registry import make
from polyturn.envs.tool_env import ToolEnv
from polyturn.rollout.store import TrajectoryStore
from polyturn.tools.types import ToolCall


class Echo(ToolEnv):
    def grade(self, message):
        return {"length": float(len(message.content))}


def say(env: Any, *contents: str | AssistantMessage, limits: EpisodeLimits | None = None) -> Episode:
    said = [
        each if isinstance(each, AssistantMessage) else AssistantMessage(content=each) for each in contents
    ]
    task = env.tasks("heldout" if not isinstance(env, Echo) else "")[0]
    return asyncio.run(
        play_messages(
            env=env,
            policy=ScriptedPolicy.saying(said),
            task=task,
            seed=0,
            limits=limits or EpisodeLimits(),
            episode_id="e.0.0",
            group_id="e",
        )
    )


@pytest.mark.parametrize(
    ("env_id", "said", "answer"),
    [
        ("polyturn/Math-v0", r"I think \boxed{ \frac{1}{2} }.", r"\frac{1}{2}"),
        ("polyturn/Math-v0", "I do not know.", None),
        ("polyturn/TwoHopSearch-v0", "The Vela!", "vela"),
        ("polyturn/TwoHopSearch-v0", " ", None),
        ("polyturn/SearchR1-v0", "<think>so</think><answer> The Vela. </answer>", "vela"),
    ],
)
def test_environments_say_what_was_answered(env_id: str, said: str, answer: str | None) -> None:
    env = make(env_id)
    try:
        found = say(env, said).answer
    finally:
        env.close()
    assert (found is None) == (answer is None)
    assert answer is None or (found or "").strip() == answer


def test_an_answer_is_kept_and_what_is_none_stays_none(tmp_path: Path) -> None:
    env = Echo(tasks=ListTasks([Task.from_prompt("t", "Say it")]))
    answered = say(env, "  it \n")
    assert answered.answer == "it"
    call = AssistantMessage(content="x", tool_calls=(ToolCall(id="0", name="none", arguments={}),))
    cut = replace(say(env, call, limits=EpisodeLimits(max_turns=1)), episode_id="f.0.0")
    assert (cut.outcome, cut.answer) == ("truncated", None)
    store = TrajectoryStore(tmp_path)
    for episode in (answered, cut):
        store.journal(0, episode)
    assert [episode.answer for episode in store.journaled(0)] == ["it", None]
    store.write_step(0, [answered, cut])
    assert store.read_step(0) == [answered, cut]
    store.close()
