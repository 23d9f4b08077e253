"""A person at the terminal."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Sequence

from polyturn.envs.messages import AssistantMessage, Message
from polyturn.tools.plain import printable
from polyturn.tools.types import ToolCall, ToolSpec


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
