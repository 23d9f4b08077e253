"""The wire: OpenEnv's WebSocket protocol, one session of a server's environment for each connection."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import httpx

from polyturn.envs.adapters.missing import require

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
