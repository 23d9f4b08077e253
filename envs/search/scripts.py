"""Scripted players in any style: one that is always right, one that acts at random."""

from __future__ import annotations

import random
import re
from collections.abc import Sequence

from polyturn.envs.messages import AssistantMessage, Message
from polyturn.envs.search.styles import SearchStyle
from polyturn.envs.spaces import Script
from polyturn.envs.two_hop.oracle import person_of
from polyturn.envs.two_hop.world import BASE_PHRASES, EMPLOYER_PHRASES
from polyturn.tools.types import ToolCall, ToolSpec

THOUGHT = "<think> Let me see. </think>\n"
UNKNOWN = "I do not know."
_NAME = re.compile(r"[A-Z][a-z]+(?: [A-Z][a-z]+)*")


def search_message(style: SearchStyle, query: str) -> AssistantMessage:
    """The action that searches for `query`."""
    arguments = {"query": [query] if style.many_queries else query}
    call = ToolCall(id="call_0", name=style.tool_name, arguments=arguments)
    return AssistantMessage(content=_thought(style), tool_calls=(call,))


def answer_message(style: SearchStyle, answer: str) -> AssistantMessage:
    """The action that answers, in the style's form."""
    boxed = f"\\boxed{{{answer}}}" if style.answer == "boxed" else answer
    opening, closing = style.tags.answer if style.tags else ("<answer>", "</answer>")
    tagged = style.tags is not None or style.answer == "tags"
    return AssistantMessage(content=_thought(style) + (f"{opening} {boxed} {closing}" if tagged else boxed))


def next_oracle_message(
    style: SearchStyle, messages: Sequence[Message], *, question: str, gold: str | None
) -> AssistantMessage:
    """The right next message: two searches and what they say, or one search and the answer that is known."""
    results = [message["content"] for message in messages if message["role"] == "tool"]
    if gold is not None:
        return answer_message(style, gold) if results else search_message(style, question)
    person = person_of(question)
    if not results:
        return search_message(style, person)
    employer = _fact(results[0], person, EMPLOYER_PHRASES)
    if len(results) == 1:
        return search_message(style, employer) if employer else answer_message(style, UNKNOWN)
    town = _fact(results[1], employer, BASE_PHRASES) if employer else None
    return answer_message(style, town or UNKNOWN)


def random_searcher(style: SearchStyle, seed: int) -> Script:
    """A script that searches for or answers with names that it has read."""
    rng = random.Random(seed)

    def script(messages: Sequence[Message], tools: Sequence[ToolSpec]) -> AssistantMessage:
        del tools
        read = [m["content"] for m in messages if m["role"] == "tool"] or [messages[-1]["content"]]
        name = rng.choice([name for text in read for name in _NAME.findall(text)] or [UNKNOWN])
        return search_message(style, name) if rng.random() < 0.5 else answer_message(style, name)

    return script


def _fact(results: str, title: str, phrases: Sequence[str]) -> str | None:
    """The name in the first of `phrases` behind `title`: its own passage is the first result, whatever the layout."""
    passage = results[max(0, results.find(title)) :]
    patterns = [re.escape(re.sub(r"\{\w+\}", "@", p)).replace("@", f"({_NAME.pattern})") for p in phrases]
    found = [match for pattern in patterns if (match := re.search(pattern, passage))]
    return min(found, key=lambda match: match.start())[1] if found else None


def _thought(style: SearchStyle) -> str:
    opened = style.tags is not None and "<think>" in style.tags.opening
    return THOUGHT.removeprefix("<think>").lstrip() if opened else THOUGHT
