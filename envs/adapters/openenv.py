"""The environment of an OpenEnv server: its actions are calls of one tool, or plain messages.

Needs `polyturn[openenv]`.
"""

from __future__ import annotations

import functools
import json
import os
import random
import socket
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from typing import Any

import httpx

from polyturn.envs.adapters.openenv_demo import HIGHEST, hidden_number
from polyturn.envs.adapters.peer import SeededTasks, check_size, check_split, require, require_installed
from polyturn.envs.messages import AssistantMessage, Message, Script, Task, TaskSource
from polyturn.envs.tool_env import ToolEnv
from polyturn.tools.children import end_child, start_child
from polyturn.tools.tool import Tool
from polyturn.tools.types import ToolCall, ToolError, ToolSpec

MAX_MESSAGE_BYTES = 16 << 20


class ServerFault(RuntimeError):
    """The server cannot be reached, has died, does not answer in time, or its environment has raised."""


class ActionRefused(ValueError):
    """The server takes an action for malformed."""


class Connection:
    """A session with the environment of a server.

    Raises:
        MissingPackage: `websockets` is not installed.
        ServerFault: the server cannot be reached, or has no session left.
    """

    def __init__(self, url: str, *, timeout_s: float) -> None:
        client = require("websockets.sync.client", extra="openenv")
        self._url, self._timeout_s = url, timeout_s
        address = f"{url.replace('http', 'ws', 1).rstrip('/')}/ws"
        try:
            self._socket = client.connect(
                address,
                open_timeout=timeout_s,
                max_size=MAX_MESSAGE_BYTES,
                proxy=None,
                ping_interval=None,
                close_timeout=1,
            )
        except _failures() as error:
            raise ServerFault(f"cannot connect to the OpenEnv server {url}: {_words(error)}") from error

    def reset(self, options: Mapping[str, Any]) -> Mapping[str, Any]:
        """`{"observation": ..., "reward": ..., "done": ...}`. Raises ServerFault."""
        try:
            return self._ask({"type": "reset", "data": dict(options)})
        except ActionRefused as error:
            raise ServerFault(str(error)) from error

    def step(self, action: Mapping[str, Any]) -> Mapping[str, Any]:
        """As `reset`. Raises ServerFault and ActionRefused."""
        return self._ask({"type": "step", "data": dict(action)})

    def close(self) -> None:
        """End the session. Closing again does nothing."""
        self._socket.close()

    def _ask(self, message: Mapping[str, Any]) -> Mapping[str, Any]:
        try:
            self._socket.send(json.dumps(message))
            answer = json.loads(self._socket.recv(timeout=self._timeout_s))
        except _failures() as error:
            raise ServerFault(f"the OpenEnv server {self._url} failed: {_words(error)}") from error
        data: Mapping[str, Any] = answer["data"]
        if answer["type"] != "error":
            return data
        if data.get("code") == "VALIDATION_ERROR":
            problems = "; ".join(_problem(error) for error in data.get("errors", ()))
            raise ActionRefused(problems or str(data.get("message")))
        raise ServerFault(f"the OpenEnv server {self._url} says {data.get('code')}: {data.get('message')}")


def action_schema(url: str, *, timeout_s: float) -> dict[str, Any]:
    """The JSON schema of the actions that the server's environment takes. Raises ServerFault."""
    try:
        answer = httpx.get(f"{url.rstrip('/')}/schema", timeout=timeout_s, trust_env=False).raise_for_status()
        schema: dict[str, Any] = answer.json()["action"]
    except (httpx.HTTPError, ValueError, KeyError) as error:
        raise ServerFault(f"the OpenEnv server {url} does not tell its schema: {_words(error)}") from error
    return schema


def _failures() -> tuple[type[Exception], ...]:
    from websockets.exceptions import WebSocketException

    return (OSError, TimeoutError, WebSocketException, json.JSONDecodeError)


def _words(error: Exception) -> str:
    return f"{type(error).__name__}: {error}".rstrip(": ")


def _problem(error: Mapping[str, Any]) -> str:
    where = ".".join(str(part) for part in error.get("loc", ()))
    return f"{where}: {error.get('msg')}" if where else str(error.get("msg"))


START_S = 60.0


def demo_server() -> str:
    """The URL of a server that plays the demonstration game. It ends with this process, however that ends.

    Raises:
        MissingPackage: `openenv` is not installed.
        ServerFault: it does not come up.
    """
    require_installed("openenv", extra="openenv")
    return _demo_server(os.getpid())


@functools.lru_cache(maxsize=1)
def _demo_server(owner: int) -> str:
    # By owner: a fork has a server of its own.
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
    command = [sys.executable, "-m", "polyturn.envs.adapters.openenv_demo", str(port), str(owner)]
    process = start_child(
        command, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    deadline = time.monotonic() + START_S
    while process.poll() is None and time.monotonic() < deadline:
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) == 0:
                return f"http://127.0.0.1:{port}"
        time.sleep(0.05)
    end_child(process)
    raise ServerFault("the demonstration server of OpenEnv does not come up")


class OpenEnvEnv(ToolEnv):
    """Plays an environment that an OpenEnv server runs, over its WebSocket protocol.

    The action's JSON schema, which the server tells, becomes the tool `act`; its observations are results of the tool.
    With `text_field` an action is a plain message instead, put into that field. The reward is the sum of the steps'.

    An action that the server takes for malformed is told to the model; a server that is gone, slow, or says that its
    environment raised is an `EnvironmentFault`. The client needs no code of the environment, and runs none.
    """

    def __init__(
        self,
        *,
        url: str | None = None,
        text_field: str | None = None,
        prompt: str = "",
        size: int = 100_000,
        max_turns: int | None = 32,
        timeout_s: float = 60.0,
        tasks: TaskSource | None = None,
        split: str = "train",
        render_mode: str | None = None,
    ) -> None:
        """
        Args:
            url: Of the server, such as `http://localhost:8000`; None starts a demonstration game on this machine.
            text_field: The action's field that a plain message fills.
            prompt: A system message before the first observation.
            size: Tasks of each split, each a seed for the server's `reset`.
            max_turns: Actions, and the message that ends the episode.
            timeout_s: For one answer of the server.
            tasks: Takes the place of the seeds. A task's messages come before the first observation; its metadata may
                have `reset`, the arguments of the server's reset.
            split: `train`, `validation` or `heldout`.
            render_mode: None or "ansi".

        Raises:
            MissingPackage: `websockets` (or, without `url`, `openenv`) is not installed.
            ServerFault: the server does not answer.
            ValueError: a `text_field` that actions do not have.
        """
        check_size(size)
        self._is_demo = url is None
        self._url = demo_server() if url is None else url
        self._timeout_s, self._text_field, self._prompt, self._size = timeout_s, text_field, prompt, size
        schema = _without_metadata(action_schema(self._url, timeout_s=timeout_s))
        if text_field is not None and text_field not in schema["properties"]:
            raise ValueError(
                f"actions have no field {text_field!r}; they have {', '.join(schema['properties'])}"
            )
        act = Tool(
            spec=ToolSpec(name="act", description=schema.pop("description", "Act."), parameters=schema),
            function=self._act,
        )
        super().__init__(
            tools=() if text_field else (act,),
            tasks=tasks,
            split=split,
            max_turns=max_turns,
            render_mode=render_mode,
        )
        self._connection: Connection | None = None
        self._returned = 0.0
        self.oracle = self._tell_number if self._is_demo and not text_field else None

    def tasks(self, split: str) -> TaskSource:
        """Seeds, disjoint between `train`, `validation` and `heldout`; or the tasks given to the constructor."""
        if self._given_tasks is not None:
            return self._given_tasks
        check_split(split)
        return SeededTasks("openenv", split, self._size, self._seed_task)

    def begin(self, task: Task) -> Sequence[Message]:
        self._returned = 0.0
        options = task.metadata.get("reset", {})
        try:
            result = self._connected().reset(options)
        except ServerFault:
            self._disconnect()  # the server may have forgotten the session; a new one gets one more chance
            result = self._connected().reset(options)
        system: list[Message] = [{"role": "system", "content": self._prompt}] if self._prompt else []
        return [*system, *task.messages, {"role": "user", "content": text_of(result["observation"])}]

    def follow_up(self, message: AssistantMessage) -> Sequence[Message]:
        if self._text_field is None:
            return ()
        try:
            observed = self._take({self._text_field: message.content})
        except ToolError as error:
            observed = str(error)
        return () if self._finished else ({"role": "user", "content": observed},)

    def grade(self, message: AssistantMessage) -> Mapping[str, float]:
        """What the server has paid."""
        del message
        return {"return": self._returned}

    def random_policy(self, seed: int) -> Script:
        """In the demonstration game, random guesses; elsewhere any messages of the action space."""
        if not self._is_demo:
            return super().random_policy(seed)
        rng = random.Random(seed)
        return _guesses(lambda: rng.randint(1, HIGHEST))

    def close(self) -> None:
        self._disconnect()
        super().close()

    def _act(self, **arguments: Any) -> str:
        return self._take(arguments)

    def _take(self, action: Mapping[str, Any]) -> str:
        if self._finished:
            raise ToolError("The episode is over.")
        connection = self._connected()
        try:
            result = connection.step(action)
        except ActionRefused as error:
            raise ToolError(f"The action was refused: {error}") from error
        except ServerFault:
            self._disconnect()
            raise
        self._returned += float(result.get("reward") or 0.0)
        if result.get("done"):
            self.finish()
        return text_of(result["observation"])

    def _connected(self) -> Connection:
        if self._connection is None:
            self._connection = Connection(self._url, timeout_s=self._timeout_s)
        return self._connection

    def _disconnect(self) -> None:
        connection, self._connection = self._connection, None
        if connection is not None:
            connection.close()

    def _seed_task(self, task_id: str, seed: int) -> Task:
        label = hidden_number(seed) if self._is_demo else None
        return Task(task_id=task_id, messages=(), label=label, metadata={"reset": {"seed": seed}})

    def _tell_number(self, messages: Sequence[Message], tools: Sequence[ToolSpec]) -> AssistantMessage:
        return _guesses(lambda: self.task.label)(messages, tools)


def text_of(observation: Mapping[str, Any]) -> str:
    """An observation for a model: its only field if that is a text, else all of it as JSON."""
    fields = {name: value for name, value in observation.items() if name != "metadata" or value}
    values = list(fields.values())
    if len(values) == 1 and isinstance(values[0], str):
        return values[0]
    return json.dumps(fields, ensure_ascii=False)


def _guesses(number: Any) -> Script:
    def script(messages: Sequence[Message], tools: Sequence[ToolSpec]) -> AssistantMessage:
        del messages, tools
        return AssistantMessage(
            tool_calls=(ToolCall(id="call_0", name="act", arguments={"number": number()}),)
        )

    return script


def _without_metadata(schema: Mapping[str, Any]) -> dict[str, Any]:
    """The schema of what a model should fill: OpenEnv's base class adds a field for notes."""
    properties = {name: part for name, part in schema.get("properties", {}).items() if name != "metadata"}
    return {"type": "object", **schema, "properties": properties}
