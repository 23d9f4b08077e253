"""An OpenEnv server's environment: its actions are calls of one tool, or plain messages."""

from __future__ import annotations

import json
import random
from collections.abc import Mapping, Sequence
from typing import Any

from polyturn.envs.adapters.openenv.connection import ActionRefused, Connection, ServerFault, action_schema
from polyturn.envs.adapters.openenv.demo import HIGHEST, hidden_number
from polyturn.envs.adapters.openenv.local import demo_server
from polyturn.envs.adapters.seeded import SeededTasks, check_size, check_split
from polyturn.envs.messages import AssistantMessage, Message
from polyturn.envs.scripts import Script
from polyturn.envs.tasks import Task, TaskSource
from polyturn.envs.tool_env import ToolEnv
from polyturn.tools.decorator import Tool
from polyturn.tools.types import ToolCall, ToolError, ToolSpec


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
    told = {name: value for name, value in observation.items() if name != "metadata" or value}
    values = list(told.values())
    if len(values) == 1 and isinstance(values[0], str):
        return values[0]
    return json.dumps(told, ensure_ascii=False)


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
