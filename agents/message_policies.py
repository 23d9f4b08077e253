"""Policies that speak in messages: a remote endpoint, a person at the terminal, a script."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import httpx

from polyturn.agents.http import Retries, post_json
from polyturn.agents.policy import PolicyFault
from polyturn.envs.messages import AssistantMessage, Message, Script
from polyturn.tools.plain import printable, shown
from polyturn.tools.thoughts import split_thought
from polyturn.tools.types import ToolCall, ToolSpec

_REASONING_KEYS = ("reasoning_content", "reasoning")
"""Where endpoints put what the model thought."""


class OpenAIPolicy:
    """Answers over `POST {base_url}/chat/completions`."""

    def __init__(
        self,
        *,
        client: httpx.AsyncClient,
        base_url: str,
        model: str,
        api_key: str | None = None,
        temperature: float = 1.0,
        max_tokens: int = 1024,
        retries: Retries | None = None,
    ) -> None:
        self._client = client
        self._url = f"{base_url.rstrip('/')}/chat/completions"
        self._headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}
        self._request = {"model": model, "temperature": temperature, "max_tokens": max_tokens}
        self._retries = retries or Retries()
        self._reasoning_key: str | None = None

    async def reply(self, *, messages: Sequence[Message], tools: Sequence[ToolSpec]) -> AssistantMessage:
        """Answer the conversation.

        Raises:
            PolicyFault: the endpoint failed, or its answer holds no message.
        """
        wire = [_to_wire(message, self._reasoning_key) for message in messages]
        payload: dict[str, Any] = {**self._request, "messages": wire}
        if tools:
            payload["tools"] = [tool.to_openai() for tool in tools]
        answer = await post_json(
            self._client, self._url, payload, retries=self._retries, headers=self._headers
        )
        message, told = read_answer(answer, where=self._url)
        self._reasoning_key = told or self._reasoning_key
        return message


def read_answer(answer: Any, *, where: str = "the endpoint") -> tuple[AssistantMessage, str | None]:
    """The message of an answer, and the key under which it has its reasoning, None without.

    Raises:
        PolicyFault: it holds no message.
    """
    try:
        message = answer["choices"][0]["message"]
        calls = [_read_call(call) for call in message.get("tool_calls") or []]
        told = next((key for key in _REASONING_KEYS if isinstance(message.get(key), str)), None)
        thought, content = _read_content(message.get("content"))
        reasoning = message[told] if told else thought
        return AssistantMessage(content=content, reasoning=reasoning, tool_calls=tuple(calls)), told
    except (KeyError, IndexError, TypeError, AttributeError) as error:
        raise PolicyFault(f"{where}: the answer holds no message: {shown(answer, limit=300)}") from error


def _read_content(content: Any) -> tuple[str | None, str]:
    """The thought in an answer's content, None without one, and its text. Content may be a list of parts."""
    if not isinstance(content, list):
        return split_thought(content or "")
    texts: dict[str, list[str]] = {}
    for part in content:
        kind = part["type"]
        inside = part.get(kind, part.get("text", ""))
        text = inside if isinstance(inside, str) else "".join(piece["text"] for piece in inside)
        texts.setdefault("thought" if kind in ("thinking", "reasoning") else "text", []).append(text)
    thought, text = split_thought("".join(texts.get("text", ())))
    return ("".join(texts["thought"]), text) if "thought" in texts else (thought, text)


def _to_wire(message: Message, reasoning_key: str | None) -> dict[str, Any]:
    """The message with the arguments of its calls as JSON text, which is how the endpoint wants them.

    Reasoning goes back with calls alone, under the key that the endpoint gave it: some want it there, none elsewhere.
    """
    wire: dict[str, Any] = dict(message)
    reasoning = wire.pop("reasoning", None)
    if reasoning and reasoning_key and message.get("tool_calls"):
        wire[reasoning_key] = reasoning
    if calls := message.get("tool_calls"):
        wire["tool_calls"] = [
            {**call, "function": {**call["function"], "arguments": json.dumps(call["function"]["arguments"])}}
            for call in calls
        ]
    return wire


def _read_call(call: Mapping[str, Any]) -> ToolCall:
    function = call["function"]
    call_id, name, text = str(call["id"]), function["name"], function.get("arguments") or "{}"
    if not isinstance(name, str):
        return ToolCall(id=call_id, name="", error="The call could not be read: its name must be a string.")
    try:
        # Some endpoints hand over what should be JSON text as the object itself.
        arguments = json.loads(text) if isinstance(text, str) else text
    except (ValueError, RecursionError) as error:
        problem = f"The arguments could not be read: not valid JSON: {error}."
        return ToolCall(id=call_id, name=name, error=problem)
    if not isinstance(arguments, dict):
        return ToolCall(
            id=call_id, name=name, error="The arguments could not be read: they must be a JSON object."
        )
    return ToolCall(id=call_id, name=name, arguments=arguments)


class HumanPolicy:
    """Shows what is new and reads one line: an answer, or a tool's name with its arguments as JSON.

    search {"query": "Mara Lindqvist"}
    """

    def __init__(self, *, read: Callable[[str], str] = input, write: Callable[[str], object] = print) -> None:
        self._read = read
        self._write = lambda text: write(printable(text))
        self._num_shown = 0

    async def reply(self, *, messages: Sequence[Message], tools: Sequence[ToolSpec]) -> AssistantMessage:
        """Answer the conversation. Raises `EOFError` when the input ends."""
        if len(messages) < self._num_shown:
            self._num_shown = 0
        if self._num_shown == 0 and tools:
            self._write(tool_help(tools))
        for message in messages[self._num_shown :]:
            if message["role"] != "assistant":
                self._write(f"[{message['role']}] {message['content']}")
        self._num_shown = len(messages)
        line = await asyncio.to_thread(self._read, "> ")
        return read_line(line, tools)


def tool_help(tools: Sequence[ToolSpec]) -> str:
    """One line for each tool, in the form in which it is called."""
    lines = ["Answer in one line, or call a tool:"]
    for tool in tools:
        arguments = ", ".join(f'"{name}": ...' for name in tool.parameters.get("properties", {}))
        lines.append(f"  {tool.name} {{{arguments}}}    {tool.description}")
    return "\n".join(lines)


def read_line(line: str, tools: Sequence[ToolSpec]) -> AssistantMessage:
    """The message that a typed line means: `tool {json}` is a call, anything else an answer."""
    name, _, rest = line.strip().partition(" ")
    rest = rest.strip()
    known = name in {tool.name for tool in tools}
    if not (known and (rest.startswith("{") or not rest)):
        return AssistantMessage(content=line.strip())
    try:
        call = ToolCall(id="call_0", name=name, arguments=json.loads(rest or "{}"))
    except (ValueError, RecursionError) as error:
        call = ToolCall(id="call_0", name=name, error=f"The arguments are not valid JSON: {error}.")
    return AssistantMessage(tool_calls=(call,))


class ScriptedPolicy:
    """Answers with what `script(messages, tools)` returns."""

    def __init__(self, script: Script) -> None:
        self._script = script

    @classmethod
    def saying(cls, replies: Iterable[AssistantMessage]) -> ScriptedPolicy:
        """Gives `replies` in their order, for one episode."""
        remaining = iter(replies)

        def script(messages: Sequence[Message], tools: Sequence[ToolSpec]) -> AssistantMessage:
            del messages, tools
            reply = next(remaining, None)
            if reply is None:
                raise PolicyFault("the script has no further reply")
            return reply

        return cls(script)

    async def reply(self, *, messages: Sequence[Message], tools: Sequence[ToolSpec]) -> AssistantMessage:
        """Answer the conversation."""
        return self._script(messages, tools)
