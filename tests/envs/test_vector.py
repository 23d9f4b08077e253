"""Vector environments and Gymnasium's own wrappers hold tool environments."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable, Iterator
from types import SimpleNamespace

import gymnasium
import numpy as np
import pytest
from gymnasium.utils.env_checker import check_env
from gymnasium.vector import AsyncVectorEnv, AutoresetMode, SyncVectorEnv, VectorEnv
from gymnasium.wrappers import (
    OrderEnforcing,
    PassiveEnvChecker,
    RecordEpisodeStatistics,
    TimeLimit,
    TransformReward,
)
from gymnasium.wrappers.vector import RecordEpisodeStatistics as RecordVectorStatistics

from polyturn.agents.deadlines import EpisodeLimits
from polyturn.agents.dialects import HermesDialect
from polyturn.agents.episode_loop import play_messages
from polyturn.agents.policies.scripted import ScriptedPolicy
from polyturn.envs import registry
from polyturn.envs.hooks import StepLimits
from polyturn.envs.messages import AssistantMessage
from polyturn.envs.played_env import PlayedEnv
from polyturn.envs.registry import make
from polyturn.envs.tool_env import ToolEnv
from polyturn.envs.two_hop.env import TwoHopSearchEnv
from polyturn.envs.wrappers import RawTextAction, WrappedEnv
from polyturn.rollout.player import offer_engines
from polyturn.tools.types import ToolCall

ENV_ID = "polyturn/TwoHopSearch-v0"
SMALL = {"num_people": 20, "num_employers": 5}
MODES = [AutoresetMode.NEXT_STEP, AutoresetMode.SAME_STEP, AutoresetMode.DISABLED]
SEARCH = AssistantMessage(tool_calls=(ToolCall(id="1", name="search", arguments={"query": "town"}),))
ANSWER = AssistantMessage(content="Nowhere.")


def sync(mode: AutoresetMode) -> VectorEnv:
    return SyncVectorEnv([functools.partial(make, ENV_ID, **SMALL)] * 3, autoreset_mode=mode)


def asynchronous(mode: AutoresetMode) -> VectorEnv:
    make_one = functools.partial(make, ENV_ID, **SMALL)
    return AsyncVectorEnv([make_one] * 3, autoreset_mode=mode, shared_memory=False, context="spawn")


def questions(seeds: list[int]) -> list[str]:
    env = make(ENV_ID, **SMALL)
    return [env.reset(seed=seed)[0][-1]["content"] for seed in seeds]


@pytest.mark.parametrize("kind", [sync, asynchronous])
@pytest.mark.parametrize("mode", MODES)
def test_an_end_is_followed_by_what_the_mode_says(
    kind: Callable[[AutoresetMode], VectorEnv], mode: AutoresetMode
) -> None:
    envs = kind(mode)
    try:
        observations, infos = envs.reset(seed=[1, 2, 3])
        assert [o[-1]["content"] for o in observations] == questions([1, 2, 3])
        assert observations in envs.observation_space
        assert infos["tools"][0][0].name == "search"
        # The second ends, the others go on.
        observations, rewards, terminated, truncated, infos = envs.step((SEARCH, ANSWER, SEARCH))
        assert terminated.tolist() == [False, True, False] and not truncated.any()
        assert rewards.tolist() == [0.0, 0.0, 0.0]
        assert observations[0][0]["role"] == "tool"
        if mode is AutoresetMode.SAME_STEP:
            assert infos["final_obs"].tolist() == [None, (), None]
            assert infos["final_info"]["stop_reason"][1] == "terminated"
            assert infos["final_info"]["reward_parts"]["exact_match"].tolist() == [0.0, 0.0, 0.0]
            assert observations[1][0]["role"] == "system", "the next episode has begun"
            assert infos["task_id"][1]
        else:
            assert observations[1] == ()
            assert infos["stop_reason"][1] == "terminated"
        if mode is AutoresetMode.NEXT_STEP:
            observations, _, terminated, _, _ = envs.step((SEARCH, SEARCH, SEARCH))
            assert observations[1][0]["role"] == "system" and not terminated.any()
        if mode is AutoresetMode.DISABLED:
            again = {"reset_mask": np.array([False, True, False])}
            observations, _ = envs.reset(seed=[None, 2, None], options=again)
            assert observations[1][-1]["content"] == questions([2])[0]
            assert observations[0][0]["role"] == "tool", "the others are where they were"
        observations, *_ = envs.step((SEARCH, SEARCH, SEARCH))
        assert [o[0]["role"] for o in observations] == ["tool"] * 3
    finally:
        envs.close()


@pytest.mark.parametrize("vectorization", ["sync", "async"])
def test_make_vec(vectorization: str) -> None:
    kwargs = {"shared_memory": False} if vectorization == "async" else {}
    envs = gymnasium.make_vec(
        ENV_ID, num_envs=2, vectorization_mode=vectorization, vector_kwargs=kwargs, **SMALL
    )
    try:
        envs.reset(seed=1)
        envs.action_space.seed(1)
        actions = envs.action_space.sample()
        assert actions in envs.action_space
        observations, rewards, *_ = envs.step(actions)
        assert observations in envs.observation_space
        assert rewards.shape == (2,)
    finally:
        envs.close()


def test_shared_memory_is_refused_with_the_way_out() -> None:
    with pytest.raises(ValueError, match="shared_memory=False"):
        AsyncVectorEnv([functools.partial(make, ENV_ID, **SMALL)])


def test_vector_wrappers_count_episodes() -> None:
    envs = RecordVectorStatistics(sync(AutoresetMode.SAME_STEP))
    envs.reset(seed=1)
    envs.step((SEARCH, SEARCH, SEARCH))
    *_, infos = envs.step((ANSWER, SEARCH, SEARCH))
    assert infos["episode"]["l"].tolist() == [2, 0, 0]


def test_a_batch_samples_each_of_its_spaces_and_keeps_them_apart() -> None:
    envs = sync(AutoresetMode.NEXT_STEP)
    envs.action_space.seed(3)
    first = [envs.action_space.sample() for _ in range(10)]
    envs.action_space.seed(3)
    assert first == [envs.action_space.sample() for _ in range(10)]
    assert any(batch[0] != batch[1] for batch in first)


def test_gymnasiums_wrappers() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        env = make(ENV_ID, max_turns=None, **SMALL)
        wrapped = RecordEpisodeStatistics(
            TransformReward(
                TimeLimit(OrderEnforcing(PassiveEnvChecker(env)), 3), lambda reward: reward - 0.25
            )
        )
        wrapped.reset(seed=1)
        assert [wrapped.step(SEARCH)[1:4] for _ in range(2)] == [(-0.25, False, False)] * 2
        *_, truncated, info = wrapped.step(SEARCH)
        assert truncated
        assert info["episode"]["r"] == -0.75 and info["episode"]["l"] == 3
        with pytest.raises(gymnasium.error.ResetNeeded):
            OrderEnforcing(make(ENV_ID, **SMALL)).step(SEARCH)


def test_gymnasiums_checker_on_the_wrapped_one() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        check_env(gymnasium.make(ENV_ID, max_episode_steps=5, **SMALL).unwrapped)


def wrapped(**options: object) -> gymnasium.Env:
    return OrderEnforcing(TimeLimit(TwoHopSearchEnv(**SMALL, **options), 4))


class Halved(gymnasium.RewardWrapper):
    """Takes half of every reward, and of every action of an episode a little."""

    def reward(self, reward: float) -> float:
        return reward / 2 - 0.01


@pytest.fixture
def registered() -> Iterator[None]:
    registry.register("tests/Wrapped-v0", wrapped)
    registry.register("tests/Halved-v0", lambda **options: Halved(TwoHopSearchEnv(**SMALL, **options)))
    registry.register("tests/Raw-v0", lambda: RawTextAction(TwoHopSearchEnv(**SMALL), HermesDialect().parse))
    yield
    for env_id in ("tests/Wrapped-v0", "tests/Halved-v0", "tests/Raw-v0"):
        del gymnasium.registry[env_id]
        del registry._registered[env_id]


class Loud(TwoHopSearchEnv):
    def answer_of(self, message: AssistantMessage) -> str | None:
        return message.content.upper()


def test_what_is_asked_of_a_wrapped_environment_is_asked_of_the_one_inside() -> None:
    inner = Loud(**SMALL)
    env = WrappedEnv(TimeLimit(inner, 4))
    assert env.unwrapped is inner and env.answer_of(AssistantMessage(content="oslo")) == "OSLO"
    offer_engines(env, SimpleNamespace(chat_urls=("http://engine/v1",)))
    env.graded_by, env.step_limits = (lambda view: 0.5), StepLimits(max_tool_calls=0)
    assert (
        inner.engine_urls == ("http://engine/v1",)
        and isinstance(env, PlayedEnv)
        and not isinstance(env, ToolEnv)
    )
    env.reset(seed=1)
    observation, *_ = env.step(SEARCH)
    assert "tool calls of this episode are used up" in observation[0]["content"]
    assert env.step(ANSWER)[1] == 0.5
    env.close()


def test_a_wrapped_environment_is_played_as_any_and_conforms(registered: None, polyturn_check_env) -> None:
    env = make("tests/Wrapped-v0")
    assert env.env_id == "tests/Wrapped-v0" and env.tools[0].name == "search"
    polyturn_check_env("tests/Wrapped-v0", num_episodes=64, budget_s=1.0)


def test_a_wrappers_time_limit_truncates() -> None:
    env = make(ENV_ID, max_episode_steps=2, **SMALL)
    env.reset(seed=1)
    assert not env.step(SEARCH)[3]
    *_, terminated, truncated, info = env.step(SEARCH)
    assert (terminated, truncated, info["stop_reason"]) == (False, True, "environment")
    with pytest.raises(gymnasium.error.ResetNeeded):
        env.step(SEARCH)


async def test_what_a_wrapper_does_to_a_reward_is_a_part_of_its_own(registered: None) -> None:
    env = make("tests/Halved-v0")
    episode = await play_messages(
        env=env,
        policy=ScriptedPolicy(env.oracle),
        task=env.tasks("train")[0],
        seed=0,
        limits=EpisodeLimits(),
        episode_id="e",
        group_id="g",
    )
    assert episode.num_turns == 3
    assert episode.reward == pytest.approx(0.5 - 3 * 0.01)
    assert episode.reward_parts == {"exact_match": 1.0, "wrappers": pytest.approx(-0.53)}


def test_wrappers_that_change_what_an_action_is_are_refused(registered: None) -> None:
    with pytest.raises(ValueError, match="turn its actions into"):
        make("tests/Raw-v0")
    with pytest.raises(ValueError, match="polyturn/TextEnv-v0 plays"):
        make("CartPole-v1")
