"""The messages of an episode as the page shows them: thoughts apart, calls with their results, cut to a bound."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from polyturn.viewer.plain_json import Json, bounded, cut, text_of
from polyturn.viewer.renderers import Renderer

MAX_CHARS = 100_000
"""Of one text; the page says how many more there are."""
MAX_MESSAGES = 2_000
_THOUGHT = re.compile(r"^\s*<think>(.*?)</think>\s*", re.DOTALL)


def shown_messages(
    messages: Sequence[Any],
    *,
    num_turns: int,
    show: Renderer | None,
    failed_calls: Mapping[str, bool] | None = None,
    max_chars: int = MAX_CHARS,
) -> list[Json]:
    """`ShownMessage` of each.

    Args:
        num_turns: of the episode: assistant messages before its last so many are part of the prompt.
        show: makes blocks of a message; None makes none.
        failed_calls: of each call, by its id, whether it went wrong; None where that is not recorded.
    """
    messages = messages[:MAX_MESSAGES]
    said = [index for index, message in enumerate(messages) if _role(message) == "assistant"]
    turns = {index: turn for turn, index in enumerate(said[max(0, len(said) - num_turns) :])}
    results = {_field(message, "tool_call_id"): index for index, message in enumerate(messages)}
    shown: list[Json] = []
    turn: int | None = None
    for index, message in enumerate(messages):
        turn = turns.get(index, turn)
        shown.append(_shown(index, message, turn, results, show, failed_calls or {}, max_chars))
    return shown


def _shown(
    index: int,
    message: Any,
    turn: int | None,
    results: Mapping[str | None, int],
    show: Renderer | None,
    failed_calls: Mapping[str, bool],
    max_chars: int,
) -> Json:
    content = text_of(message.get("content")) if isinstance(message, dict) else text_of(message)
    thinking = _field(message, "reasoning")
    if thinking is None and _role(message) == "assistant" and (found := _THOUGHT.match(content)):
        thinking, content = found.group(1), content[found.end() :]
    text, text_cut = cut(content, max_chars)
    thought, thought_cut = cut(thinking or "", max_chars)
    call_id = _field(message, "tool_call_id")
    return {
        "index": index,
        "turn": turn,
        "role": _role(message)[:200],
        "name": None if (name := _field(message, "name")) is None else name[:200],
        "text": text,
        "cut": text_cut,
        "thinking": None if thinking is None else thought,
        "thinking_cut": thought_cut,
        "calls": _calls(message, results),
        "call_id": None if call_id is None else call_id[:200],
        "is_error": None if call_id is None else failed_calls.get(call_id),
        "blocks": _blocks(message, show),
    }


def _blocks(message: Any, show: Renderer | None) -> list[Json]:
    if show is None or not isinstance(message, dict):
        return []
    try:
        return show(message)
    except Exception:  # noqa: BLE001  anybody's renderer: the text of the message is shown in any case
        return []


def _calls(message: Any, results: Mapping[str | None, int]) -> list[Json]:
    calls = message.get("tool_calls") if isinstance(message, dict) else None
    shown: list[Json] = []
    for call in calls[:200] if isinstance(calls, list) else []:
        function = call.get("function") if isinstance(call, dict) else None
        if not isinstance(function, dict):
            function = {"name": "", "arguments": call}
        call_id = text_of(call.get("id")) if isinstance(call, dict) else ""
        shown.append(
            {
                "id": call_id[:200],
                "name": text_of(function.get("name"))[:200],
                "arguments": bounded(function.get("arguments")),
                "result": results.get(call_id) if call_id else None,
            }
        )
    return shown


def _role(message: Any) -> str:
    return text_of(message.get("role")) if isinstance(message, dict) else ""


def _field(message: Any, name: str) -> str | None:
    value = message.get(name) if isinstance(message, dict) else None
    return None if value is None else text_of(value)


def num_common(conversations: Sequence[Sequence[Any]]) -> int:
    """With how many equal messages all of them begin."""
    count = 0
    for together in zip(*conversations, strict=False):
        if any(_words(message) != _words(together[0]) for message in together[1:]):
            break
        count += 1
    return count


def parts_at(one: Sequence[Any], other: Sequence[Any]) -> int | None:
    """The first message that is not the same in both; None where there is none."""
    count = num_common([one, other])
    return count if count < max(len(one), len(other)) else None


def _words(message: Any) -> Any:
    """A message without the ids of its calls, which are no part of what was said."""
    if not isinstance(message, dict):
        return message
    calls = message.get("tool_calls")
    if isinstance(calls, list):
        calls = [call.get("function") if isinstance(call, dict) else call for call in calls]
    kept = {key: value for key, value in message.items() if key not in ("tool_call_id", "tool_calls")}
    return kept, calls
