"""OpenAI's responses: a request's body is read, its answer written, at once or as a stream.

An assistant message is several items here: its reasoning, its text, and each of its calls. They are put together again
when a client sends them back.
"""

from __future__ import annotations

import base64
import binascii
from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
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
    read_string,
    read_text,
    read_tool,
    refuse_fields,
    with_names,
)
from polyturn.agents.sessions.openai_chat import CONSTRAINS, openai_error, read_openai_choice
from polyturn.agents.sessions.requests import Completion, CompletionRequest, RequestRefused
from polyturn.agents.sessions.writing import arguments_text, event_bytes
from polyturn.envs.messages import Message
from polyturn.tools.plain import clean_text, shown
from polyturn.tools.types import ToolSpec

MAX_KEPT = 1024
"""Responses of a session that later ones can go on from; the oldest is dropped first."""
REFUSED_FIELDS: Mapping[str, str] = {
    "background": "answers are given to those that wait for them",
    "conversation": "conversations are not kept here; use previous_response_id, or send the whole history",
    "prompt": "there are no prompts on this side",
    "top_logprobs": "logprobs are given in chat completions, and those of the sampled tokens alone",
}
"""What is refused where it asks for anything, with the reason."""
_ROLES: Mapping[str, str] = {
    "system": "system",
    "developer": "system",
    "user": "user",
    "assistant": "assistant",
}
_TEXT_PARTS = frozenset(("input_text", "output_text", "text"))
_ENCRYPTED = "reasoning.encrypted_content"
_OWN = "polyturn:"
_RANKS: Mapping[str, int] = {"reasoning": 0, "message": 1, "function_call": 2}
"""In which order the items of one assistant message stand."""


@dataclass(frozen=True, kw_only=True, slots=True)
class _Kept:
    messages: tuple[Message, ...]
    """The conversation up to the answer and with it, but for the instructions."""
    items: tuple[dict[str, Any], ...]
    """Those of the answer."""


@dataclass(kw_only=True, slots=True, eq=False)
class KeptResponses:
    """The responses of one session that `previous_response_id` and item references may name."""

    _kept: OrderedDict[str, _Kept] = field(default_factory=OrderedDict)

    def keep(self, response_id: str, messages: tuple[Message, ...], items: Sequence[dict[str, Any]]) -> None:
        """Keep a response, with the conversation that it ends."""
        self._kept[response_id] = _Kept(messages=messages, items=tuple(items))
        if len(self._kept) > MAX_KEPT:
            self._kept.popitem(last=False)

    def messages(self, response_id: str) -> tuple[Message, ...]:
        """The conversation that a response ended. Raises `RequestRefused`."""
        if response_id not in self._kept:
            raise RequestRefused(
                f"previous_response_id {shown(response_id)} names no response that was stored in this session"
            )
        return self._kept[response_id].messages

    def item(self, item_id: str) -> dict[str, Any]:
        """An item of a kept response. Raises `RequestRefused`."""
        for kept in reversed(self._kept.values()):
            for item in kept.items:
                if item["id"] == item_id:
                    return item
        raise RequestRefused(f"no item {shown(item_id)} was stored in this session")


@dataclass(frozen=True, kw_only=True, slots=True)
class ResponsesExchange:
    """A request for a response, and how its answer is said."""

    request: CompletionRequest
    model: str
    """As the client called it."""
    is_stream: bool
    kept: KeptResponses | None
    """Where the response is kept; None: nowhere."""
    num_instructions: int
    """Messages at the beginning that are no part of what is kept."""
    has_encrypted: bool
    """Whether reasoning comes as `encrypted_content` too."""

    def answer(self, completion: Completion, *, created_s: int) -> dict[str, Any]:
        """The answer as one object."""
        message = completion.message.to_message()
        is_cut = completion.finish_reason == "length"
        items = _items_of(message, completion.completion_id, is_cut=is_cut, has_encrypted=self.has_encrypted)
        head = self._head(completion, created_s)
        if self.kept is not None:
            self.kept.keep(head["id"], (*self.request.messages[self.num_instructions :], message), items)
        num_prompt, num_sampled = len(completion.prompt_ids), len(completion.token_ids)
        return {
            **head,
            "status": "incomplete" if is_cut else "completed",
            "incomplete_details": {"reason": "max_output_tokens"} if is_cut else None,
            "output": items,
            "usage": {
                "input_tokens": num_prompt,
                "input_tokens_details": {"cached_tokens": completion.num_cached_tokens},
                "output_tokens": num_sampled,
                "output_tokens_details": {"reasoning_tokens": 0},
                "total_tokens": num_prompt + num_sampled,
            },
        }

    def events(self, completion: Completion, *, created_s: int) -> Iterator[bytes]:
        """The answer as server-sent events."""
        for number, event in enumerate(self._events(completion, created_s)):
            yield event_bytes({**event, "sequence_number": number}, event=event["type"])

    def _events(self, completion: Completion, created_s: int) -> Iterator[dict[str, Any]]:
        whole = self.answer(completion, created_s=created_s)
        begun = {**self._head(completion, created_s), "status": "in_progress", "output": []}
        yield {"type": "response.created", "response": begun}
        yield {"type": "response.in_progress", "response": begun}
        for index, item in enumerate(whole["output"]):
            yield from _item_events(item, index)
        ended = "response.completed" if whole["status"] == "completed" else "response.incomplete"
        yield {"type": ended, "response": whole}

    def _head(self, completion: Completion, created_s: int) -> dict[str, Any]:
        """What every state of the response has. Tools and instructions are not repeated."""
        return {
            "id": f"resp_{completion.completion_id}",
            "object": "response",
            "created_at": created_s,
            "model": self.model,
            "error": None,
            "incomplete_details": None,
            "instructions": None,
            "max_output_tokens": self.request.max_tokens,
            "metadata": {},
            "parallel_tool_calls": True,
            "store": self.kept is not None,
            "text": {"format": {"type": "text"}},
            "tool_choice": "auto",
            "tools": [],
            "truncation": "disabled",
            "usage": None,
        }


def read_response(body: Body, kept: KeptResponses, *, is_retry: bool = False) -> ResponsesExchange:
    """The request of a body of `/v1/responses`, in a session that has kept some. Raises `RequestRefused`."""
    refuse_fields(body, REFUSED_FIELDS)
    text_format = read_object(
        read_object(body.get("text") or {}, "text").get("format") or {"type": "text"}, "text.format"
    )
    if text_format.get("type") != "text":
        raise RequestRefused(f"text.format must be of type 'text': {CONSTRAINS}")
    include = body.get("include") or []
    if not isinstance(include, list):
        raise RequestRefused(f"include must be a list, not {shown(include)}")
    if "message.output_text.logprobs" in include:
        raise RequestRefused("include: logprobs are given in chat completions")
    messages = list(_read_input(body.get("input"), kept))
    previous = body.get("previous_response_id")
    if previous is not None:
        messages = [*kept.messages(read_string(body, "previous_response_id")), *messages]
    if not messages:
        raise RequestRefused("input must hold at least one message")
    instructions: list[Message] = []
    if body.get("instructions") is not None:
        instructions = [{"role": "system", "content": read_string(body, "instructions")}]
    request = CompletionRequest(
        messages=with_names([*instructions, *messages]),
        tools=_read_tools(body),
        max_tokens=read_limits(body, ("max_output_tokens",)),
        is_retry=is_retry,
    )
    return ResponsesExchange(
        request=request,
        model=read_string(body, "model") if body.get("model") is not None else "policy",
        is_stream=read_flag(body, "stream"),
        kept=kept if body.get("store") is None or read_flag(body, "store") else None,
        num_instructions=len(instructions),
        has_encrypted=_ENCRYPTED in include,
    )


def responses_stream_error(message: str, *, status: int) -> bytes:
    """The event that ends a stream whose answer cannot be given: in the words of the API and of its clients."""
    error = openai_error(message, status=status)
    event = {"type": "error", "code": error["error"]["code"], "message": message, "param": None}
    return event_bytes({**event, **error, "sequence_number": 0}, event="error")


def _read_tools(body: Body) -> tuple[ToolSpec, ...]:
    tools = []
    for where, fields in read_objects(body.get("tools"), "tools"):
        if fields.get("type") != "function":
            raise RequestRefused(
                f"{where} is of type {shown(fields.get('type'))}; tools are functions that the program itself calls"
            )
        tools.append(read_tool(fields, where, schema="parameters"))
    return checked_tools(tools) if read_openai_choice(body.get("tool_choice")) else ()


def _read_input(given: Any, kept: KeptResponses) -> Iterator[Message]:
    """The messages that a list of items comes to."""
    if isinstance(given, str):
        yield {"role": "user", "content": clean_text(given)}
        return
    turn = _Turn()
    for where, fields in read_objects(given, "input"):
        item = fields
        if fields.get("type") == "item_reference":
            item = kept.item(read_string(fields, "id", where))
        kind = item.get("type", "message")
        role = item.get("role")
        if kind == "function_call_output" or (kind == "message" and role != "assistant"):
            yield from turn.end()
            yield _read_result(item, where) if kind == "function_call_output" else _read_message(item, where)
        elif isinstance(kind, str) and kind in _RANKS:
            yield from turn.add(item, kind, where)
        else:
            raise RequestRefused(
                f"{where} is of type {shown(kind)}; messages, reasoning, function calls and their outputs are read"
            )
    yield from turn.end()


class _Turn:
    """Puts the items of an assistant message together, which stand behind one another in a fixed order."""

    def __init__(self) -> None:
        self._message: Any = None
        self._rank = -1

    def add(self, item: Body, kind: str, where: str) -> Iterator[Message]:
        """Take an item in; gives the message before it where it begins another."""
        rank = _RANKS[kind]
        if rank < self._rank or (rank == self._rank and kind != "function_call"):
            yield from self.end()
        if self._message is None:
            self._message = {"role": "assistant", "content": ""}
        self._rank = rank
        if kind == "reasoning":
            if (reasoning := _read_reasoning(item, where)) is not None:
                self._message["reasoning"] = reasoning
        elif kind == "message":
            self._message["content"] = _read_content(item, where)
        else:
            call = call_record(
                read_string(item, "call_id", where),
                read_name(item, "name", where),
                item.get("arguments") or {},
            )
            self._message.setdefault("tool_calls", []).append(call)

    def end(self) -> Iterator[Message]:
        """The message, if there is one. Reasoning that nobody can read, with nothing behind it, is none."""
        message, rank = self._message, self._rank
        self._message, self._rank = None, -1
        if message is not None and (rank > 0 or "reasoning" in message):
            yield message


def _read_message(item: Body, where: str) -> Message:
    role = item.get("role")
    if not isinstance(role, str) or role not in _ROLES:
        raise RequestRefused(f"{where}.role must be one of {', '.join(_ROLES)}, not {shown(role)}")
    message: Any = {"role": _ROLES[role], "content": _read_content(item, where)}
    return message


def _read_content(item: Body, where: str) -> str:
    if "content" not in item:
        raise RequestRefused(f"{where} has no content")
    content = item["content"]
    if isinstance(content, list):
        content = [_refusal_as_text(part) for part in content]
    return read_text(content, f"{where}.content", _TEXT_PARTS)


def _refusal_as_text(part: Any) -> Any:
    if isinstance(part, Mapping) and part.get("type") == "refusal":
        return {"type": "output_text", "text": part.get("refusal")}
    return part


def _read_result(item: Body, where: str) -> Message:
    call_id = read_string(item, "call_id", where)
    content = read_text(item.get("output"), f"{where}.output", _TEXT_PARTS)
    return {"role": "tool", "content": content, "tool_call_id": call_id}


def _read_reasoning(item: Body, where: str) -> str | None:
    """What was thought: as it is, as we have encoded it, or as it was summed up; None where none of that is there."""
    for name, kind in (("content", "reasoning_text"), ("summary", "summary_text")):
        if item.get(name):
            return read_text(item[name], f"{where}.{name}", (kind, "text"))
        encoded = item.get("encrypted_content")
        if name == "content" and isinstance(encoded, str) and encoded.startswith(_OWN):
            try:
                return base64.b64decode(encoded.removeprefix(_OWN), validate=True).decode()
            except (binascii.Error, ValueError) as error:
                raise RequestRefused(f"{where}.encrypted_content is not as it was given") from error
    # An empty thought of ours has an empty text.
    return "" if isinstance(item.get("content"), list) and item["content"] else None


def _items_of(
    message: Message, completion_id: str, *, is_cut: bool, has_encrypted: bool
) -> list[dict[str, Any]]:
    items: list[dict[str, Any]] = []
    calls = message.get("tool_calls", [])
    if (reasoning := message.get("reasoning")) is not None:
        encoded = _OWN + base64.b64encode(reasoning.encode()).decode() if has_encrypted else None
        items.append(
            {
                "type": "reasoning",
                "id": f"rs_{completion_id}",
                "summary": [],
                "content": [{"type": "reasoning_text", "text": reasoning}],
                "encrypted_content": encoded,
                "status": "completed",
            }
        )
    if message["content"] or not calls:
        text = {"type": "output_text", "text": message["content"], "annotations": [], "logprobs": []}
        items.append(
            {
                "type": "message",
                "id": f"msg_{completion_id}",
                "role": "assistant",
                "status": "incomplete" if is_cut and not calls else "completed",
                "content": [text],
            }
        )
    items += [
        {
            "type": "function_call",
            "id": f"fc_{completion_id}_{number}",
            "call_id": call["id"],
            "name": call["function"]["name"],
            "arguments": arguments_text(call["function"]["arguments"]),
            "status": "completed",
        }
        for number, call in enumerate(calls)
    ]
    return items


def _item_events(item: dict[str, Any], index: int) -> Iterator[dict[str, Any]]:
    """The events from an item's beginning to its end."""
    at = {"output_index": index, "item_id": item["id"]}
    if item["type"] == "function_call":
        yield _item_event("added", {**item, "arguments": "", "status": "in_progress"}, index)
        yield {"type": "response.function_call_arguments.delta", **at, "delta": item["arguments"]}
        done = {"name": item["name"], "arguments": item["arguments"]}
        yield {"type": "response.function_call_arguments.done", **at, **done}
    else:
        yield _item_event("added", {**item, "content": [], "status": "in_progress"}, index)
        [part] = item["content"]
        at["content_index"] = 0
        yield {"type": "response.content_part.added", **at, "part": {**part, "text": ""}}
        kind = f"response.{part['type']}"
        more: dict[str, Any] = {"logprobs": []} if item["type"] == "message" else {}
        if part["text"]:
            yield {"type": f"{kind}.delta", **at, **more, "delta": part["text"]}
        yield {"type": f"{kind}.done", **at, **more, "text": part["text"]}
        yield {"type": "response.content_part.done", **at, "part": part}
    yield _item_event("done", item, index)


def _item_event(what: str, item: dict[str, Any], index: int) -> dict[str, Any]:
    return {"type": f"response.output_item.{what}", "output_index": index, "item": item}
