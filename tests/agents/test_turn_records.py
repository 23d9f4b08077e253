"""What an episode remembers of each turn: who took it, in which state, and what the environment paid for it."""

import asyncio
from dataclasses import replace

import pytest

from polyturn.agents.deadlines import EpisodeLimits
from polyturn.agents.episode_loop import play_messages
from polyturn.agents.episode_record import observation_digest
from polyturn.agents.policies.scripted import ScriptedPolicy
from polyturn.configs.schema.algorithm import AlgorithmConfig
from polyturn.envs.messages import AssistantMessage, Task
from polyturn.envs.tool_env import ToolEnv
from polyturn.tools.tool import tool
from polyturn.tools.types import ToolCall
from polyturn.trainer.credit.estimates import make_samples, reward_parts

TASK = Task.from_prompt("t1", "Fill the jug.", label="full")


class Jug(ToolEnv):
    """Each cup is paid at once; a full jug once more at the end."""

    def begin(self, task):
        self.cups = 0
        return task.messages

    @tool
    def pour(self) -> str:
        """Pour one cup."""
        self.cups += 1
        self.turn_reward += 0.25
        return f"{self.cups} cups"

    @tool
    def look(self) -> str:
        """Look into the jug."""
        return f"{self.cups} cups"

    @tool
    def mark(self, state: str) -> str:
        """Name the state."""
        self.anchor = state
        return "ok"

    def grade(self, message):
        return {"full": float(self.cups >= 2)}


def calling(name, **arguments):
    call = ToolCall(id="c", name=name, arguments=arguments)
    return AssistantMessage(content="", tool_calls=(call,))


def play(*turns, max_turns=10, sample=0):
    return asyncio.run(
        play_messages(
            env=Jug(),
            policy=ScriptedPolicy.saying(turns),
            task=TASK,
            seed=1,
            limits=EpisodeLimits(max_turns=max_turns),
            episode_id=f"g1.{sample}.0",
            group_id="g1",
        )
    )


DONE = AssistantMessage(content="full")


def test_every_turn_has_what_it_was_paid_and_they_add_up():
    episode = play(calling("pour"), calling("look"), calling("pour"), DONE)
    assert [record.reward for record in episode.turn_records] == [0.25, 0.0, 0.25, 1.0]
    assert episode.reward == 1.5
    assert episode.reward_parts == {"full": 1.0, "turns": 0.5}
    (part,) = reward_parts([episode], {episode.episode_id: make_samples([episode])}, AlgorithmConfig())
    assert part.turn_rewards == (0.25, 0.0, 0.25, 1.0)


def test_a_limit_leaves_the_rewards_of_turns_so_far():
    episode = play(calling("pour"), calling("pour"), calling("pour"), max_turns=2)
    assert [record.reward for record in episode.turn_records] == [0.25, 0.25]
    assert episode.reward == 0.5


def test_anchors_are_equal_where_the_same_was_seen():
    first = play(calling("pour"), calling("look"), DONE)
    second = play(calling("look"), calling("pour"), DONE, sample=1)
    a, b = ([record.anchor for record in episode.turn_records] for episode in (first, second))
    assert a[0] == b[0], "both begin at the task"
    # Two tools that say the same are not the same observation.
    assert a[1] != b[1] and a[1] == b[2]
    assert len({*a, *b}) == 4


def test_an_environment_may_name_its_states():
    episode = play(calling("mark", state="kitchen"), calling("look"), DONE)
    assert [record.anchor for record in episode.turn_records][1:] == ["kitchen", "kitchen"]
    assert episode.turn_records[0].anchor == observation_digest(TASK.messages)


@pytest.mark.parametrize("bonus", [0.0, 2.0])
def test_a_reward_from_elsewhere_is_paid_at_the_last_turn(bonus):
    episode = play(calling("pour"), calling("pour"), DONE)
    episode = replace(episode, reward=episode.reward + bonus)
    (part,) = reward_parts([episode], {episode.episode_id: make_samples([episode])}, AlgorithmConfig())
    assert part.turn_rewards == (0.25, 0.25, 1.0 + bonus)
    assert sum(part.turn_rewards) == episode.reward
