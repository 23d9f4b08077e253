"""Scripted players of TwoHopSearch: one that is always right, one that acts at random.

The oracle knows no answers. It reads the question and the passages, as a policy must: that it scores 1.0 shows that
two searches suffice.
"""

from __future__ import annotations

import random
import re
from collections.abc import Sequence

from polyturn.envs.messages import AssistantMessage, Message
from polyturn.envs.spaces import Script
from polyturn.envs.two_hop.world import BASE_PHRASES, EMPLOYER_PHRASES
from polyturn.tools.types import ToolCall, ToolSpec

_NAME = r"([A-Z][a-z]+(?: [A-Z][a-z]+)*)"
_RESULT = re.compile(r"^Doc \d+\(Title: (.*?)\) (.*)$", re.MULTILINE)


def search_for(query: str) -> AssistantMessage:
    """The action that searches for `query`."""
    return AssistantMessage(tool_calls=(ToolCall(id="call_0", name="search", arguments={"query": query}),))


def oracle(messages: Sequence[Message], tools: Sequence[ToolSpec]) -> AssistantMessage:
    """The right next message: search for the person, then for the employer, then the town."""
    del tools
    results = [message["content"] for message in messages if message["role"] == "tool"]
    person = person_of(next(m["content"] for m in messages if m["role"] == "user"))
    if not results:
        return search_for(person)
    employer = find_fact(results[0], person, EMPLOYER_PHRASES)
    if len(results) == 1:
        return search_for(employer) if employer else AssistantMessage(content="I do not know.")
    town = find_fact(results[1], employer, BASE_PHRASES) if employer else None
    return AssistantMessage(content=town or "I do not know.")


def make_random_policy(seed: int) -> Script:
    """A script that searches for or answers with names that it has read, at random."""
    rng = random.Random(seed)

    def script(messages: Sequence[Message], tools: Sequence[ToolSpec]) -> AssistantMessage:
        del tools
        seen = [
            name
            for m in messages
            if m["role"] in ("user", "tool")
            for name in re.findall(_NAME, m["content"])
        ]
        name = rng.choice(seen)
        return search_for(name) if rng.random() < 0.5 else AssistantMessage(content=name)

    return script


def person_of(question: str) -> str:
    """Whom a question is about: its only name of two words."""
    found = re.search(r"[A-Z][a-z]+ [A-Z][a-z]+", question)
    assert found, f"a question about nobody: {question!r}"
    return found[0]


def find_fact(results: str, title: str, phrases: Sequence[str]) -> str | None:
    """The name that stands in one of `phrases` in the passage titled `title`; None if there is none."""
    for found_title, text in _RESULT.findall(results):
        if found_title != title:
            continue
        for phrase in phrases:
            pattern = re.escape(re.sub(r"\{\w+\}", "@", phrase)).replace("@", _NAME)
            if found := re.search(pattern, text):
                return found[1]
    return None
