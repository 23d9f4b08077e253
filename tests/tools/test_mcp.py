"""Tools of real MCP servers, over stdio and HTTP."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from typing import Any

import psutil
import pytest

pytest.importorskip("mcp", reason="needs pip install 'polyturn[mcp]'")

from polyturn.envs.faults import EnvironmentFault
from polyturn.envs.messages import AssistantMessage, ListTasks, Task
from polyturn.envs.tool_env import ToolEnv
from polyturn.tools.mcp import HttpServer, McpTools, ServerFault, StdioServer
from polyturn.tools.toolset import Toolset
from polyturn.tools.types import ToolCall, ToolResult
from tests.support import mcp_server

SERVER = mcp_server.__file__
KEY = "hunter2-hunter2"


def stdio_server(**options: Any) -> StdioServer:
    return StdioServer(
        command=[sys.executable, SERVER, "stdio"], environment={"NOTEBOOK_KEY": KEY}, **options
    )


@pytest.fixture(scope="module")
def over_stdio() -> Iterator[McpTools]:
    with McpTools(stdio_server(), call_timeout_s=20) as server:
        yield server


@pytest.fixture(scope="module")
def http_url() -> Iterator[str]:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
    process = subprocess.Popen([sys.executable, SERVER, "http", str(port)], stderr=subprocess.DEVNULL)
    try:
        deadline = time.monotonic() + 60
        while True:
            with socket.socket() as probe:
                if probe.connect_ex(("127.0.0.1", port)) == 0:
                    break
            assert process.poll() is None and time.monotonic() < deadline, "the server does not come up"
            time.sleep(0.05)
        yield f"http://127.0.0.1:{port}/mcp"
    finally:
        process.kill()
        process.wait()


@pytest.fixture(scope="module")
def over_http(http_url: str) -> Iterator[McpTools]:
    with McpTools(HttpServer(url=http_url, headers={"Authorization": "Bearer abcdef"})) as server:
        yield server


@pytest.fixture(params=["over_stdio", "over_http"])
def server(request: pytest.FixtureRequest) -> McpTools:
    value: McpTools = request.getfixturevalue(request.param)
    return value


def call(server: McpTools, name: str, arguments: Mapping[str, Any] | None = None) -> ToolResult:
    toolset = Toolset(server.tools)
    return asyncio.run(toolset.call_async(ToolCall(id="c", name=name, arguments=arguments or {})))


def test_tools_are_listed_with_their_schemas(server: McpTools) -> None:
    specs = {tool.spec.name: tool.spec for tool in server.tools}
    assert specs["add"].description == "Add two numbers.\n\nThen tell the sum."
    assert specs["add"].parameters["required"] == ["a", "b"]
    assert specs["add"].parameters["properties"]["a"]["type"] == "integer"


def test_calls_are_answered(server: McpTools) -> None:
    result = call(server, "add", {"a": 17, "b": 25})
    assert (result.content, result.ok) == ("42", True)


def test_wrong_arguments_do_not_reach_the_server(server: McpTools) -> None:
    result = call(server, "add", {"a": 17, "c": "x"})
    assert not result.ok
    assert "unknown argument 'c'" in result.content and "missing argument 'b'" in result.content


def test_an_error_of_the_server_is_told_to_the_model(server: McpTools) -> None:
    result = call(server, "locked", {"door": "green"})
    assert not result.ok
    assert "the green door is locked" in result.content


def test_a_slow_call_times_out_and_the_session_goes_on(http_url: str) -> None:
    for where in (stdio_server(), HttpServer(url=http_url)):
        with McpTools(where, call_timeout_s=0.5) as hasty:
            result = call(hasty, "wait", {"seconds": 60})
            assert result.timed_out and not result.ok
            assert call(hasty, "add", {"a": 1, "b": 1}).content == "2"


def test_many_calls_at_once_share_a_session(server: McpTools) -> None:
    toolset = Toolset(server.tools)

    async def all_at_once() -> list[ToolResult]:
        calls = [ToolCall(id=str(i), name="add", arguments={"a": i, "b": 1}) for i in range(50)]
        return await asyncio.gather(*(toolset.call_async(item) for item in calls))

    assert [result.content for result in asyncio.run(all_at_once())] == [str(i + 1) for i in range(50)]


def test_long_results_are_cut_and_say_so() -> None:
    with McpTools(stdio_server(), only=["long"], max_output_chars=100) as server:
        result = call(server, "long", {"length": 5000})
    assert result.truncated and len(result.content) < 300 and "truncated" in result.content


def test_only_and_prefix_choose_and_name_tools() -> None:
    with McpTools(stdio_server(), only=["add"], prefix="notebook_") as server:
        assert [tool.spec.name for tool in server.tools] == ["notebook_add"]
        assert call(server, "notebook_add", {"a": 1, "b": 2}).content == "3"
    with pytest.raises(ValueError, match="no tool 'subtract'; it has add, note"):
        McpTools(stdio_server(), only=["subtract"])


def test_secrets_are_blanked_out_and_no_other_variable_is_passed_on(
    over_stdio: McpTools, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert call(over_stdio, "secret").content.startswith("the key is [NOTEBOOK_KEY], and")
    monkeypatch.setenv("POLYTURN_TEST_OTHER", "inherited")
    with McpTools(stdio_server()) as fresh:
        assert call(fresh, "secret").content == "the key is [NOTEBOOK_KEY], and PWD_KEY is None"
    assert KEY not in repr(stdio_server())
    assert "abcdef" not in repr(HttpServer(url="http://x/mcp", headers={"Authorization": "Bearer abcdef"}))


def test_plain_values_stay_and_secrets_go_in_every_spelling() -> None:
    key = 'sk-"quoted"/1234'
    server = StdioServer(
        command=[sys.executable, SERVER, "stdio", f"--api-key={key}", "--mode", "production"],
        environment={"NOTEBOOK_KEY": key, "LOG_LEVEL": "info", "PHRASE": "swordfish"},
        secret_names=["PHRASE"],
    )
    with McpTools(server) as connected:
        said = call(connected, "environment").content
        described = {tool.spec.name: tool.spec for tool in connected.tools}["keyed"]
    assert "info" in said and "production" in said and "swordfish" not in said
    assert "sk-" not in said and "c2st" not in said  # nor in base64
    assert "sk-" not in described.description and "sk-" not in str(described.parameters)
    assert HttpServer(url="http://u:pw@h/mcp?token=abcdef").name == "http://h/mcp"
    headers = {"Authorization": "Bearer abcdef-1", "Accept-Language": "english"}
    secrets = HttpServer(url="http://u:pass-1@h/mcp?token=qwertz", headers=headers).secrets
    assert secrets.blank("abcdef-1 pass-1 qwertz english") == "[Authorization] [password] [token] english"


def test_an_endless_line_ends_the_server() -> None:
    with McpTools(stdio_server()) as server:
        with pytest.raises(ServerFault, match=r"a line has more than 16,777,216 bytes"):
            call(server, "long", {"length": 17_000_000})


def test_a_server_that_dies_is_a_fault_that_tells_what_it_wrote_but_no_secret() -> None:
    with McpTools(stdio_server()) as server:
        with pytest.raises(
            ServerFault, match=r"MCP server .*closed; it wrote: dying with \[NOTEBOOK_KEY\]"
        ) as caught:
            call(server, "die")
        assert KEY not in str(caught.value)
        with pytest.raises(ServerFault, match="closed"):
            call(server, "add", {"a": 1, "b": 1})
        server.renew()
        assert call(server, "add", {"a": 1, "b": 1}).content == "2"


def test_a_server_that_does_not_start_is_a_fault() -> None:
    with pytest.raises(ServerFault, match="cannot start no-such-program"):
        McpTools(StdioServer(command=["no-such-program"]))
    with pytest.raises(ServerFault, match="no connection within"):
        McpTools(StdioServer(command=["sleep", "60"]), start_timeout_s=0.5)
    with pytest.raises(ServerFault, match=r"MCP server 'http://127\.0\.0\.1:9/mcp'"):
        McpTools(HttpServer(url="http://127.0.0.1:9/mcp"), start_timeout_s=20)


def test_a_command_line_or_a_path_is_refused() -> None:
    with pytest.raises(ValueError, match="a list such as"):
        StdioServer(command="python server.py")
    with pytest.raises(ValueError, match="must begin with http"):
        HttpServer(url="localhost:8000")


class Notebook(ToolEnv):
    """Answers 42."""

    def grade(self, message: AssistantMessage) -> Mapping[str, float]:
        return {"right": float(message.content == self.task.label)}


def test_sync_and_async_steps_call_the_tools(server: McpTools) -> None:
    env = Notebook(tools=server.tools, tasks=ListTasks([Task.from_prompt("t", "17 + 25?", label="42")]))
    action = AssistantMessage(tool_calls=(ToolCall(id="c", name="add", arguments={"a": 17, "b": 25}),))
    env.reset(seed=0)
    observation, *_ = env.step(action)
    assert observation[0]["content"] == "42"

    async def play() -> str:
        await env.reset_async(seed=0)
        observation, *_ = await env.step_async(action)
        return observation[0]["content"]

    assert asyncio.run(play()) == "42"
    assert env.step(AssistantMessage(content="42"))[1] == 1.0


def test_a_dead_server_ends_the_episode_without_a_reward() -> None:
    with McpTools(stdio_server()) as server:
        env = Notebook(tools=server.tools, tasks=ListTasks([Task.from_prompt("t", "?", label="42")]))
        env.reset(seed=0)
        with pytest.raises(EnvironmentFault, match="tool 'die' failed on task 't': ServerFault"):
            env.step(AssistantMessage(tool_calls=(ToolCall(id="c", name="die"),)))


def test_a_session_for_each_episode_begins_anew() -> None:
    with McpTools(stdio_server()) as server:
        assert call(server, "note", {"text": "one"}).content == "one"
        assert call(server, "note", {"text": "two"}).content == "one / two"
        server.renew()
        assert call(server, "note", {"text": "three"}).content == "three"


def gone(pid: int, seconds: float = 60.0) -> bool:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if not psutil.pid_exists(pid) or psutil.Process(pid).status() == psutil.STATUS_ZOMBIE:
            return True
        time.sleep(0.05)
    return False


def test_closing_ends_the_server_even_one_that_does_not_want_to() -> None:
    server = McpTools(stdio_server())
    stubborn = int(call(server, "stay").content)
    assert psutil.pid_exists(stubborn)
    server.close()
    server.close()
    assert gone(stubborn)
    with pytest.raises(ServerFault, match="is closed"):
        call(server, "add", {"a": 1, "b": 1})


def test_a_server_does_not_outlive_an_owner_that_is_killed() -> None:
    program = f"""
import asyncio, sys, time
from polyturn.tools.mcp import McpTools, StdioServer
from polyturn.tools.toolset import Toolset
from polyturn.tools.types import ToolCall
server = McpTools(StdioServer(command=[sys.executable, {SERVER!r}, "stdio"]))
print(asyncio.run(Toolset(server.tools).call_async(ToolCall(id="c", name="stay"))).content, flush=True)
time.sleep(600)
"""
    owner = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True)
    try:
        assert owner.stdout is not None
        stubborn = int(owner.stdout.readline())
        assert psutil.pid_exists(stubborn)
    finally:
        os.kill(owner.pid, signal.SIGKILL)
        owner.wait()
    assert gone(stubborn)
