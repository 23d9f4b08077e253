"""What a chat template makes of earlier turns, asked with the shape of a conversation in place of its texts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from polyturn.agents.chat_template import NAME, TemplateForm
from polyturn.agents.thoughts import ANY_CLOSING, ANY_OPENING


@dataclass(frozen=True, slots=True)
class MessageShape:
    """A message without its texts."""

    role: str
    has_content: bool
    reasoning: bool | None = None
    """Whether it thought something; None: it did not think at all."""
    num_calls: int = 0


@dataclass(frozen=True, slots=True)
class Shape:
    """A conversation without its texts. A template treats conversations of one shape alike."""

    messages: tuple[MessageShape, ...]
    with_tools: bool = False


def shape_of(messages: Sequence[Mapping[str, Any]], *, with_tools: bool) -> Shape:
    """The shape of a conversation."""
    return Shape(
        tuple(
            MessageShape(
                message["role"],
                bool(message.get("content")),
                None if message.get("reasoning") is None else bool(message["reasoning"]),
                len(message.get("tool_calls") or ()),
            )
            for message in messages
        ),
        with_tools,
    )


def messages_of(shape: Shape, form: TemplateForm) -> tuple[list[dict[str, Any]], int | None]:
    """Messages of that shape whose texts are words of their own, and the place of the last assistant's among them.

    None in place of it where the conversation ends with that message or has none.
    """
    messages: list[dict[str, Any]] = []
    last, num_calls, unanswered = None, 0, [form.call_id(NAME, 0)]
    for index, each in enumerate(shape.messages):
        message: dict[str, Any] = {
            "role": each.role,
            "content": f"W{index}content" if each.has_content else "",
        }
        if each.role == "assistant":
            last = index
            if each.reasoning is not None:
                message["reasoning"] = f"W{index}thought" if each.reasoning else ""
            if each.num_calls:
                ids = [form.call_id(NAME, num_calls + number) for number in range(each.num_calls)]
                message["tool_calls"] = [
                    {
                        "id": call_id,
                        "type": "function",
                        "function": {"name": NAME, "arguments": {"query": f"W{index}a{number}w"}},
                    }
                    for number, call_id in enumerate(ids)
                ]
                num_calls, unanswered = num_calls + each.num_calls, ids
        elif each.role == "tool":
            call_id = unanswered.pop(0) if len(unanswered) > 1 else unanswered[0]
            message |= {"name": NAME, "tool_call_id": call_id}
        messages.append(message)
    return messages, None if last == len(messages) - 1 else last


def keeps_turn(rest: str, turn: Mapping[str, Any], delta: str, *, calls_as_text: bool) -> bool:
    """Whether a turn stands as it was sampled in what follows its prompt: thought, content and calls, then `delta`.

    Args:
        rest: All that the template puts behind the prompt of the turn.
        turn: The message, its texts words that occur nowhere else.
        delta: What the template puts behind such a turn.
        calls_as_text: Whether calls are part of the content, whose end then stands before `delta`.
    """
    calls = [call["function"]["arguments"]["query"] for call in turn.get("tool_calls", ())]
    words = [word for word in (turn.get("reasoning"), turn["content"], *calls) if word]
    end = 0
    for word in words:
        found = rest.find(word, end)
        if found < 0:
            return False
        end = found + len(word)
    lead = rest[: rest.find(words[0])] if words else rest.removesuffix(delta)
    if turn.get("reasoning") is None and ANY_OPENING.search(lead):
        return False
    if turn.get("reasoning") == "" and not ANY_CLOSING.search(lead):
        return False
    return rest[end:] == delta if words and not calls_as_text else rest[end:].endswith(delta)
