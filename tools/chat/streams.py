"""Answers that are sent as they are written: server-sent events, and the chunks in them put together.

: OPENROUTER PROCESSING                                                a comment that keeps the connection alive
data: {"choices": [{"delta": {"content": "Ash"}}]}
data: {"choices": [{"delta": {"content": "ford"}, "finish_reason": "stop"}]}
data: {"choices": [], "usage": {"prompt_tokens": 12, "completion_tokens": 2}}
data: [DONE]
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any

from polyturn.tools.chat.answers import (
    REASONING_KEYS,
    ChatAnswer,
    PassingFault,
    read_answer,
    read_error,
)
from polyturn.tools.plain import shown

DONE = "[DONE]"


class EventReader:
    """Cuts bytes into the data of server-sent events. Comments, and fields other than `data`, carry nothing here.

    Lines end at line feeds alone: characters that Python also calls line ends may stand in JSON texts.
    """

    def __init__(self) -> None:
        self._rest = b""
        self._lines: list[str] = []

    def read(self, chunk: bytes) -> Iterator[str]:
        """The data of the events that are whole with this chunk."""
        *lines, self._rest = (self._rest + chunk).split(b"\n")
        for line in lines:
            yield from self._line(line.removesuffix(b"\r").removeprefix(b"\xef\xbb\xbf"))

    def finish(self) -> Iterator[str]:
        """Nothing more comes: an event without the empty line that ends it."""
        yield from self._line(self._rest.removesuffix(b"\r"))
        yield from self._line(b"")
        self._rest = b""

    def _line(self, line: bytes) -> Iterator[str]:
        if line.startswith(b"data:"):
            self._lines.append(line[5:].decode(errors="replace").removeprefix(" "))
        elif not line and self._lines:
            yield "\n".join(self._lines)
            self._lines.clear()


class StreamedAnswer:
    """The chunks of one answer."""

    def __init__(self) -> None:
        self._content: list[Any] = []
        self._texts: dict[str, list[str]] = {}
        self._calls: list[dict[str, Any]] = []
        self._by_index: dict[Any, dict[str, Any]] = {}
        self._finish_reason: Any = None
        self._num_choices = 0
        self._rest: dict[str, Any] = {}
        self.is_done = False

    def add(self, data: str) -> ChatAnswer | None:
        """Take in the data of an event; an answer where it is one in place of all that came.

        Raises:
            PassingFault: it is no JSON: the stream is damaged; or an error that may pass.
            ChatFault: it is another error.
        """
        for text in _texts(data):
            if text.strip() == DONE:
                self.is_done = True
                continue
            chunk = _object(text)
            if chunk.get("error"):
                return read_error(chunk, status=200)
            self._add_chunk(chunk)
        return None

    def answer(self) -> ChatAnswer:
        """The whole answer, when no more comes.

        Raises:
            PassingFault: it broke off, or there was none.
            ChatFault: it cannot be read.
        """
        if self._finish_reason is None and not self.is_done:
            raise PassingFault("the stream broke off before the answer was whole")
        message: dict[str, Any] = {"content": self._whole_content(), "tool_calls": self._calls}
        message |= {key: "".join(texts) for key, texts in self._texts.items()}
        choices = [{"message": message, "finish_reason": self._finish_reason}] if self._num_choices else []
        return read_answer({**self._rest, "choices": choices})

    def _add_chunk(self, chunk: Mapping[str, Any]) -> None:
        for name in ("usage", "prompt_filter_results"):
            if chunk.get(name):
                self._rest[name] = chunk[name]
        choices = chunk.get("choices")
        if not isinstance(choices, list) or not choices or not isinstance(choices[0], dict):
            return
        choice = choices[0]
        self._num_choices += 1
        if choice.get("finish_reason"):
            self._finish_reason = choice["finish_reason"]
        # The last chunk of some servers has the whole message in place of a delta, others have neither.
        delta = choice.get("delta") or (choice.get("message") if self._num_choices == 1 else None)
        if not isinstance(delta, dict):
            return
        if delta.get("content"):
            self._content.append(delta["content"])
        for key in (*REASONING_KEYS, "refusal"):
            if isinstance(delta.get(key), str):
                self._texts.setdefault(key, []).append(delta[key])
        calls = delta.get("tool_calls")
        for call in calls if isinstance(calls, list) else ():
            if isinstance(call, dict):
                self._add_call(call)

    def _add_call(self, delta: Mapping[str, Any]) -> None:
        """A call, or more of one. Gemini sends no index: then an id, or a name, begins a call."""
        function = delta.get("function")
        function = function if isinstance(function, dict) else {}
        index = delta["index"] if type(delta.get("index")) is int else None
        call_id, name = delta.get("id") or None, function.get("name")
        known = self._by_index.get(index)
        if index is None and self._calls:
            known = self._calls[-1]
        if known is None or _begins_another(known, index, call_id, name):
            known = {"id": call_id, "function": {"name": "", "arguments": ""}}
            self._calls.append(known)
            self._by_index[index] = known
        known["id"] = known["id"] or call_id
        whole, arguments = known["function"], function.get("arguments")
        # vLLM sends the name once, some gateways with every delta.
        if isinstance(name, str) and name and name != whole["name"]:
            whole["name"] += name
        if isinstance(arguments, str):
            whole["arguments"] += arguments
        elif arguments:
            whole["arguments"] = json.dumps(arguments)
        if isinstance(delta.get("extra_content"), dict):
            known["extra_content"] = delta["extra_content"]

    def _whole_content(self) -> Any:
        """Text, or the parts of which Mistral's thinking models send lists."""
        if all(isinstance(piece, str) for piece in self._content):
            return "".join(self._content)
        parts: list[Any] = []
        for piece in self._content:
            of_it = {"type": "text", "text": piece} if isinstance(piece, str) else piece
            parts += of_it if isinstance(of_it, list) else [of_it]
        return parts


def _begins_another(known: Mapping[str, Any], index: Any, call_id: Any, name: Any) -> bool:
    """Whether a delta is of another call than the one that its index, or its place without one, points to."""
    if call_id is not None and known["id"] is not None:
        return bool(call_id != known["id"])
    return index is None and bool(name)


def _texts(data: str) -> list[str]:
    """The data of an event; line by line where a server leaves out the empty lines between its events."""
    lines = data.split("\n")
    return lines if all(line.startswith("{") or line.strip() == DONE for line in lines) else [data]


def _object(text: str) -> dict[str, Any]:
    """Raises `PassingFault`."""
    try:
        found = json.loads(text)
    except (ValueError, RecursionError):
        found = None
    if not isinstance(found, dict):
        raise PassingFault(f"the stream is damaged: {shown(text, limit=120)}")
    return found
