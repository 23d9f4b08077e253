"""Environments of the pool: made in threads, and with a thread in between only where they need one."""

import asyncio
import threading

import pytest

from polyturn.envs.faults import EnvironmentFault
from polyturn.envs.messages import AssistantMessage, Task
from polyturn.envs.tool_env import ToolEnv
from polyturn.rollout import environment_pool
from polyturn.rollout.environment_pool import EnvironmentPool
from polyturn.tools.tool import tool
from polyturn.tools.types import ToolCall


class Made(ToolEnv):
    """Knows its thread."""

    def __init__(self):
        super().__init__()
        self.made_in, self.closed_in = threading.get_ident(), None

    @tool
    def where(self) -> int:
        """Where it runs."""
        return threading.get_ident()

    def close(self):
        self.closed_in = threading.get_ident()
        super().close()


class Light(Made):
    hooks_run = "event_loop"


async def until(condition):
    for _ in range(500):
        if condition():
            return
        await asyncio.sleep(0.01)
    raise AssertionError("it never came to that")


@pytest.mark.parametrize("quick_s", [0.0, 60.0])
async def test_environments_on_the_event_loop_hold_no_threads(monkeypatch, quick_s):
    """What is made in no time is made where it stands, once it is known; what may take long is made in threads."""
    monkeypatch.setattr(environment_pool, "QUICK_S", quick_s)
    monkeypatch.setattr(environment_pool, "QUICK_WALL_S", quick_s)
    before, made = threading.active_count(), []

    def make():
        made.append(Light())
        return made[-1]

    pool = EnvironmentPool(make)
    taken = await asyncio.gather(*(pool.take(None) for _ in range(200)))
    await until(lambda: threading.active_count() <= before)
    assert len({id(pooled.env) for pooled in taken}) == 200
    here = threading.get_ident()
    assert [env.made_in == here for env in made] == [False] + [quick_s > 0] * 199
    for pooled in taken:
        pool.give_back(pooled, None, survived=True)
    assert (await pool.take(None)).env in made, "they are used again"
    pool.close()
    await until(lambda: sum(env.closed_in is not None for env in made) == 199)
    assert all(env.closed_in != here for env in made)


async def test_an_environment_with_a_thread_lives_in_it_from_making_to_closing():
    pool = EnvironmentPool(Made)
    pooled = await pool.take(None)
    env = pooled.env
    await env.reset_async(seed=0, options={"task": Task.from_prompt("t", "q")})
    observation, *_ = await env.step_async(AssistantMessage(tool_calls=(ToolCall(id="c", name="where"),)))
    assert observation[0]["content"] == str(env.made_in)
    assert pooled.is_reusable
    pool.give_back(pooled, None, survived=False)
    await until(lambda: env.closed_in is not None)
    assert env.closed_in == env.made_in
    pool.close()


async def test_a_kind_whose_first_is_slow_or_fails_does_not_hold_up_the_others(monkeypatch):
    monkeypatch.setattr(environment_pool, "FIRST_S", 0.05)
    release, calls = threading.Event(), []

    def make():
        calls.append(None)
        if len(calls) == 1:
            release.wait(30)
            raise EnvironmentFault("the first is broken")
        return Light()

    pool = EnvironmentPool(make)
    taking = [asyncio.create_task(pool.take(None)) for _ in range(4)]
    await until(lambda: sum(task.done() for task in taking) == 3)
    assert not taking[0].done()
    release.set()
    results = await asyncio.gather(*taking, return_exceptions=True)
    assert [isinstance(one, EnvironmentFault) for one in results] == [True, False, False, False]
    pool.close()


async def test_no_more_than_so_many_are_made_at_once(monkeypatch):
    monkeypatch.setattr(environment_pool, "MAX_MAKING", 3)
    making, most, lock = 0, 0, threading.Lock()

    def make():
        nonlocal making, most
        with lock:
            making += 1
            most = max(most, making)
        threading.Event().wait(0.02)
        with lock:
            making -= 1
        return Light()

    monkeypatch.setattr(environment_pool, "QUICK_S", 0.0)
    pool = EnvironmentPool(make)
    made = await asyncio.gather(*(pool.take(None) for _ in range(12)))
    assert (most, len({id(pooled.env) for pooled in made})) == (3, 12)
    pool.close()
