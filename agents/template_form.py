"""The form in which a chat template takes messages: what is done to them before it sees them."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

_TOOLS_TEXT = """# Tools

You can call functions. These are their specifications:
<tools>
{specs}
</tools>

To call one, write its name and its arguments as JSON:
<tool_call>
{{"name": ..., "arguments": {{...}}}}
</tool_call>"""
_PARTS = ("text", "input_text", "output_text")


class TemplateRefusal(ValueError):
    """The template raised, or left out what it was to show."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TemplateForm:
    """What is done to messages before a template sees them."""

    folds_system: bool = False
    """The system message stands before the first user message: the template has no such role."""
    merges_users: bool = False
    """User messages that follow each other are one: the template wants user and assistant to alternate."""
    reasoning_key: str | None = None
    """Under which name an assistant message holds its reasoning; None: as `<think>...</think>` in its content."""
    calls_as_text: bool = False
    """Calls stand in the assistant's content: the template does not show them."""
    results_as_text: bool = False
    """Results stand in user messages and specs in the system message, too: the template has no tools."""
    call_ids: Literal["any", "nine", "names"] = "any"
    """`nine` letters and digits (Mistral), or `names` of functions with numbers (Kimi)."""
    without_content: bool = False
    """A message of calls alone has None for content, not an empty text (DeepSeek)."""
    arguments_as_text: bool = False
    """A call's arguments are JSON text, not an object."""
    one_call: bool = False
    """The template knows one call per message; results of several can follow it all the same."""
    one_text: bool = False
    """Beside a call it knows a thought or a text, not both: the text stands behind the thought (gpt-oss)."""
    text_parts: bool = False
    """A content is a list of one part with the text (models that see images)."""
    tools_listed: bool = False
    """Where there are no tools it wants an empty list of them."""

    def joins(self, message: Mapping[str, Any]) -> bool:
        """Whether a message has a text that is put behind its thought, because of `one_text`."""
        return self.one_text and all(message.get(key) for key in ("reasoning", "content", "tool_calls"))

    def call_id(self, name: str, number: int) -> str:
        """The id of an episode's call of that number, counted from 0."""
        if self.call_ids == "nine":
            return f"call{number:05d}"
        return f"functions.{name}:{number}" if self.call_ids == "names" else f"call_{number}"

    def prepare(
        self, messages: Sequence[Mapping[str, Any]], tools: Sequence[Mapping[str, Any]]
    ) -> tuple[list[dict[str, Any]], list[Mapping[str, Any]]]:
        """Messages and tools as the template takes them.

        Raises:
            TemplateRefusal: a message holds something other than text.
        """
        taken = [self._prepare(message) for message in messages]
        if self.calls_as_text:
            taken = [_with_calls_as_text(message) for message in taken]
        if self.results_as_text:
            taken = _with_specs_as_text(_with_results_as_text(taken), tools)
            tools = ()
        if self.folds_system:
            taken = _with_folded_system(taken)
        if self.merges_users:
            taken = _with_merged_users(taken)
        return taken, list(tools)

    def _prepare(self, message: Mapping[str, Any]) -> dict[str, Any]:
        taken = {**message, "content": _text_of(message.get("content"))}
        reasoning = taken.pop("reasoning", None)
        if self.joins(message):
            reasoning, taken["content"] = f"{reasoning}\n\n{taken['content']}", ""
        if reasoning and self.reasoning_key:
            taken[self.reasoning_key] = reasoning
        elif reasoning:
            taken["content"] = f"<think>\n{reasoning}\n</think>\n\n{taken['content'] or ''}"
        if calls := taken.get("tool_calls"):
            taken["tool_calls"] = [self._prepare_call(call) for call in calls]
            if self.without_content and not self.calls_as_text:
                taken["content"] = taken["content"] or None
        if taken.get("tool_call_id") is not None:
            taken["tool_call_id"] = self._taken_id(taken["tool_call_id"])
        return taken

    def _prepare_call(self, call: Mapping[str, Any]) -> dict[str, Any]:
        function = dict(call.get("function") or {})
        arguments = function.get("arguments", {})
        if self.arguments_as_text and not isinstance(arguments, str):
            function["arguments"] = json.dumps(arguments, ensure_ascii=False)
        elif not self.arguments_as_text and isinstance(arguments, str):
            function["arguments"] = _object_of(arguments)
        taken = {**call, "type": call.get("type", "function"), "function": function}
        if "id" in call:
            taken["id"] = self._taken_id(call["id"])
        return taken

    def _taken_id(self, call_id: str) -> str:
        if self.call_ids != "nine" or re.fullmatch(r"[A-Za-z0-9]{9}", call_id):
            return call_id
        numbered = re.fullmatch(r"call_(\d{1,5})", call_id)
        return (
            self.call_id("", int(numbered[1]))
            if numbered
            else hashlib.sha256(call_id.encode()).hexdigest()[:9]
        )


def _with_results_as_text(messages: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    taken: list[dict[str, Any]] = []
    for message in messages:
        if message["role"] == "tool":
            result = f"<tool_response>\n{message['content'] or ''}\n</tool_response>"
            if taken and taken[-1].get("results"):
                taken[-1] = {**taken[-1], "content": f"{taken[-1]['content']}\n{result}"}
            else:
                taken.append({"role": "user", "content": result, "results": True})
        else:
            taken.append(message)
    return [{key: value for key, value in message.items() if key != "results"} for message in taken]


def _with_calls_as_text(message: dict[str, Any]) -> dict[str, Any]:
    calls = message.get("tool_calls")
    if not calls:
        return message
    texts = [message["content"]] if message["content"] else []
    for call in calls:
        function = {
            "name": call["function"].get("name", ""),
            "arguments": call["function"].get("arguments", {}),
        }
        texts.append(f"<tool_call>\n{json.dumps(function, ensure_ascii=False)}\n</tool_call>")
    return {key: value for key, value in message.items() if key != "tool_calls"} | {
        "content": "\n".join(texts)
    }


def _with_specs_as_text(
    messages: list[dict[str, Any]], tools: Sequence[Mapping[str, Any]]
) -> list[dict[str, Any]]:
    if not tools:
        return messages
    specs = "\n".join(json.dumps(tool, ensure_ascii=False) for tool in tools)
    told = _TOOLS_TEXT.format(specs=specs)
    if messages and messages[0]["role"] == "system":
        return [{**messages[0], "content": f"{messages[0]['content']}\n\n{told}"}, *messages[1:]]
    return [{"role": "system", "content": told}, *messages]


def _with_folded_system(messages: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    heads = [message["content"] for message in messages if message["role"] == "system"]
    rest = [message for message in messages if message["role"] != "system"]
    if not heads:
        return rest
    head = "\n\n".join(heads)
    if rest and rest[0]["role"] == "user":
        return [{**rest[0], "content": f"{head}\n\n{rest[0]['content']}"}, *rest[1:]]
    return [{"role": "user", "content": head}, *rest]


def _with_merged_users(messages: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    taken: list[dict[str, Any]] = []
    for message in messages:
        if taken and message["role"] == taken[-1]["role"] == "user":
            taken[-1] = {**taken[-1], "content": f"{taken[-1]['content']}\n\n{message['content']}"}
        else:
            taken.append(message)
    return taken


def _text_of(content: Any) -> Any:
    """The text of OpenAI content parts; any other content as it is."""
    if not isinstance(content, (list, tuple)):
        return content
    texts = []
    for part in content:
        kind = part.get("type") if isinstance(part, Mapping) else None
        if isinstance(part, str):
            texts.append(part)
        elif kind in _PARTS and isinstance(part.get("text"), str):
            texts.append(part["text"])
        else:
            raise TemplateRefusal(f"a message holds a part of type {kind!r}, and only text can be rendered")
    return "".join(texts)


def _object_of(text: str) -> Any:
    """The object that JSON text says; the text itself where it says none."""
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return text
    return value if isinstance(value, dict) else text
