"""Anthropic's messages: a request's body is read, its answer written, at once or as a stream."""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from polyturn.agents.sessions.fields import (
    Body,
    call_record,
    checked_tools,
    read_flag,
    read_limits,
    read_name,
    read_object,
    read_objects,
    read_part,
    read_stops,
    read_string,
    read_text,
    read_tool,
    refuse_fields,
    with_names,
)
from polyturn.agents.sessions.openai_chat import CONSTRAINS
from polyturn.agents.sessions.requests import Completion, CompletionRequest, RequestRefused
from polyturn.agents.sessions.writing import arguments_text, event_bytes
from polyturn.envs.messages import Message
from polyturn.tools.plain import shown
from polyturn.tools.types import ToolSpec

REFUSED_FIELDS: Mapping[str, str] = {
    "container": "nothing is run on this side",
    "mcp_servers": "there are no tools on this side; give the program tools of its own",
    "output_format": CONSTRAINS,
}
"""What is refused where it asks for anything, with the reason."""
PING = event_bytes({"type": "ping"}, event="ping")
"""What a stream says while its answer is being made."""
_TEXT_BLOCKS = frozenset(("text",))
_CHOICES = ("auto", "any", "tool", "none")
_ERROR_KINDS: Mapping[int, str] = {
    401: "authentication_error",
    404: "not_found_error",
    410: "not_found_error",
    413: "request_too_large",
    429: "rate_limit_error",
    503: "overloaded_error",
}


@dataclass(frozen=True, kw_only=True, slots=True)
class MessagesExchange:
    """A request for a message, and how its answer is said."""

    request: CompletionRequest
    model: str
    """As the client called it."""
    is_stream: bool

    def answer(self, completion: Completion, *, created_s: int = 0) -> dict[str, Any]:
        """The answer as one object, which does not say when it was made."""
        del created_s
        num_cached = completion.num_cached_tokens
        return {
            "id": f"msg_{completion.completion_id}",
            "type": "message",
            "role": "assistant",
            "model": self.model,
            "content": _blocks_of(completion.message.to_message()),
            **_stop_of(completion),
            "usage": {
                "input_tokens": len(completion.prompt_ids) - num_cached,
                "cache_creation_input_tokens": 0,
                "cache_read_input_tokens": num_cached,
                "output_tokens": len(completion.token_ids),
            },
        }

    def events(self, completion: Completion, *, created_s: int = 0) -> Iterator[bytes]:
        """The answer as server-sent events, which do not say when it was made."""
        del created_s
        for event in self._events(completion):
            yield event_bytes(event, event=event["type"])

    def _events(self, completion: Completion) -> Iterator[dict[str, Any]]:
        whole = self.answer(completion)
        usage = {**whole["usage"], "output_tokens": 0}
        begun = {**whole, "content": [], "stop_reason": None, "stop_sequence": None, "usage": usage}
        yield {"type": "message_start", "message": begun}
        for index, block in enumerate(whole["content"]):
            empty, deltas = _in_deltas(block)
            yield {"type": "content_block_start", "index": index, "content_block": empty}
            for delta in deltas:
                yield {"type": "content_block_delta", "index": index, "delta": delta}
            yield {"type": "content_block_stop", "index": index}
        yield {
            "type": "message_delta",
            "delta": _stop_of(completion),
            "usage": {"output_tokens": whole["usage"]["output_tokens"]},
        }
        yield {"type": "message_stop"}


def read_messages(body: Body, *, is_retry: bool = False) -> MessagesExchange:
    """The request of a body of `/v1/messages`. Raises `RequestRefused`."""
    refuse_fields(body, REFUSED_FIELDS)
    refuse_fields(read_object(body.get("output_config") or {}, "output_config"), {"format": CONSTRAINS})
    messages: list[Message] = []
    if body.get("system") is not None:
        messages.append({"role": "system", "content": read_text(body["system"], "system", _TEXT_BLOCKS)})
    given = read_objects(body.get("messages"), "messages")
    if not given:
        raise RequestRefused("messages must hold at least one message")
    for where, fields in given:
        messages += _read_message(fields, where)
    if given[-1][1]["role"] == "assistant":
        raise RequestRefused("messages must not end with one of the assistant's: an answer continues none")
    request = CompletionRequest(
        messages=with_names(messages),
        tools=_read_tools(body),
        max_tokens=read_limits(body, ("max_tokens",)),
        stop=read_stops(body, "stop_sequences"),
        is_retry=is_retry,
    )
    return MessagesExchange(
        request=request,
        model=read_string(body, "model") if body.get("model") is not None else "policy",
        is_stream=read_flag(body, "stream"),
    )


def anthropic_error(message: str, *, status: int) -> dict[str, Any]:
    """An error of this status in Anthropic's form."""
    kind = _ERROR_KINDS.get(status, "api_error" if status >= 500 else "invalid_request_error")
    return {"type": "error", "error": {"type": kind, "message": message}}


def anthropic_stream_error(message: str, *, status: int) -> bytes:
    """The event that ends a stream whose answer cannot be given."""
    return event_bytes(anthropic_error(message, status=status), event="error")


def _read_tools(body: Body) -> tuple[ToolSpec, ...]:
    tools = []
    for where, fields in read_objects(body.get("tools"), "tools"):
        if fields.get("type") not in (None, "custom"):
            raise RequestRefused(
                f"{where} is of type {shown(fields['type'])}; tools are the program's own, with an input_schema"
            )
        tools.append(read_tool(fields, where, schema="input_schema"))
    choice = read_object(body.get("tool_choice") or {"type": "auto"}, "tool_choice").get("type")
    if choice not in _CHOICES:
        raise RequestRefused(f"tool_choice.type must be one of {', '.join(_CHOICES)}, not {shown(choice)}")
    return () if choice == "none" else checked_tools(tools)


def _read_message(fields: Body, where: str) -> list[Message]:
    """The messages that one of Anthropic's comes to: each result of a tool is one of its own."""
    role, content = fields.get("role"), fields.get("content")
    if role not in ("user", "assistant", "system"):
        raise RequestRefused(f"{where}.role must be one of user, assistant, system, not {shown(role)}")
    if content is None:
        raise RequestRefused(f"{where} has no content")
    if role == "system":
        return [{"role": "system", "content": read_text(content, f"{where}.content", _TEXT_BLOCKS)}]
    if isinstance(content, str):
        content = [{"type": "text", "text": content}]
    blocks = read_objects(content, f"{where}.content")
    return [_read_assistant(blocks)] if role == "assistant" else list(_read_user(blocks))


def _read_user(blocks: list[tuple[str, Body]]) -> Iterator[Message]:
    """Texts that follow one another are one message."""
    texts: list[str] = []
    for where, block in blocks:
        if block.get("type") != "tool_result":
            texts.append(read_part(block, where, _TEXT_BLOCKS))
            continue
        if texts:
            yield {"role": "user", "content": "\n".join(texts)}
            texts = []
        yield {
            "role": "tool",
            "content": read_text(block.get("content"), f"{where}.content", _TEXT_BLOCKS),
            "tool_call_id": read_string(block, "tool_use_id", where),
        }
    if texts or not blocks:
        yield {"role": "user", "content": "\n".join(texts)}


def _read_assistant(blocks: list[tuple[str, Body]]) -> Message:
    texts: list[str] = []
    thoughts: list[str] = []
    calls: list[dict[str, Any]] = []
    for where, block in blocks:
        kind = block.get("type")
        if kind == "thinking":
            thoughts.append(read_string(block, "thinking", where))
        elif kind == "tool_use":
            call_id, name = read_string(block, "id", where), read_name(block, "name", where)
            calls.append(call_record(call_id, name, block.get("input") or {}))
        elif kind != "redacted_thinking":  # what another model thought, in its provider's cipher
            texts.append(read_part(block, where, _TEXT_BLOCKS))
    message: Message = {"role": "assistant", "content": "\n".join(texts)}
    if thoughts:
        message["reasoning"] = "\n".join(thoughts)
    if calls:
        message["tool_calls"] = calls
    return message


def _blocks_of(message: Message) -> list[dict[str, Any]]:
    blocks: list[dict[str, Any]] = []
    calls = message.get("tool_calls", [])
    if (reasoning := message.get("reasoning")) is not None:
        blocks.append({"type": "thinking", "thinking": reasoning, "signature": _signature(reasoning)})
    if message["content"] or not calls:
        blocks.append({"type": "text", "text": message["content"]})
    blocks += [
        {
            "type": "tool_use",
            "id": call["id"],
            "name": call["function"]["name"],
            "input": call["function"]["arguments"],
        }
        for call in calls
    ]
    return blocks


def _signature(reasoning: str) -> str:
    """What clients send back with a thought. Nobody checks it: a thought that was changed is another message."""
    return base64.b64encode(hashlib.blake2b(reasoning.encode(), digest_size=24).digest()).decode()


def _in_deltas(block: dict[str, Any]) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """A block as it begins, and what is added to it."""
    if block["type"] == "thinking":
        return {**block, "thinking": "", "signature": ""}, [
            {"type": "thinking_delta", "thinking": block["thinking"]},
            {"type": "signature_delta", "signature": block["signature"]},
        ]
    if block["type"] == "text":
        return {**block, "text": ""}, [{"type": "text_delta", "text": block["text"]}]
    delta = {"type": "input_json_delta", "partial_json": arguments_text(block["input"])}
    return {**block, "input": {}}, [delta]


def _stop_of(completion: Completion) -> dict[str, Any]:
    reasons = {"length": "max_tokens", "tool_calls": "tool_use", "stop": "end_turn"}
    reason = reasons[completion.finish_reason]
    if reason == "end_turn" and completion.stop is not None:
        return {"stop_reason": "stop_sequence", "stop_sequence": completion.stop}
    return {"stop_reason": reason, "stop_sequence": None}
