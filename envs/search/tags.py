"""Text with tags, read and written: the first action of a turn wins."""

from __future__ import annotations

import functools
import re
from collections.abc import Sequence
from dataclasses import dataclass

from polyturn.envs.messages import AssistantMessage
from polyturn.envs.search.styles import Pair, Tags
from polyturn.tools.types import ToolCall

SEARCH_TOOL, ACCESS_TOOL = "search", "access"
_ARGUMENTS = {SEARCH_TOOL: "query", ACCESS_TOOL: "url"}


def parse_turn(text: str, tags: Tags) -> AssistantMessage:
    """The message that a text is: its content is the text up to the end of the first complete action.

    A search or an access becomes a tool call; an answer is in the content. A text without an action becomes a call that
    could not be read, where the style goes on after such a text.
    """
    named = {SEARCH_TOOL: tags.search, ACCESS_TOOL: tags.access, "answer": tags.answer}
    found = {name: _first_block(text, pair) for name, pair in named.items() if pair is not None}
    actions = {name: block for name, block in found.items() if block is not None}
    if not actions:
        unread = ToolCall(id="call_0", name="", error=tags.invalid or "")
        calls = () if tags.invalid is None else (unread,)
        return AssistantMessage(content=text, tool_calls=calls, raw_text=text)
    name, block = min(actions.items(), key=lambda item: item[1].start)
    content = text[: block.end]
    if name == "answer":
        return AssistantMessage(content=content, raw_text=text)
    call = ToolCall(id="call_0", name=name, arguments={_ARGUMENTS[name]: block.inside.strip()})
    return AssistantMessage(content=content, tool_calls=(call,), raw_text=text)


def last_block(text: str, pair: Pair) -> str | None:
    """What stands in the last of the blocks that follow each other in a text; None without any."""
    last, start = None, 0
    while (block := _first_block(text, pair, start)) is not None:
        last, start = block.inside, block.end
    return last


def write_turn(message: AssistantMessage, tags: Tags) -> str:
    """The text of a message: what the policy wrote, or what it would have written for its first call."""
    if message.raw_text is not None:
        return message.raw_text
    for call in message.tool_calls[:1]:
        pair = tags.access if call.name == ACCESS_TOOL and tags.access else tags.search
        argument = next(iter(call.arguments.values()), "")
        return f"{message.content}{pair[0]} {argument} {pair[1]}"
    return message.content


def is_well_formed(turns: Sequence[str], tags: Tags) -> bool:
    """Whether a search or access follows one thought in every turn but the last, and an answer in that one.

    White space may stand between; no tag may stand inside a thought, a query or an answer.
    """
    searches, last = _turn_patterns(tags)
    return (
        bool(turns)
        and all(searches.fullmatch(turn) for turn in turns[:-1])
        and bool(last.fullmatch(turns[-1]))
    )


@dataclass(frozen=True, slots=True)
class _Block:
    start: int
    end: int
    inside: str


def _first_block(text: str, pair: Pair, start: int = 0) -> _Block | None:
    """The first opening with a closing behind it: what `opening(.*?)closing` finds, in linear time."""
    opening, closing = pair
    begin = text.find(opening, start)
    end = text.find(closing, begin + len(opening)) if begin >= 0 else -1
    return None if end < 0 else _Block(begin, end + len(closing), text[begin + len(opening) : end])


@functools.cache
def _turn_patterns(tags: Tags) -> tuple[re.Pattern[str], re.Pattern[str]]:
    """What a turn that searches looks like, and one that answers. Linear in the length of the text."""
    acting = [tags.search, *((tags.access,) if tags.access else ())]
    results = tuple(part.strip() for part in tags.results)
    all_tags = [tag for pair in (("<think>", "</think>"), *acting, tags.answer, results) for tag in pair]
    inside = f"(?:(?!{'|'.join(map(re.escape, all_tags))})(?s:.))*+"
    opened = "" if "<think>" in tags.opening else "<think>"

    def turn(pairs: Sequence[Pair]) -> re.Pattern[str]:
        actions = "|".join(f"{re.escape(a)}{inside}{re.escape(b)}" for a, b in pairs)
        return re.compile(rf"\s*+{opened}{inside}</think>\s*+(?:{actions})\s*+")

    return turn(acting), turn([tags.answer])
