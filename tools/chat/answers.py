"""What OpenAI-compatible endpoints answer, read into one form: OpenAI, Azure, vLLM, SGLang, Ollama, llama.cpp, Gemini,
Mistral and what stands in front of them differ in many small things.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from polyturn.tools.plain import clean_text, shown
from polyturn.tools.retries import may_pass
from polyturn.tools.thoughts import split_thought
from polyturn.tools.types import ToolCall

FinishReason = Literal["stop", "length", "content_filter", "context"]
"""`length`: the answer was cut off. `content_filter`: the endpoint's filter kept it back, or the question from the
model. `context`: the conversation is longer than the model's context, and there is no answer."""

REASONING_KEYS = ("reasoning_content", "reasoning")
"""Where endpoints put what the model thought."""
_LENGTH = frozenset({"length", "max_tokens", "max_output_tokens", "model_length"})
_FILTER = frozenset({"content_filter", "safety", "recitation", "prohibited_content", "blocklist"})
_BROKEN_OFF = frozenset({"error", "abort", "aborted", "cancelled"})
"""Finish reasons of answers that are not whole."""
_FULL = re.compile(
    r"context[ _-]?(length|window|size)|longer than the model's|prompt is too long|input is too long"
    r"|exceeds? the (maximum|available) (context|number of tokens)",
    re.IGNORECASE,
)
_NEVER = re.compile(r"invalid|authenti|permission|not_found|unsupported|billing|quota", re.IGNORECASE)
"""Types of errors that come back however often one asks."""


class ChatFault(RuntimeError):
    """The endpoint gave no answer that can be used."""


class PassingFault(ChatFault):
    """One that may not come back: the request is worth another try."""

    def __init__(self, message: str, *, asked_wait_s: float | None = None) -> None:
        """`asked_wait_s`: the seconds that the endpoint asks to wait."""
        super().__init__(message)
        self.asked_wait_s = asked_wait_s


@dataclass(frozen=True, kw_only=True, slots=True)
class ChatUsage:
    """The tokens of one answer as the endpoint counts them."""

    prompt_tokens: int = 0
    completion_tokens: int = 0
    """Those of thoughts and tool calls included."""
    cached_tokens: int = 0
    """Of the prompt."""
    reasoning_tokens: int = 0
    """Of the completion."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ChatAnswer:
    """One answer, whole."""

    content: str = ""
    reasoning: str | None = None
    """What the model thought; None where the endpoint keeps no thoughts apart."""
    reasoning_key: str | None = None
    """The key under which the endpoint gave its thoughts, and takes them back."""
    refusal: str | None = None
    """Why the model does not answer, where it says so apart; it is `content` then, too."""
    tool_calls: tuple[ToolCall, ...] = ()
    call_extras: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    """By id of a call what the endpoint wants back with it, as Gemini its `extra_content`."""
    finish_reason: FinishReason = "stop"
    usage: ChatUsage | None = None
    """None where the endpoint counts nothing."""
    problem: str = ""
    """What the endpoint said in place of an answer."""
    waited_s: float = 0.0
    """Before the request that was answered: for one of the client's slots, in tries that failed and between tries."""


def read_answer(answer: Any) -> ChatAnswer:
    """The first choice of an answer with status 200.

    Raises:
        PassingFault: it holds an error that may pass, or no choice, or one that is not whole.
        ChatFault: it holds another error, or no message that can be read.
    """
    if isinstance(answer, dict) and answer.get("error"):
        return read_error(answer, status=200)
    if not isinstance(answer, dict) or not isinstance(answer.get("choices"), list):
        raise ChatFault(f"the answer holds no message: {shown(answer, limit=300)}")
    if not answer["choices"]:
        if _is_filtered_prompt(answer):
            return ChatAnswer(finish_reason="content_filter", usage=read_usage(answer))
        raise PassingFault(f"the answer holds no choice: {shown(answer, limit=300)}")
    choice = answer["choices"][0]
    try:
        if choice.get("error"):
            return read_error(choice, status=200)
        finish = read_finish_reason(choice.get("finish_reason"))
        return _read_message(choice["message"], finish, read_usage(answer))
    except (KeyError, TypeError, AttributeError) as error:
        raise ChatFault(f"the answer holds no message: {shown(answer, limit=300)}") from error


def read_error(answer: Any, *, status: int) -> ChatAnswer:
    """The answer that an error amounts to: a conversation that is too long, or one that a filter kept back.

    Args:
        answer: The body: an object with an `error`, or anything.
        status: Of HTTP; at 200 the error's own code says whether it may pass.

    Raises:
        PassingFault: it is an error that may pass.
        ChatFault: it is any other.
    """
    if isinstance(answer, list) and len(answer) == 1:  # as Gemini wraps its errors
        answer = answer[0]
    error = answer.get("error") if isinstance(answer, dict) else None
    details = error if isinstance(error, dict) else answer if isinstance(answer, dict) else {}
    message = details.get("message") or details.get("detail") or error or answer
    text = message if isinstance(message, str) else shown(message, limit=300)
    code, kind = str(details.get("code") or ""), str(details.get("type") or "")
    inner = details.get("innererror")
    inner_code = str(inner.get("code")) if isinstance(inner, dict) else ""
    if "context_length" in code or "exceed_context" in kind or (status != 429 and _FULL.search(text)):
        return ChatAnswer(finish_reason="context", problem=text[:300])
    if "content_filter" in (code, kind) or inner_code == "ResponsibleAIPolicyViolation":
        return ChatAnswer(finish_reason="content_filter", problem=text[:300])
    named = ", ".join(part for part in (code, kind) if part)
    problem = f"{text[:300]}" + (f" ({named})" if named else "")
    if status != 200:
        raise PassingFault(problem) if may_pass(status) else ChatFault(problem)
    number = int(code) if code.isdecimal() and len(code) == 3 else None
    passes = not _NEVER.search(f"{code} {kind}") if number is None else may_pass(number)
    raise PassingFault(problem) if passes else ChatFault(problem)


def read_finish_reason(reason: Any) -> FinishReason:
    """Why an answer ended. What nobody knows is a stop, as is the empty text of Ollama and llama.cpp.

    Raises:
        PassingFault: it did not end, but broke off.
    """
    name = reason.lower() if isinstance(reason, str) else ""
    if name in _BROKEN_OFF:
        raise PassingFault(f"the answer broke off (finish_reason {name})")
    if name in _LENGTH:
        return "length"
    return "content_filter" if name in _FILTER else "stop"


def read_usage(answer: Mapping[str, Any]) -> ChatUsage | None:
    """The tokens that an answer or a chunk of one counts; None where it counts none."""
    usage = answer.get("usage")
    if not isinstance(usage, dict):
        return None
    return ChatUsage(
        prompt_tokens=_count(usage, "prompt_tokens"),
        completion_tokens=_count(usage, "completion_tokens"),
        cached_tokens=_count(usage.get("prompt_tokens_details"), "cached_tokens"),
        reasoning_tokens=_count(usage.get("completion_tokens_details"), "reasoning_tokens"),
    )


def _count(usage: Any, name: str) -> int:
    value = usage.get(name) if isinstance(usage, dict) else None
    return value if type(value) is int and 0 <= value < 2**53 else 0


def _is_filtered_prompt(answer: Mapping[str, Any]) -> bool:
    """Whether Azure or Gemini say in place of choices that they did not let the question through."""
    results = answer.get("prompt_filter_results")
    return isinstance(results, list) and '"filtered": true' in json.dumps(results, default=str)


def _read_message(message: Mapping[str, Any], finish: FinishReason, usage: ChatUsage | None) -> ChatAnswer:
    key = next((key for key in REASONING_KEYS if isinstance(message.get(key), str)), None)
    thought, text, said_no = _read_content(message.get("content"))
    refusal = message.get("refusal") if isinstance(message.get("refusal"), str) else None
    inside, content = split_thought(text)
    thoughts = (message[key] if key is not None else None, thought, inside)
    calls, extras = [], {}
    for index, given in enumerate(message.get("tool_calls") or ()):
        call = _read_call(given, index)
        calls.append(call)
        if isinstance(given.get("extra_content"), dict):
            extras[call.id] = {"extra_content": given["extra_content"]}
    return ChatAnswer(
        content=clean_text(content or refusal or ""),
        reasoning=next((clean_text(found) for found in thoughts if found), None),
        reasoning_key=key,
        refusal=refusal or said_no,
        tool_calls=tuple(calls),
        call_extras=extras,
        finish_reason=finish,
        usage=usage,
    )


def _read_content(content: Any) -> tuple[str | None, str, str | None]:
    """The thought among the parts of an answer's content, its text, and a refusal in it; None without one."""
    if content is None:
        return None, "", None
    if isinstance(content, str):
        return None, content, None
    if not isinstance(content, list):
        raise TypeError("content is a text or a list of parts")
    texts: dict[str, list[str]] = {"thought": [], "text": [], "refusal": []}
    for part in content:
        kind = part["type"]
        inside = part.get(kind, part.get("text", ""))
        text = inside if isinstance(inside, str) else "".join(piece["text"] for piece in inside)
        if kind == "refusal":
            texts["refusal"].append(text)
        texts["thought" if kind in ("thinking", "reasoning") else "text"].append(text)
    thought, text, refusal = ("".join(texts[name]) for name in ("thought", "text", "refusal"))
    return thought or None, text, refusal or None


def _read_call(call: Mapping[str, Any], index: int) -> ToolCall:
    """A call, with an id of ours where the endpoint gave none. What cannot be read of it is told to the model."""
    function = call["function"]
    given = call.get("id")
    call_id = clean_text(str(given)) if given not in (None, "") else f"call_{index}"
    name, text = function.get("name"), function.get("arguments") or "{}"
    if not isinstance(name, str) or not name:
        return ToolCall(id=call_id, name="", error="The call could not be read: its name must be a string.")
    try:
        # Some endpoints hand over what should be JSON text as the object itself.
        arguments = json.loads(text) if isinstance(text, str) else text
    except (ValueError, RecursionError) as error:
        problem = f"The arguments could not be read: not valid JSON: {error}."
        return ToolCall(id=call_id, name=name, error=problem)
    if arguments is None:
        arguments = {}
    if not isinstance(arguments, dict):
        return ToolCall(
            id=call_id, name=name, error="The arguments could not be read: they must be a JSON object."
        )
    return ToolCall(id=call_id, name=name, arguments=arguments)
