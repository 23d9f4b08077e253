"""Anthropic's messages: a request's body is read, its answer written, at once or as a stream."""

from __future__ import annotations

import base64
import hashlib
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
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

MAX_KEPT = 1024
"""Messages of a session that later requests can continue; the oldest is dropped first."""
REFUSED_FIELDS: Mapping[str, str] = {
    "compaction": "nothing is summed up on this side; the program may do so by a request of its own",
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
class _Kept:
    messages: tuple[Message, ...]
    """The conversation up to an answer and with it, the system message included."""
    tools: tuple[ToolSpec, ...]


@dataclass(kw_only=True, slots=True, eq=False)
class KeptThreads:
    """The conversations of one session that `thread` continues: clients send what is new in them, and no tools."""

    _kept: OrderedDict[str, _Kept] = field(default_factory=OrderedDict)

    def keep(self, message_id: str, kept: _Kept) -> None:
        """Keep a conversation by the id of the answer that it ends with."""
        self._kept[message_id] = kept
        if len(self._kept) > MAX_KEPT:
            self._kept.popitem(last=False)

    def find(self, message_id: str) -> _Kept:
        """The conversation that ends with that answer. Raises `RequestRefused`."""
        if message_id not in self._kept:
            raise RequestRefused(
                f"thread.previous_message_id {shown(message_id)} names no message of a thread"
            )
        return self._kept[message_id]


@dataclass(frozen=True, kw_only=True, slots=True)
class MessagesExchange:
    """A request for a message, and how its answer is said."""

    request: CompletionRequest
    model: str
    """As the client called it."""
    is_stream: bool
    threads: KeptThreads | None = None
    """Where the conversation is kept; None: nowhere."""

    def answer(self, completion: Completion, *, created_s: int = 0) -> dict[str, Any]:
        """The answer as one object, which does not say when it was made."""
        del created_s
        num_cached = completion.num_cached_tokens
        message, message_id = completion.message.to_message(), f"msg_{completion.completion_id}"
        if self.threads is not None:
            messages = (*self.request.messages, message)
            self.threads.keep(message_id, _Kept(messages=messages, tools=self.request.tools))
        return {
            "id": message_id,
            "type": "message",
            "role": "assistant",
            "model": self.model,
            "content": _blocks_of(message),
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


def read_messages(body: Body, threads: KeptThreads, *, is_retry: bool = False) -> MessagesExchange:
    """The request of a body of `/v1/messages`, in a session with some threads. Raises `RequestRefused`."""
    refuse_fields(body, REFUSED_FIELDS)
    refuse_fields(read_object(body.get("output_config") or {}, "output_config"), {"format": CONSTRAINS})
    thread = _read_thread(body)
    before = (
        threads.find(read_string(thread, "previous_message_id", "thread"))
        if thread.get("type") == "continue"
        else None
    )
    messages: list[Message] = list(before.messages) if before is not None else []
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
        tools=_read_tools(body) if before is None else before.tools,
        max_tokens=read_limits(body, ("max_tokens",)),
        stop=read_stops(body, "stop_sequences"),
        is_retry=is_retry,
    )
    return MessagesExchange(
        request=request,
        model=read_string(body, "model") if body.get("model") is not None else "policy",
        is_stream=read_flag(body, "stream"),
        threads=threads if thread else None,
    )


def anthropic_error(message: str, *, status: int) -> dict[str, Any]:
    """An error of this status in Anthropic's form."""
    kind = _ERROR_KINDS.get(status, "api_error" if status >= 500 else "invalid_request_error")
    return {"type": "error", "error": {"type": kind, "message": message}}


def anthropic_stream_error(message: str, *, status: int) -> bytes:
    """The event that ends a stream whose answer cannot be given."""
    return event_bytes(anthropic_error(message, status=status), event="error")


def _read_thread(body: Body) -> Body:
    """`thread`, which asks to keep the conversation or to continue one; an empty object where there is none."""
    thread = read_object(body.get("thread") or {}, "thread")
    if not thread:
        return thread
    if thread.get("type") not in ("create", "continue"):
        raise RequestRefused(f"thread.type must be 'create' or 'continue', not {shown(thread.get('type'))}")
    if thread["type"] == "continue" and any(body.get(name) for name in ("system", "tools")):
        raise RequestRefused("a thread that is continued has its system message and tools from its beginning")
    return thread


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
