"""An agent of somebody else's plays an episode: what it asks is recorded, what it returns is graded."""

import asyncio
import sys
import time

import pytest

from polyturn.agents.agent_play import AgentSettings, load_agent, play_agent
from polyturn.agents.chat import ChatRenderer
from polyturn.agents.deadlines import EpisodeLimits
from polyturn.agents.dialects import HermesDialect
from polyturn.agents.episode import Outcome
from polyturn.agents.policy import PolicyFault
from polyturn.envs.messages import AssistantMessage, Task
from polyturn.envs.rewards import exact_match
from polyturn.envs.tool_env import ToolEnv
from polyturn.tools.tool import tool
from polyturn.tools.types import ToolCall
from tests.support.chat_families import FAMILIES
from tests.support.policies import CALL, Says

TASK = Task.from_prompt("t", "Where is Mara?", label="Ashford")


class Towns(ToolEnv):
    """Knows where people are."""

    @tool
    def search(self, query: str) -> str:
        """Look it up."""
        return f"{query} is in Ashford"

    def grade(self, message):
        return {"correct": exact_match(message.content, self.task.label)}


class GaveUp(Exception):
    """What a framework raises for an answer that it cannot use."""


def play(agent, say=lambda number: "Ashford", *, settings=None, family="qwen3", fails=False, **limits):
    tokenizer = FAMILIES[family].tokenizer
    policy = Says(tokenizer, say)
    if fails:

        async def fail(**_):
            raise PolicyFault("no engine answers")

        policy.generate = fail
    limits = {"max_turns": 20, "max_tokens_per_turn": 500, "max_tokens_per_episode": 5000, **limits}
    return asyncio.run(
        play_agent(
            env=Towns(),
            policy=policy,
            agent=agent,
            endpoint=None,
            renderer=ChatRenderer(tokenizer),
            dialect=HermesDialect(),
            task=TASK,
            seed=0,
            limits=EpisodeLimits(**limits),
            episode_id="e",
            group_id="g",
            settings=settings,
        )
    )


async def tool_loop(episode):
    """Calls the environment's tools until the policy answers without a call."""
    messages = list(episode.messages)
    while True:
        reply = await episode.reply(messages)
        messages.append(reply.to_message())
        if not reply.tool_calls:
            return reply
        messages += await episode.step(reply)


def test_a_loop_of_ones_own_is_graded_and_recorded_as_ours_is():
    episode = play(tool_loop, lambda number: "Ashford" if number else CALL)
    assert (episode.outcome, episode.stop_reason, episode.reward) == (Outcome.COMPLETED, "terminated", 1.0)
    assert (episode.num_turns, episode.num_tool_calls, episode.tools["search"].num_calls) == (2, 1, 1)
    assert [message["role"] for message in episode.messages] == ["user", "assistant", "tool", "assistant"]
    (segment,) = episode.segments
    assert sorted(set(segment.turns[segment.sampled].tolist())) == [0, 1]
    assert [turn.reward for turn in episode.turn_records] == [0.0, 1.0]


@pytest.mark.parametrize(
    ("returned", "reward"),
    [(None, 1.0), ("Ashford", 1.0), ("Leeds", 0.0), (AssistantMessage(content="Ashford"), 1.0)],
)
def test_what_an_agent_returns_is_graded_and_nothing_means_its_last_answer(returned, reward):
    async def agent(episode):
        await episode.reply(episode.messages)
        return returned

    episode = play(agent)
    assert (episode.outcome, episode.reward) == (Outcome.COMPLETED, reward)


def test_sub_agents_and_titles_are_told_from_the_conversation():
    async def agent(episode):
        await episode.reply([{"role": "user", "content": "A title for it, please."}], tools=())
        messages = list(episode.messages)
        for _ in range(2):
            messages.append((await episode.reply(messages)).to_message())
            messages.append({"role": "user", "content": "Sure?"})

        async def ask_helper(number):
            return await episode.reply([{"role": "user", "content": f"Part {number}"}])

        await asyncio.gather(*(ask_helper(number) for number in range(3)))
        episode.metrics["num_helpers"] = 3
        return "Ashford"

    episode = play(agent)
    assert episode.metrics["num_conversations"] == 5
    assert episode.metrics["num_side_calls"] == 1
    assert episode.metrics["num_helpers"] == 3
    assert len(episode.segments) == 5 and episode.num_turns == 6
    assert [message.get("name") for message in episode.messages if message["role"] == "user"] == [
        None, None, "line/0", "line/2", "line/3", "line/4"
    ]  # fmt: skip


def test_what_the_policy_is_to_blame_for_is_graded_and_other_errors_are_failures():
    async def agent(episode):
        reply = await episode.reply(episode.messages)
        raise GaveUp(reply.content)

    assert play(agent).outcome is Outcome.FAILED
    episode = play(agent, settings=AgentSettings(policy_errors=(GaveUp,)))
    assert (episode.outcome, episode.reward) == (Outcome.COMPLETED, 0.0)

    async def leaves(episode):
        sys.exit(3)

    failed = play(leaves)
    assert failed.outcome is Outcome.FAILED and "exit(3)" in failed.error


@pytest.mark.parametrize("grades", [False, True])
def test_limits_end_an_agent(grades):
    """One that asks on is told, one that does nothing is cancelled; graded is what is left only where that is meant."""
    ended = []

    async def asks_on(episode):
        try:
            while True:
                await episode.reply(episode.messages)
        finally:
            ended.append("asks on")

    async def sleeps(episode):
        await episode.reply(episode.messages)
        try:
            await asyncio.sleep(60)
        finally:
            ended.append("sleeps")

    settings = AgentSettings(grade_truncated=grades)
    episode = play(asks_on, settings=settings, max_turns=3)
    assert (episode.outcome, episode.stop_reason) == (Outcome.TRUNCATED, "max_turns")
    assert (episode.num_turns, episode.reward) == (3, float(grades))
    episode = play(sleeps, settings=settings, timeout_s=0.3)
    assert (episode.outcome, episode.stop_reason) == (Outcome.TRUNCATED, "timeout_s")
    assert episode.reward == float(grades)
    assert ended == ["asks on", "sleeps"]


def test_an_engine_that_fails_is_no_reward_whatever_the_agent_makes_of_it():
    async def swallows(episode):
        try:
            await episode.reply(episode.messages)
        except PolicyFault:
            return "Leeds"

    async def dies_of_it(episode):
        await episode.reply(episode.messages)

    for agent in (swallows, dies_of_it):
        episode = play(agent, fails=True)
        assert (episode.outcome, episode.stop_reason) == (Outcome.FAILED, "policy_fault")


def test_time_in_the_environment_is_not_the_agents():
    class Slow(Towns):
        def grade(self, message):
            time.sleep(0.5)
            return super().grade(message)

    async def agent(episode):
        await episode.reply(episode.messages)
        assert await episode.step("Ashford") is None
        return

    tokenizer = FAMILIES["qwen3"].tokenizer
    episode = asyncio.run(
        play_agent(
            env=Slow(),
            policy=Says(tokenizer, lambda number: "Ashford"),
            agent=agent,
            endpoint=None,
            renderer=ChatRenderer(tokenizer),
            dialect=HermesDialect(),
            task=TASK,
            seed=0,
            limits=EpisodeLimits(timeout_s=0.4, hook_timeout_s=60),
            episode_id="e",
            group_id="g",
        )
    )
    assert (episode.outcome, episode.reward) == (Outcome.COMPLETED, 1.0)


def test_an_environment_that_ended_answers_nothing_more():
    async def agent(episode):
        await episode.reply(episode.messages)
        assert await episode.step("Leeds") is None
        assert await episode.step("Ashford") is None
        return "Ashford"

    assert play(agent).reward == 0.0


def test_calls_of_an_agent_reach_the_environments_tools():
    async def agent(episode):
        call = ToolCall(id="a", name="search", arguments={"query": "Mara"})
        (result,) = await episode.step(AssistantMessage(tool_calls=(call,)))
        return result["content"].rpartition(" ")[2]

    episode = play(agent)
    assert (episode.reward, episode.num_turns, episode.segments) == (1.0, 0, ())


def test_agents_are_named_by_file_and_checked(tmp_path):
    file = tmp_path / "agents.py"
    file.write_text(
        "async def play(episode, word='Leeds'):\n    return word\n"
        "def blocks(episode):\n    return ''\n"
        "async def other(args, samples, evaluation):\n    return samples\n"
        "class Agent:\n    def __init__(self, word):\n        self.word = word\n"
        "    async def __call__(self, episode):\n        return self.word\n"
    )
    assert play(load_agent(f"{file}:play", {"word": "Ashford"})).reward == 1.0
    assert play(load_agent(f"{file}:Agent", {"word": "Ashford"})).reward == 1.0
    for name, told in (
        ("blocks", "async def play"),
        ("other", "async def play"),
        ("plai", "did you mean 'play'"),
    ):
        with pytest.raises(ValueError, match=told):
            load_agent(f"{file}:{name}")
