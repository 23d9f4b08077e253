"""Environments of a real OpenEnv server, on loopback."""

from __future__ import annotations

import asyncio
import importlib.util
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator

import psutil
import pytest

import polyturn
from polyturn.envs.adapters.openenv import OpenEnvEnv, text_of
from polyturn.envs.adapters.openenv_demo import MAX_GUESSES, hidden_number
from polyturn.envs.faults import EnvironmentFault
from polyturn.envs.messages import AssistantMessage, ListTasks, Task
from polyturn.tools.types import ToolCall

if importlib.util.find_spec("openenv") is None or importlib.util.find_spec("websockets") is None:
    pytest.skip("needs pip install 'polyturn[openenv]'", allow_module_level=True)


def guess(*numbers: object) -> AssistantMessage:
    calls = [
        ToolCall(id=f"c{i}", name="act", arguments={"number": number}) for i, number in enumerate(numbers)
    ]
    return AssistantMessage(tool_calls=tuple(calls))


@pytest.fixture
def env() -> Iterator[OpenEnvEnv]:
    made = polyturn.make("polyturn/OpenEnv-v0")
    assert isinstance(made, OpenEnvEnv)
    yield made
    made.close()


def test_the_servers_schema_becomes_a_tool(env: OpenEnvEnv) -> None:
    (spec,) = env.tools
    assert (spec.name, spec.description) == ("act", "A guess.")
    assert list(spec.parameters["properties"]) == ["number"]
    assert spec.parameters["required"] == ["number"]


def test_an_episode_is_played_and_paid(env: OpenEnvEnv) -> None:
    for seed in range(3):
        observation, _ = env.reset(seed=seed)
        assert observation[0]["content"].startswith("Find a number from 1 to 30")
        number = env.task.label
        assert number == hidden_number(env.task.metadata["reset"]["seed"])
        observation, reward, terminated, *_ = env.step(guess(number + 1))
        assert (observation[0]["content"], reward, terminated) == ("It is lower.", 0.0, False)
        observation, reward, terminated, _, info = env.step(guess(number, number))
        assert (reward, terminated, info["reward_parts"]) == (1.0, True, {"return": 1.0})
        assert [message["content"] for message in observation] == ["That is it.", "The episode is over."]


def test_the_oracle_wins_and_random_play_seldom(env: OpenEnvEnv) -> None:
    wins = 0.0
    for seed in range(10):
        env.reset(seed=seed)
        assert env.oracle is not None
        assert env.step(env.oracle((), ()))[1] == 1.0
        env.reset(seed=seed)
        script = env.random_policy(seed)
        for _ in range(MAX_GUESSES):
            _, reward, terminated, *_ = env.step(script((), ()))
            wins += reward
            if terminated:
                break
        assert terminated
    assert wins < 8


def test_an_answer_instead_of_an_action_ends_the_episode_unpaid(env: OpenEnvEnv) -> None:
    env.reset(seed=0)
    _, reward, terminated, *_ = env.step(AssistantMessage(content=str(env.task.label)))
    assert (reward, terminated) == (0.0, True)


def test_malformed_actions_are_told_to_the_model(env: OpenEnvEnv) -> None:
    env.reset(seed=0)
    for call, said in (
        (ToolCall(id="c", name="act", arguments={"number": "ten"}), "must be integer"),
        (ToolCall(id="c", name="act", arguments={}), "missing argument 'number'"),
        (
            ToolCall(id="c", name="act", arguments={"number": 1, "metadata": {}}),
            "unknown argument 'metadata'",
        ),
    ):
        observation, _, terminated, *_ = env.step(AssistantMessage(tool_calls=(call,)))
        assert said in observation[0]["content"] and not terminated


def test_what_only_the_server_finds_malformed_is_told_too() -> None:
    env = polyturn.make("polyturn/OpenEnv-v0", text_field="number")
    env.reset(seed=0)
    observation, _, terminated, *_ = env.step(AssistantMessage(content="a number"))
    assert "number: Input should be a valid integer" in observation[0]["content"] and not terminated
    _, reward, terminated, *_ = env.step(AssistantMessage(content=str(env.task.label)))
    assert (reward, terminated) == (1.0, True)
    env.close()
    with pytest.raises(ValueError, match="no field 'words'; they have number"):
        polyturn.make("polyturn/OpenEnv-v0", text_field="words")


def test_an_environment_that_raises_is_a_fault_and_the_next_episode_is_well(env: OpenEnvEnv) -> None:
    env.reset(seed=0)
    with pytest.raises(EnvironmentFault, match="EXECUTION_ERROR: the game knows no number above"):
        env.step(guess(10**7))
    env.reset(seed=0)
    assert env.step(guess(env.task.label))[1] == 1.0


def test_tasks_of_ones_own_bring_messages_and_arguments_of_reset(env: OpenEnvEnv) -> None:
    task = Task.from_prompt("mine", "Play well.", metadata={"reset": {"seed": 7}})
    own = polyturn.make("polyturn/OpenEnv-v0", url=env._url, tasks=ListTasks([task]), prompt="You play.")
    observation, _ = own.reset(seed=0)
    assert [message["role"] for message in observation] == ["system", "user", "user"]
    assert own.step(guess(hidden_number(7)))[1] == 1.0
    assert own.oracle is None
    own.close()


def test_many_sessions_at_once_do_not_mix() -> None:
    async def play(seed: int) -> float:
        env = OpenEnvEnv()
        await env.reset_async(seed=seed)
        await env.step_async(guess(env.task.label - 1))
        _, reward, *_ = await env.step_async(guess(env.task.label))
        env.close()
        return reward

    async def all_at_once() -> list[float]:
        return await asyncio.gather(*(play(seed) for seed in range(20)))

    assert asyncio.run(all_at_once()) == [1.0] * 20


def start_server() -> tuple[subprocess.Popen[bytes], str]:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
    command = [sys.executable, "-m", "polyturn.envs.adapters.openenv_demo", str(port), str(os.getpid())]
    process = subprocess.Popen(command)
    deadline = time.monotonic() + 60
    while True:
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) == 0:
                return process, f"http://127.0.0.1:{port}"
        assert process.poll() is None and time.monotonic() < deadline, "the server does not come up"
        time.sleep(0.05)


def test_a_server_that_dies_is_a_fault() -> None:
    process, url = start_server()
    env = OpenEnvEnv(url=url, timeout_s=5)
    env.reset(seed=0)
    process.kill()
    process.wait()
    with pytest.raises(EnvironmentFault, match=f"the OpenEnv server {url} failed"):
        env.step(guess(1))
    with pytest.raises(EnvironmentFault, match="cannot connect"):
        env.reset(seed=0)
    with pytest.raises(RuntimeError, match="does not tell its schema"):
        OpenEnvEnv(url=url, timeout_s=5)


def test_a_server_that_hangs_is_a_fault() -> None:
    process, url = start_server()
    env = OpenEnvEnv(url=url, timeout_s=3)
    env.reset(seed=0)
    os.kill(process.pid, signal.SIGSTOP)
    try:
        with pytest.raises(EnvironmentFault, match="TimeoutError"):
            env.step(guess(1))
    finally:
        process.kill()
        process.wait()


def test_closing_ends_sessions_and_threads(env: OpenEnvEnv) -> None:
    env.reset(seed=0)
    others = [OpenEnvEnv() for _ in range(5)]
    before = threading.active_count(), len(psutil.Process().net_connections())
    for other in others:
        other.reset(seed=0)
        assert other.step(guess(other.task.label))[1] == 1.0
        other.close()
        other.close()
    deadline = time.monotonic() + 10
    while (
        threading.active_count(),
        len(psutil.Process().net_connections()),
    ) > before and time.monotonic() < deadline:
        time.sleep(0.05)
    assert threading.active_count() <= before[0]


def test_the_demonstration_server_ends_with_its_owner() -> None:
    program = (
        "import psutil, time; from polyturn.envs.adapters.openenv import OpenEnvEnv; OpenEnvEnv();"
        "print(psutil.Process().children()[0].pid, flush=True); time.sleep(600)"
    )
    owner = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True)
    try:
        assert owner.stdout is not None
        server = psutil.Process(int(owner.stdout.readline()))
    finally:
        owner.kill()
        owner.wait()
    server.wait(timeout=60)


def test_observations_are_told_as_text_or_json() -> None:
    assert text_of({"metadata": {}, "text": "hello"}) == "hello"
    assert text_of({"board": [1, 2], "text": "é"}) == '{"board": [1, 2], "text": "é"}'
