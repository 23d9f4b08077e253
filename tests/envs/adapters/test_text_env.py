"""Somebody else's text-only environments are played: their own texts, numbers, rewards and ends."""

from __future__ import annotations

import gymnasium
import numpy as np
import pytest
from gymnasium import spaces

from polyturn.agents.deadlines import EpisodeLimits
from polyturn.agents.episode import Outcome
from polyturn.agents.episode_loop import play_messages
from polyturn.agents.policies.scripted import ScriptedPolicy
from polyturn.envs.adapters.text_env import NoAction, action_reader, action_text, observation_text
from polyturn.envs.conformance.runner import CHECKS
from polyturn.envs.faults import EnvironmentFault
from polyturn.envs.messages import AssistantMessage
from polyturn.envs.registry import make

ENV_ID = "polyturn/TextEnv-v0"
WORDS = ("apple", "brick", "cloud", "delta")


class Echo(gymnasium.Env):
    """Somebody else's: say the word three times. Each pays a third; a wrong word ends it, `wait` uses up time."""

    observation_space = spaces.Text(200)
    action_space = spaces.Text(20)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.word, self.said, self.waited = WORDS[self.np_random.integers(len(WORDS))], 0, 0
        return f"Say {self.word}.", {}

    def step(self, action):
        if action == "crash":
            raise ConnectionError("the word list is gone")
        if action == "wait":
            self.waited += 1
            return "Still here.", 0.0, False, self.waited == 2, {}
        if action != self.word:
            return "Wrong.", -1.0, True, False, {}
        self.said += 1
        return f"Again, {self.word}.", 1 / 3, self.said == 3, False, {}


gymnasium.register("somebody/Echo-v0", Echo)


def echo_oracle(messages, tools):
    first = messages[0]["content"]
    return AssistantMessage(content=first.rpartition("Say ")[2].rstrip("."))


def say(env, text):
    observation, reward, terminated, truncated, info = env.step(AssistantMessage(content=text))
    return [m["content"] for m in observation], round(reward, 3), terminated, truncated, info


@pytest.fixture
def echo():
    env = make(ENV_ID, env_id="somebody/Echo-v0", instructions="A game of words.", oracle=echo_oracle)
    yield env
    env.close()


def test_an_episode_of_texts(echo):
    observation, info = echo.reset(seed=1, options={"task": "train-3"})
    word = echo.played.unwrapped.word
    assert observation == (
        {"role": "user", "content": f"A game of words.\n\nAnswer with a text.\n\nSay {word}."},
    )
    assert info["tools"] == ()
    assert say(echo, word)[:4] == ([f"Again, {word}."], 0.333, False, False)
    assert say(echo, f" {word}\n")[:4] == ([f"Again, {word}."], 0.333, False, False)
    *step, info = say(echo, word)
    assert step == [[], 0.333, True, False]
    assert (
        info["reward_parts"] == {"environment": pytest.approx(1 / 3)} and info["stop_reason"] == "terminated"
    )


def test_a_task_is_a_seed(echo):
    words = set()
    for task in ("train-0", "train-1", "train-2", "heldout-0"):
        first = echo.reset(seed=1, options={"task": task, "split": task.partition("-")[0]})[0]
        assert first == echo.reset(seed=2, options={"task": task, "split": task.partition("-")[0]})[0]
        words.add(echo.played.unwrapped.word)
    assert len(words) > 1
    with pytest.raises(ValueError, match="the splits are train, heldout"):
        echo.tasks("test")


def test_a_reply_that_is_no_action_never_reaches_the_environment(echo):
    echo.reset(seed=1)
    texts, reward, terminated, *_ = say(echo, "a word of more than twenty characters")
    assert texts == [
        "That is no action. Answer with a text of at most 20 characters, in the characters that are allowed."
    ]
    assert (reward, terminated, echo.played.unwrapped.said) == (0.0, False, 0)


def test_truncated_stays_truncated_and_keeps_what_was_earned(echo):
    echo.reset(seed=1)
    say(echo, echo.played.unwrapped.word)
    assert say(echo, "wait")[:4] == (["Still here."], 0.0, False, False)
    *step, info = say(echo, "wait")
    assert step == [[], 0.0, False, True]
    assert info["stop_reason"] == "environment"
    with pytest.raises(gymnasium.error.ResetNeeded):
        echo.step(AssistantMessage(content="wait"))


def test_only_the_last_reward_may_count():
    env = make(ENV_ID, env_id="somebody/Echo-v0", reward="last")
    env.reset(seed=1)
    word = env.played.unwrapped.word
    assert [say(env, word)[1] for _ in range(3)] == [0.0, 0.0, 0.333]


def test_an_environment_that_fails_is_a_fault(echo):
    echo.reset(seed=1)
    with pytest.raises(EnvironmentFault, match="the word list is gone"):
        echo.step(AssistantMessage(content="crash"))


@pytest.mark.parametrize(("policy", "reward"), [("oracle", 1.0), ("wrong", -1.0)])
async def test_the_player_sums_the_rewards(echo, policy, reward):
    def wrong(messages, tools):
        return AssistantMessage(content="zebra")

    episode = await play_messages(
        env=echo,
        policy=ScriptedPolicy(echo_oracle if policy == "oracle" else wrong),
        task="train-1",
        seed=0,
        limits=EpisodeLimits(),
        episode_id="e",
        group_id="g",
    )
    assert episode.outcome is Outcome.COMPLETED
    assert episode.reward == pytest.approx(reward)
    assert episode.reward_parts == {"environment": pytest.approx(reward)}


def test_it_conforms_with_an_oracle_of_its_own(polyturn_check_env):
    # A reply of one word in twenty characters is all this environment reads, and it pays each right word.
    polyturn_check_env(
        ENV_ID,
        options={"env_id": "somebody/Echo-v0", "oracle": echo_oracle},
        num_episodes=64,
        budget_s=1.0,
        checks=[name for name in CHECKS if name != "speed"],
    )


def test_taxi_is_played_in_its_own_drawing():
    env = make(
        ENV_ID,
        env_id="Taxi-v4",
        env_options={"render_mode": "ansi"},
        show="both",
        actions=("south", "north", "east", "west", "pick up", "drop off"),
    )
    observation, _ = env.reset(seed=0, options={"task": "train-0"})
    text = observation[0]["content"]
    assert "Answer with one of: south, north, east, west, pick up, drop off." in text
    assert "+---------+" in text and "\x1b" not in text and "[" in text.partition("+---------+")[2]
    total, turns = 0.0, 0
    while True:
        turns += 1
        action = env.oracle((), ())
        assert action.content in ("south", "north", "east", "west", "pick up", "drop off")
        _, reward, terminated, truncated, _ = env.step(action)
        total += reward
        if terminated or truncated:
            break
    assert terminated and total == 20 - (turns - 1)


def test_frozen_lake_is_what_is_played_by_default():
    env = make(ENV_ID)
    assert env.reset(seed=0)[0][0]["content"].endswith("Answer with one of: left, down, right, up.\n\n0")
    assert say(env, "I walk down, no: RIGHT!")[0] == ["1"]
    assert say(env, "down")[:4] == ([], 0.0, True, False), "a hole"


def test_the_environments_own_time_limit_truncates():
    env = make(ENV_ID, env_options={"is_slippery": False, "max_episode_steps": 2})
    env.reset(seed=0)
    say(env, "left")
    assert say(env, "left")[1:4] == (0.0, False, True)


@pytest.mark.parametrize(
    ("space", "reply", "action"),
    [
        (spaces.Discrete(4), "2", 2),
        (spaces.Discrete(4), "not 1 but 3.", 3),
        (spaces.Discrete(3, start=5), "7", 7),
        (spaces.MultiDiscrete([3, 4]), "2, 3", [2, 3]),
        (spaces.MultiBinary(3), "[1 0 1]", [1, 0, 1]),
        (spaces.Text(5), " abc ", "abc"),
    ],
)
def test_replies_become_actions_and_back(space, reply, action):
    read = action_reader(space)(reply)
    assert read in space
    assert np.array_equal(read, action)
    assert np.array_equal(action_reader(space)(action_text(space, read)), action)


@pytest.mark.parametrize(
    ("space", "reply"),
    [
        (spaces.Discrete(4), "four"),
        (spaces.Discrete(4), "4"),
        (spaces.Discrete(4), "1e999"),
        (spaces.Discrete(4), "2.5"),
        (spaces.Discrete(4), "9" * 100_000),
        (spaces.MultiDiscrete([3, 4]), "2"),
        (spaces.MultiDiscrete([3, 4], dtype=np.int8), "258 1"),
        (spaces.MultiBinary(2), "1 2"),
        (spaces.Text(3), "abcd"),
    ],
)
def test_other_replies_are_told_what_an_action_is(space, reply):
    with pytest.raises(NoAction, match=r"^That is no action\. Answer with "):
        action_reader(space)(reply)


def test_observations_of_numbers_are_said():
    space = spaces.Dict({"place": spaces.Discrete(9), "cards": spaces.Tuple([spaces.Discrete(2)] * 2)})
    assert observation_text(space, {"place": np.int64(3), "cards": (1, 0)}) == "cards: 1, 0\nplace: 3"
    assert observation_text(spaces.MultiDiscrete([3, 4]), np.array([2, 1])) == "[2, 1]"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"env_id": "Nothing-v0"}, "cannot make 'Nothing-v0'"),
        ({"env_id": "CartPole-v1", "actions": ["left"]}, "2 actions, but 1 names"),
        ({"env_id": "Pendulum-v1"}, "a reply cannot be an action of Box"),
        ({"env_id": "FrozenLake-v1", "env_options": {"slippery": 1}}, "slippery"),
        ({"oracle": "polyturn:nothing"}, "there is no script 'polyturn:nothing'"),
        ({"num_tasks": 0}, "num_tasks"),
    ],
)
def test_what_cannot_be_played_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        make(ENV_ID, **options)
