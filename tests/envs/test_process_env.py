"""Environments in processes of their own give what they give here, and hold up nobody."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator
from functools import partial
from typing import Any

import psutil
import pytest

from polyturn.agents.episode import failure_text
from polyturn.envs import process_env
from polyturn.envs.faults import EnvironmentFault, UserFault
from polyturn.envs.hooks import StepLimits
from polyturn.envs.messages import AssistantMessage, EpisodeView, Task
from polyturn.envs.process_env import ProcessEnv, make_for_rollout
from polyturn.envs.registry import make, register
from polyturn.envs.tool_env import ToolEnv
from polyturn.rollout.environment_pool import EnvironmentPool, PooledEnvironment
from polyturn.tools.threads import PinnedThread
from polyturn.tools.types import ToolCall
from tests.support.process_envs import Holder, InThread, made_by_a_function

TASK = Task.from_prompt("t", "Say x.", label="x")
APART, HERE, FUNCTION = "tests/Holder-v0", "tests/InThread-v0", "tests/HolderByFunction-v0"
register(APART, Holder)
register(HERE, InThread)
register(FUNCTION, made_by_a_function)


def call(name: str, **arguments: Any) -> AssistantMessage:
    return AssistantMessage(tool_calls=(ToolCall(id="c", name=name, arguments=arguments),))


def pid_of(env: ToolEnv) -> int:
    assert isinstance(env, ProcessEnv) and env._child is not None
    return env._child._process.pid


def half(episode: EpisodeView) -> float:
    return 0.5 * episode.reward_parts["correct"]


half.uses_environment_grade = True  # type: ignore[attr-defined]


@pytest.fixture
async def pool() -> AsyncIterator[EnvironmentPool]:
    """Of environments in processes; all tests that can take one after the other of the same."""
    pool = EnvironmentPool(partial(make_for_rollout, APART))
    yield pool
    await asyncio.to_thread(pool.close)


async def episode(env: ToolEnv) -> list[Any]:
    """What one gives, with the seconds of its tools left out."""
    given: list[Any] = [await env.reset_async(seed=3, options={"task": TASK})]
    for action in (call("draw"), call("nothing"), call("hold", seconds="x"), AssistantMessage(content="x")):
        observation, *values, info = await env.step_async(action)
        results = [(one.content, one.ok) for one in info.pop("tool_results")]
        given.append((observation, values, results, info))
    return given


async def test_what_it_gives_is_what_it_gives_here_and_the_process_is_kept(pool: EnvironmentPool) -> None:
    here = make(HERE)
    here.engine_urls = ("http://first/v1", "http://second/v1")
    expected = await episode(here)
    assert expected[-1][-1]["metrics"] == {"graded": 1.0, "engines": 2.0}
    here.close()
    taken = await pool.take(None)
    taken.env.engine_urls = here.engine_urls
    assert taken.env.is_replayable
    first = pid_of(taken.env)
    assert await episode(taken.env) == expected
    assert taken.env.env_id == APART and taken.env.tools == here.tools
    pool.give_back(taken, None, survived=True)
    again = await pool.take(None)
    assert again is taken and pid_of(again.env) == first
    assert await episode(again.env) == expected

    # Ctrl-C in a terminal goes to the processes of its session.
    assert os.getsid(first) == first != os.getsid(0)
    turns = 0

    async def turn() -> None:
        nonlocal turns
        while True:
            await asyncio.sleep(0.01)
            turns += 1

    await again.env.reset_async(seed=3, options={"task": TASK})
    turning = asyncio.create_task(turn())
    observation, *_ = await again.env.step_async(call("hold", seconds=1))
    turning.cancel()
    assert observation[0]["content"] == str(first)
    assert turns >= 10, "the event loop stood still"

    with pytest.raises(UserFault, match=r"^the user left$"):
        await again.env.step_async(call("leave"))
    await again.env.reset_async(seed=3, options={"task": TASK})
    with pytest.raises(
        EnvironmentFault, match=r"tool 'fail' failed on task 't': .*the backend is gone"
    ) as fault:
        await again.env.step_async(call("fail"))
    assert "process_envs.py" in failure_text(fault.value), "where in the child"
    await again.env.reset_async(seed=3, options={"task": TASK})
    with pytest.raises(EnvironmentFault, match=f"{APART}: its process was killed by SIGKILL"):
        await again.env.step_async(call("die"))
    assert not again.env.is_reusable
    with pytest.raises(EnvironmentFault, match="its process"):
        await again.env.reset_async(seed=3, options={"task": TASK})
    pool.give_back(again, None, survived=False)
    fresh = await pool.take(None)
    assert pid_of(fresh.env) != first
    pool.give_back(fresh, None, survived=True)


async def test_what_never_gives_the_interpreter_back_is_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    env = make_for_rollout(FUNCTION, graded_by=half)
    taken = PooledEnvironment(env, PinnedThread("environment"))
    env.keep_thread(taken.thread)
    await env.reset_async(seed=0, options={"task": TASK})
    _, reward, terminated, _, info = await env.step_async(AssistantMessage(content="x"))
    assert (reward, terminated, info["metrics"]) == (0.5, True, {"graded": 1.0, "engines": 0.0})
    await env.reset_async(seed=0, options={"task": TASK})
    monkeypatch.setattr(process_env, "MARGIN_S", 0.1)
    process = psutil.Process(pid_of(env))
    env.step_limits = StepLimits(hook_timeout_s=0.1, tools_timeout_s=0.1)
    with pytest.raises(EnvironmentFault, match="did not answer in time, and was killed"):
        await env.step_async(call("hold", seconds=1000))
    assert not process.is_running() and not taken.is_reusable
    env.close()


def test_what_another_process_could_not_have_is_said_at_once() -> None:
    with pytest.raises(ValueError, match="cannot be sent to another process"):
        make_for_rollout(APART, graded_by=lambda _: 1.0)
    with pytest.raises(ValueError, match="unexpected keyword argument 'size'"):
        make_for_rollout(APART, size=3)
    with pytest.raises(ValueError, match="there is no environment 'tests/Holdr-v0'"):
        make_for_rollout("tests/Holdr-v0")
    assert isinstance(make_for_rollout(HERE), InThread)
