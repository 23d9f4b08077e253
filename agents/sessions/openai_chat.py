"""OpenAI's chat completions: a request's body is read, its answer written, at once or as a stream."""

from __future__ import annotations

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
    read_stops,
    read_string,
    read_text,
    read_tool,
    refuse_fields,
    with_names,
)
from polyturn.agents.sessions.requests import Completion, CompletionRequest, RequestRefused
from polyturn.agents.sessions.writing import arguments_text, event_bytes
from polyturn.envs.messages import Message
from polyturn.tools.plain import shown
from polyturn.tools.types import ToolSpec

CONSTRAINS = "answers are never constrained, which would change what the policy samples from"
REFUSED_FIELDS: Mapping[str, str] = {
    "audio": "the policy speaks in texts alone",
    "functions": "use tools",
    "function_call": "use tool_choice",
    "logit_bias": CONSTRAINS,
    "web_search_options": "there are no tools on this side; give the program tools of its own",
    # Of vLLM and SGLang.
    **dict.fromkeys(
        (
            "ebnf",
            "guided_choice",
            "guided_grammar",
            "guided_json",
            "guided_regex",
            "json_schema",
            "regex",
            "structural_tag",
            "structured_outputs",
        ),
        CONSTRAINS,
    ),
    "continue_final_message": "an answer is a message of its own and continues none",
    "top_logprobs": "logprobs are those of the sampled tokens alone",
}
"""What is refused where it asks for anything, with the reason."""
_TEXT_PARTS = frozenset(("text",))
_ROLES: Mapping[str, str] = {
    "system": "system",
    "developer": "system",
    "user": "user",
    "assistant": "assistant",
    "tool": "tool",
}
_REASONING_KEYS = ("reasoning_content", "reasoning")


@dataclass(frozen=True, kw_only=True, slots=True)
class ChatExchange:
    """A request for a chat completion, and how its answer is said."""

    request: CompletionRequest
    model: str
    """As the client called it."""
    is_stream: bool
    has_usage: bool
    """Whether a stream ends with a chunk of usage figures."""
    has_logprobs: bool
    has_token_ids: bool

    def answer(self, completion: Completion, *, created_s: int) -> dict[str, Any]:
        """The answer as one object."""
        message = completion.message.to_message()
        fields: dict[str, Any] = {"role": "assistant", "content": message["content"], "refusal": None}
        if calls := _calls_on_wire(message):
            fields["tool_calls"] = calls
            fields["content"] = message["content"] or None
        if (reasoning := message.get("reasoning")) is not None:
            fields["reasoning_content"] = reasoning
        choice = {
            "index": 0,
            "message": fields,
            "finish_reason": completion.finish_reason,
            **self._token_fields(completion),
        }
        return {
            "id": f"chatcmpl-{completion.completion_id}",
            "object": "chat.completion",
            "created": created_s,
            "model": self.model,
            "choices": [choice],
            "usage": _usage(completion),
            **self._prompt_fields(completion),
        }

    def events(self, completion: Completion, *, created_s: int) -> Iterator[bytes]:
        """The answer as server-sent events."""
        message = completion.message.to_message()
        head = {
            "id": f"chatcmpl-{completion.completion_id}",
            "object": "chat.completion.chunk",
            "created": created_s,
            "model": self.model,
        }
        if self.has_usage:
            head["usage"] = None

        def chunk(delta: Mapping[str, Any], **rest: Any) -> dict[str, Any]:
            return {**head, "choices": [{"index": 0, "delta": delta, "finish_reason": None, **rest}]}

        yield event_bytes({**chunk({"role": "assistant", "content": ""}), **self._prompt_fields(completion)})
        if (reasoning := message.get("reasoning")) is not None:
            yield event_bytes(chunk({"reasoning_content": reasoning}))
        if message["content"]:
            yield event_bytes(chunk({"content": message["content"]}))
        for index, call in enumerate(_calls_on_wire(message)):
            function = call["function"]
            begin = {**call, "index": index, "function": {**function, "arguments": ""}}
            yield event_bytes(chunk({"tool_calls": [begin]}))
            rest = {"index": index, "function": {"arguments": function["arguments"]}}
            yield event_bytes(chunk({"tool_calls": [rest]}))
        last = {"finish_reason": completion.finish_reason, **self._token_fields(completion)}
        yield event_bytes(chunk({}, **last))
        if self.has_usage:
            yield event_bytes({**head, "choices": [], "usage": _usage(completion)})
        yield b"data: [DONE]\n\n"

    def _token_fields(self, completion: Completion) -> dict[str, Any]:
        """What a choice says of its tokens, which have no texts of their own: `token_id:17` stands for one."""
        fields: dict[str, Any] = {"logprobs": None}
        if self.has_logprobs:
            content = [
                {"token": f"token_id:{token_id}", "bytes": None, "logprob": logprob, "top_logprobs": []}
                for token_id, logprob in zip(
                    completion.token_ids.tolist(), completion.logprobs.tolist(), strict=True
                )
            ]
            fields["logprobs"] = {"content": content, "refusal": None}
        if self.has_token_ids:
            fields["token_ids"] = completion.token_ids.tolist()
        return fields

    def _prompt_fields(self, completion: Completion) -> dict[str, Any]:
        return {"prompt_token_ids": completion.prompt_ids.tolist()} if self.has_token_ids else {}


def read_chat(body: Body, *, is_retry: bool = False) -> ChatExchange:
    """The request of a body of `/v1/chat/completions`. Raises `RequestRefused`."""
    refuse_fields(body, REFUSED_FIELDS)
    if body.get("n") not in (None, 1):
        raise RequestRefused(f"n must be 1, not {shown(body['n'])}: every answer belongs to one conversation")
    if body.get("modalities") not in (None, [], ["text"]):
        raise RequestRefused('modalities must be ["text"]: the policy speaks in texts alone')
    response_format = read_object(body.get("response_format") or {"type": "text"}, "response_format")
    if response_format.get("type") != "text":
        raise RequestRefused(f"response_format must be of type 'text': {CONSTRAINS}")
    stream_options = read_object(body.get("stream_options") or {}, "stream_options")
    messages = [
        _read_message(fields, place) for place, fields in read_objects(body.get("messages"), "messages")
    ]
    if not messages:
        raise RequestRefused("messages must hold at least one message")
    request = CompletionRequest(
        messages=with_names(messages),
        tools=_read_tools(body),
        max_tokens=read_limits(body, ("max_completion_tokens", "max_tokens")),
        stop=read_stops(body, "stop"),
        is_retry=is_retry,
    )
    return ChatExchange(
        request=request,
        model=read_string(body, "model") if body.get("model") is not None else "policy",
        is_stream=read_flag(body, "stream"),
        has_usage=read_flag(stream_options, "include_usage"),
        has_logprobs=read_flag(body, "logprobs"),
        has_token_ids=read_flag(body, "return_token_ids"),
    )


def openai_error(message: str, *, status: int) -> dict[str, Any]:
    """An error of this status in OpenAI's form."""
    kinds = {401: "authentication_error", 404: "not_found_error", 429: "rate_limit_error"}
    kind = kinds.get(status, "server_error" if status >= 500 else "invalid_request_error")
    codes = {401: "invalid_api_key", 410: "session_ended"}
    return {"error": {"message": message, "type": kind, "param": None, "code": codes.get(status)}}


def read_openai_choice(given: Any) -> bool:
    """Whether the model is told of its tools. A choice that would force a call leaves it to the model instead."""
    if given is None or isinstance(given, Mapping):
        return True
    if not isinstance(given, str) or given not in ("auto", "required", "none"):
        raise RequestRefused(
            f"tool_choice must be 'auto', 'none', 'required' or an object, not {shown(given)}"
        )
    return given != "none"


def openai_stream_error(message: str, *, status: int) -> bytes:
    """The event that ends a stream of chunks whose answer cannot be given."""
    return event_bytes(openai_error(message, status=status))


def _read_tools(body: Body) -> tuple[ToolSpec, ...]:
    tools = [_read_tool(fields, place) for place, fields in read_objects(body.get("tools"), "tools")]
    return checked_tools(tools) if read_openai_choice(body.get("tool_choice")) else ()


def _read_tool(fields: Body, where: str) -> ToolSpec:
    if fields.get("type", "function") != "function":
        raise RequestRefused(
            f"{where} is of type {shown(fields['type'])}; tools are functions that the program itself calls"
        )
    return read_tool(
        read_object(fields.get("function"), f"{where}.function"), f"{where}.function", schema="parameters"
    )


def _read_message(fields: Body, where: str) -> Message:
    role = fields.get("role")
    if not isinstance(role, str) or role not in _ROLES:
        raise RequestRefused(f"{where}.role must be one of {', '.join(_ROLES)}, not {shown(role)}")
    if role == "assistant":
        return _read_assistant(fields, where)
    if "content" not in fields:
        raise RequestRefused(f"{where} has no content")
    message: Any = {
        "role": _ROLES[role],
        "content": read_text(fields["content"], f"{where}.content", _TEXT_PARTS),
    }
    if role == "tool":
        message["tool_call_id"] = read_string(fields, "tool_call_id", where)
    if fields.get("name") is not None:
        message["name"] = read_string(fields, "name", where)
    return message


def _read_assistant(fields: Body, where: str) -> Message:
    refuse_fields(
        fields, {"function_call": f"{where}: use tool_calls", "audio": f"{where}: texts alone are read"}
    )
    content = read_text(fields.get("content"), f"{where}.content", _TEXT_PARTS)
    if not content and isinstance(fields.get("refusal"), str):
        content = read_string(fields, "refusal", where)
    message: Any = {"role": "assistant", "content": content}
    for key in _REASONING_KEYS:
        if isinstance(fields.get(key), str):
            message["reasoning"] = read_string(fields, key, where)
            break
    calls = [
        _read_call(call, at) for at, call in read_objects(fields.get("tool_calls"), f"{where}.tool_calls")
    ]
    if calls:
        message["tool_calls"] = calls
    if fields.get("name") is not None:
        message["name"] = read_string(fields, "name", where)
    return message


def _read_call(fields: Body, where: str) -> dict[str, Any]:
    if fields.get("type", "function") != "function":
        raise RequestRefused(f"{where} is of type {shown(fields['type'])}; calls are those of functions")
    function = read_object(fields.get("function"), f"{where}.function")
    name = read_name(function, "name", f"{where}.function")
    return call_record(read_string(fields, "id", where), name, function.get("arguments") or {})


def _calls_on_wire(message: Message) -> list[dict[str, Any]]:
    return [
        {
            **call,
            "function": {
                "name": call["function"]["name"],
                "arguments": arguments_text(call["function"]["arguments"]),
            },
        }
        for call in message.get("tool_calls", ())
    ]


def _usage(completion: Completion) -> dict[str, Any]:
    num_prompt, num_sampled = len(completion.prompt_ids), len(completion.token_ids)
    return {
        "prompt_tokens": num_prompt,
        "completion_tokens": num_sampled,
        "total_tokens": num_prompt + num_sampled,
        "prompt_tokens_details": {"cached_tokens": completion.num_cached_tokens},
    }
