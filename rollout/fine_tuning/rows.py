"""Rows to fine-tune on, a line of JSON each: a conversation as OpenAI has it, and its tokens where they are known.

    {"messages": [...], "tools": [...],
     "tokens": {"tokenizer": "…", "segments": [{"token_ids": [...], "taught": [[3, 9]]}]},
     "metadata": {"environment": "…", "task_id": "…", "score": 1.0}}

Only `messages` must be there. An assistant's message is taught unless it has `weight: 0`.
"""

from __future__ import annotations

import hashlib
import itertools
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import orjson

from polyturn.agents.ledger import Segment
from polyturn.configs.errors import ConfigError
from polyturn.envs.messages import Message
from polyturn.tools.plain import clean_text, shown
from polyturn.tools.types import ToolSpec

FOREIGN = {
    "conversations": "is ShareGPT's form ('from' and 'value')",
    "conversation": "is ShareGPT's form ('from' and 'value')",
    "prompt": "is a prompt and its completion",
    "instruction": "is Alpaca's form",
    "text": "is a text whose turns nobody knows",
}
"""Keys of rows in forms that are not taken: in what form such a row is."""
ROLES = {
    "system": "system",
    "developer": "system",
    "user": "user",
    "assistant": "assistant",
    "tool": "tool",
}
Spans = list[list[int]]


@dataclass(frozen=True, kw_only=True, slots=True)
class TokenSegment:
    """Tokens of one linear run, and which of them are taught."""

    token_ids: npt.NDArray[np.int32]
    taught: npt.NDArray[np.bool_]


@dataclass(frozen=True, kw_only=True, slots=True)
class Row:
    """One conversation."""

    where: str
    """File and line, for messages."""
    messages: tuple[Message, ...]
    taught: tuple[bool, ...]
    """Of each message, whether it is; true for assistants' alone."""
    tools: tuple[ToolSpec, ...]
    segments: tuple[TokenSegment, ...]
    """Empty where the row has no tokens."""
    tokenizer: str
    """As `tokenizer_digest` gives it: of the tokenizer and template that made them; empty without."""
    environment: str
    task_id: str
    score: float


def tokenizer_digest(directory: Path, template: Path | None = None) -> str:
    """What tells by 16 digits the tokenizer of a model directory, and the chat template that is used with it."""
    digest = hashlib.sha256((directory / "tokenizer.json").read_bytes())
    own = [directory / "chat_template.jinja", directory / "tokenizer_config.json"]
    found = next((path for path in ([template] if template is not None else own) if path.is_file()), None)
    digest.update(found.read_bytes() if found is not None else b"")
    return digest.hexdigest()[:16]


def tokens_of(segments: Sequence[Segment], tokenizer: str) -> dict[str, Any]:
    """The value of `tokens` in a row."""
    return {
        "tokenizer": tokenizer,
        "segments": [
            {"token_ids": segment.token_ids, "taught": spans_of(segment.sampled)}
            for segment in segments
            if segment.num_sampled
        ],
    }


def spans_of(mask: npt.NDArray[np.bool_]) -> Spans:
    """The runs that are true, each from its first place to the one behind it: [[3, 9], [12, 14]]."""
    edges = np.flatnonzero(np.diff(np.concatenate([[False], mask, [False]]).astype(np.int8)))
    spans: Spans = edges.reshape(-1, 2).tolist()
    return spans


def read_rows(path: Path) -> Iterator[Row]:
    """The rows of a file, one after the other. Empty lines are passed over.

    Raises:
        ConfigError: it cannot be read, or a row is not as it should be: one sentence with file, line and key.
    """
    try:
        with path.open("rb") as file:
            for number, line in enumerate(file, start=1):
                if line.strip():
                    yield row_of(line, where=f"{path}:{number}")
    except OSError as error:
        raise ConfigError(f"{path} cannot be read: {error.strerror}") from error


def row_of(line: bytes, *, where: str) -> Row:
    """The row of a line. Raises ConfigError, one sentence that begins with `where` and names the key."""
    try:
        return _row(line, where)
    except ValueError as error:
        raise ConfigError(f"{where}: {error}") from error


def _row(line: bytes, where: str) -> Row:
    try:
        value = orjson.loads(line)
    except orjson.JSONDecodeError as error:
        raise ValueError(f"this line is no JSON: {error}") from error
    if not isinstance(value, dict):
        raise ValueError(f"a row is a JSON object, not {shown(value)}")
    if "messages" not in value:
        foreign = next((f"'{key}' {what}; " for key, what in FOREIGN.items() if key in value), "")
        raise ValueError(
            f"messages: the row has no such key. {foreign}write OpenAI messages: "
            '{"messages": [{"role": "user", "content": "…"}, {"role": "assistant", "content": "…"}]}'
        )
    messages = _messages(value["messages"])
    taught = tuple(
        message["role"] == "assistant" and _weight(raw, f"messages[{number}].weight") > 0
        for number, (message, raw) in enumerate(zip(messages, value["messages"], strict=True))
    )
    if not any(taught):
        raise ValueError("messages: no message of the assistant is taught; there is nothing to learn from it")
    segments, tokenizer = _tokens(value.get("tokens"))
    metadata = value.get("metadata")
    metadata = metadata if isinstance(metadata, dict) else {}
    score = metadata.get("score")
    return Row(
        where=where,
        messages=messages,
        taught=taught,
        tools=_tools(value.get("tools")),
        segments=segments,
        tokenizer=tokenizer,
        environment=str(metadata.get("environment") or ""),
        task_id=str(metadata.get("task_id") or ""),
        score=float(score) if isinstance(score, int | float) else 0.0,
    )


def _messages(value: Any) -> tuple[Message, ...]:
    if not isinstance(value, list) or not value:
        raise ValueError(f"messages: it must be a list of messages, not {shown(value)}")
    messages: list[Message] = []
    names: dict[str, str] = {}
    for number, raw in enumerate(value):
        messages.append(_message(raw, f"messages[{number}]", names))
    for number, (before, after) in enumerate(itertools.pairwise(messages)):
        if before["role"] == after["role"] == "assistant":
            raise ValueError(f"messages[{number + 1}]: an assistant's message follows another one")
    if messages[0]["role"] in ("assistant", "tool"):
        raise ValueError(
            f"messages[0].role: a conversation does not begin with '{messages[0]['role']}': nothing was asked"
        )
    return tuple(messages)


def _message(raw: Any, key: str, names: dict[str, str]) -> Message:
    """A message; `names` has the function of each call so far, by its id."""
    if not isinstance(raw, dict):
        raise ValueError(f"{key}: a message is an object, not {shown(raw)}")
    role = ROLES.get(raw["role"]) if isinstance(raw.get("role"), str) else None
    if role is None:
        raise ValueError(f"{key}.role: it must be one of {', '.join(ROLES)}, not {shown(raw.get('role'))}")
    if "function_call" in raw:
        raise ValueError(f"{key}.function_call: write tool_calls, which have ids that results name")
    message: Message = {"role": role, "content": _text(raw.get("content"), f"{key}.content")}  # type: ignore[typeddict-item]
    if role == "tool":
        call_id = raw.get("tool_call_id")
        if not isinstance(call_id, str) or call_id not in names:
            raise ValueError(f"{key}.tool_call_id: no call before it has the id {shown(call_id)}")
        return {**message, "tool_call_id": call_id, "name": names[call_id]}
    if role != "assistant":
        return message
    reasoning = raw.get("reasoning_content", raw.get("reasoning"))
    if reasoning is not None:
        message["reasoning"] = _text(reasoning, f"{key}.reasoning_content")
    calls = raw.get("tool_calls")
    if calls:
        message["tool_calls"] = _calls(calls, f"{key}.tool_calls", names)
    elif not message["content"]:
        raise ValueError(f"{key}.content: an assistant's message has a text or tool_calls")
    return message


def _text(value: Any, key: str) -> str:
    """A content as text: itself, or the text of its parts."""
    if value is None:
        return ""
    if isinstance(value, str):
        return clean_text(value)
    if isinstance(value, list):
        texts = [part.get("text") for part in value if isinstance(part, dict) and part.get("type") == "text"]
        known = [text for text in texts if isinstance(text, str)]
        if len(known) == len(value):
            return clean_text("".join(known))
        raise ValueError(f"{key}: only parts of text are taken; pictures and sounds are not")
    raise ValueError(f"{key}: it must be a text, not {shown(value)}")


def _calls(value: Any, key: str, names: dict[str, str]) -> list[dict[str, Any]]:
    if not isinstance(value, list):
        raise ValueError(f"{key}: it must be a list of calls, not {shown(value)}")
    calls = []
    for number, raw in enumerate(value):
        at = f"{key}[{number}]"
        function = raw.get("function") if isinstance(raw, dict) else None
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            raise ValueError(f'{at}: a call is {{"id": …, "function": {{"name": …, "arguments": …}}}}')
        if not function["name"]:
            raise ValueError(
                f"{at}.function.name: it is empty; a call that could not be read teaches nothing"
            )
        arguments = function.get("arguments", {})
        if isinstance(arguments, str):
            try:
                arguments = json.loads(arguments or "{}")
            except (ValueError, RecursionError) as error:
                raise ValueError(f"{at}.function.arguments: they are no JSON: {error}") from error
        if not isinstance(arguments, dict):
            raise ValueError(f"{at}.function.arguments: they must be an object, not {shown(arguments)}")
        call_id = raw.get("id")
        call_id = call_id if isinstance(call_id, str) and call_id else f"call_{len(names)}"
        names[call_id] = function["name"]
        calls.append(
            {
                "id": call_id,
                "type": "function",
                "function": {"name": function["name"], "arguments": arguments},
            }
        )
    return calls


def _weight(raw: Mapping[str, Any], key: str) -> float:
    weight = raw.get("weight", 1)
    if weight not in (0, 1):
        raise ValueError(f"{key}: it is 0 or 1, not {shown(weight)}")
    return float(weight)


def _tools(value: Any) -> tuple[ToolSpec, ...]:
    """The tools, which may stand there as JSON text, as in Parquet files."""
    if isinstance(value, str):
        try:
            value = orjson.loads(value)
        except orjson.JSONDecodeError as error:
            raise ValueError(f"tools: they are no JSON: {error}") from error
    if value is None:
        return ()
    if not isinstance(value, list):
        raise ValueError(f"tools: they must be a list, not {shown(value)}")
    tools = []
    for number, raw in enumerate(value):
        function = raw.get("function") if isinstance(raw, dict) else None
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            raise ValueError(
                f'tools[{number}]: a tool is {{"type": "function", "function": {{"name": …, "parameters": …}}}}'
            )
        parameters = function.get("parameters") or {"type": "object", "properties": {}}
        if not isinstance(parameters, dict):
            raise ValueError(f"tools[{number}].function.parameters: it must be a JSON Schema")
        description = function.get("description") or ""
        tools.append(ToolSpec(name=function["name"], description=str(description), parameters=parameters))
    return tuple(tools)


def _tokens(value: Any) -> tuple[tuple[TokenSegment, ...], str]:
    if value is None:
        return (), ""
    if not isinstance(value, dict) or not isinstance(value.get("segments"), list):
        raise ValueError('tokens: they are {"tokenizer": …, "segments": […]}')
    segments = tuple(
        _segment(raw, f"tokens.segments[{number}]") for number, raw in enumerate(value["segments"])
    )
    return segments, str(value.get("tokenizer", ""))


def _segment(raw: Any, key: str) -> TokenSegment:
    if not isinstance(raw, dict):
        raise ValueError(f"{key}: a segment is an object, not {shown(raw)}")
    token_ids, spans = raw.get("token_ids"), raw.get("taught")
    spans = spans if isinstance(spans, list) else [spans]
    if not isinstance(token_ids, list) or not token_ids or not all(type(each) is int for each in token_ids):
        raise ValueError(f"{key}.token_ids: they must be numbers of tokens")
    if min(token_ids) < 0 or max(token_ids) >= 1 << 31:
        raise ValueError(f"{key}.token_ids: a token's number is from 0 to 2^31 - 1")
    taught = np.zeros(len(token_ids), dtype=np.bool_)
    last = 1
    for span in spans:
        first, end = span if _is_span(span) else (0, 0)
        if not last <= first < end <= len(token_ids):
            raise ValueError(
                f"{key}.taught: spans [first, behind the last] of places from 1 to {len(token_ids)}, in order, not "
                f"{shown(span)}"
            )
        taught[first:end] = True
        last = end
    return TokenSegment(token_ids=np.array(token_ids, dtype=np.int32), taught=taught)


def _is_span(value: Any) -> bool:
    return isinstance(value, list) and len(value) == 2 and all(type(each) is int for each in value)
