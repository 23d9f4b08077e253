"""What a client is given of an answer, whichever protocol it speaks."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import orjson

from polyturn.agents.sessions.requests import Completion
from polyturn.envs.messages import AssistantMessage, Message
from polyturn.tools.thoughts import split_thought


def delivered(message: AssistantMessage) -> Message:
    """The message as a client gets it, and sends it back.

    A call that could not be read is no call to a client: the text of the whole turn, as the policy wrote it, takes the
    place of the content. Calls beside it that could be read stay.
    """
    errors = [call.error for call in message.tool_calls if call.error is not None]
    if not errors:
        return message.to_message()
    content = "\n".join(filter(None, (message.content, *errors)))
    if message.raw_text is not None:
        content = split_thought(message.raw_text)[1] if message.reasoning is not None else message.raw_text
    calls = tuple(call for call in message.tool_calls if call.error is None)
    return replace(message, content=content, tool_calls=calls).to_message()


def finish_reason(completion: Completion) -> str:
    """Why the answer ended, in OpenAI's words, of what `delivered` makes of it."""
    if completion.finish_reason == "length":
        return "length"
    has_calls = any(call.error is None for call in completion.message.tool_calls)
    return "tool_calls" if has_calls else "stop"


def arguments_text(arguments: Any) -> str:
    """The arguments of a call of a delivered message, as JSON text."""
    return json.dumps(arguments, ensure_ascii=False)


def event_bytes(data: Any, *, event: str | None = None) -> bytes:
    """One server-sent event whose data are JSON."""
    head = f"event: {event}\n".encode() if event else b""
    return head + b"data: " + orjson.dumps(data, option=orjson.OPT_SERIALIZE_NUMPY) + b"\n\n"
