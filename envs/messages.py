"""Messages, in the shape of the OpenAI chat format."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, NotRequired, TypedDict

from polyturn.tools.plain import clean_text, is_plain, printable, recordable
from polyturn.tools.types import ToolCall

Role = Literal["system", "user", "assistant", "tool"]


class Message(TypedDict):
    """One message of a conversation, as chat templates take it."""

    role: Role
    content: str
    reasoning: NotRequired[str]
    """What an assistant thought before `content`; chat templates get it under the name that they know."""
    tool_calls: NotRequired[list[dict[str, Any]]]
    tool_call_id: NotRequired[str]
    name: NotRequired[str]


Observation = tuple[Message, ...]
"""What is new since the last action."""


def one_line(message: Message) -> str:
    """A message for a person to read, with nothing in it that a terminal obeys."""
    calls = "".join(
        f" -> {c['function']['name']}({c['function']['arguments']})" for c in message.get("tool_calls", ())
    )
    return printable(f"{message['role']}: {message['content']}{calls}")


@dataclass(frozen=True, kw_only=True, slots=True)
class AssistantMessage:
    """An action: one assistant message with its text, its parsed tool calls and the raw text behind both."""

    content: str = ""
    reasoning: str | None = None
    """What it thought, without the marks around it; never graded as content. None: it did not think at all."""
    tool_calls: tuple[ToolCall, ...] = ()
    raw_text: str | None = None
    """The text as the policy wrote it; None when the policy speaks in messages."""

    @property
    def text(self) -> str:
        """Content and reasoning as one text, `<think>...</think>` before the content where it thought."""
        return self.content if self.reasoning is None else f"<think>{self.reasoning}</think>\n{self.content}"

    def to_message(self) -> Message:
        """The message as it stands in a transcript, which JSON can hold whatever the policy wrote."""
        message: Message = {"role": "assistant", "content": clean_text(self.content)}
        if self.reasoning is not None:
            message["reasoning"] = clean_text(self.reasoning)
        if self.tool_calls:
            message["tool_calls"] = [_to_record(call) for call in self.tool_calls]
        return message


def _to_record(call: ToolCall) -> dict[str, Any]:
    arguments = dict(call.arguments) if is_plain(call.arguments) else recordable(call.arguments)
    function = {"name": clean_text(call.name), "arguments": arguments}
    return {"id": clean_text(call.id), "type": "function", "function": function}
