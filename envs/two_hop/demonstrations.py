"""Demonstrations for a warm start: a player who knows how it goes, and slips.

At each of the three decisions (whom to search for, what to make of the person's passage, what to make of the
employer's) the player does the right thing with probability `skill`, else makes one of the mistakes that beginners
make. Slips are drawn independently, so a policy that imitates the mixture can be improved one decision at a time.
"""

from __future__ import annotations

import json
import random
import re
from collections.abc import Sequence

from polyturn.envs.messages import Message
from polyturn.envs.two_hop.names import town_names
from polyturn.envs.two_hop.oracle import find_fact, person_of
from polyturn.envs.two_hop.world import BASE_PHRASES, BIRTH_PHRASES, EMPLOYER_PHRASES

GIVE_UP = "I do not know."
_TOWN = re.compile(rf"\b({'|'.join(town_names())})\b")


class Demonstrator:
    """Writes the turns of one player as text, tool calls in the Hermes form."""

    def __init__(self, *, skill: float, seed: int, num_turns: int = 4) -> None:
        """
        Args:
            skill: Probability of the right decision at each of three points, 0 to 1. At 1.0 there is no slip.
            seed: Fixes the slips.
            num_turns: After so many turns less one the player answers, whatever it knows.
        """
        if not 0.0 <= skill <= 1.0:
            raise ValueError(f"skill is a probability, not {skill}")
        self._skill = skill
        self._rng = random.Random(seed)
        self._num_turns = num_turns

    def reply(self, messages: Sequence[Message]) -> str:
        """The text of the next turn after `messages`."""
        person = person_of(next(m["content"] for m in messages if m["role"] == "user"))
        results = [m["content"] for m in messages if m["role"] == "tool"]
        read = "\n".join(results)
        employer = find_fact(read, person, EMPLOYER_PHRASES)
        town = find_fact(read, employer, BASE_PHRASES) if employer else None
        last_turn = len(results) >= self._num_turns - 1
        if employer and town:
            return self._answer(read, person, employer, town)
        if employer:
            return self._second_search(read, person, employer, last_turn)
        return self._first_search(read, person, last_turn, first=not results)

    def _right(self) -> bool:
        return self._rng.random() < self._skill

    def _first_search(self, read: str, person: str, last_turn: bool, *, first: bool) -> str:
        if last_turn:
            return self._some_town(read)
        if self._right() or (not first and self._rng.random() < 0.5):
            return write_call(person)
        slip = self._rng.random()
        if slip < 0.3:
            return self._rng.choice((GIVE_UP, self._some_town(read)))
        if slip < 0.5:
            return self._break(write_call(person))
        return write_call(self._rng.choice(person.split()))

    def _second_search(self, read: str, person: str, employer: str, last_turn: bool) -> str:
        birth_town = find_fact(read, person, BIRTH_PHRASES) or self._some_town(read)
        if last_turn:
            return birth_town
        if self._right():
            return write_call(employer)
        slip = self._rng.random()
        if slip < 0.5:
            return birth_town
        if slip < 0.75:
            return employer
        return write_call(birth_town)

    def _answer(self, read: str, person: str, employer: str, town: str) -> str:
        if self._right():
            return town
        others = sorted(set(_TOWN.findall(read.rsplit("Doc 1(", 1)[1])) - {town})
        slip = self._rng.random()
        if slip < 0.6 and others:
            return self._rng.choice(others)
        if slip < 0.8:
            return find_fact(read, person, BIRTH_PHRASES) or GIVE_UP
        return employer

    def _some_town(self, read: str) -> str:
        towns = sorted(set(_TOWN.findall(read)))
        return self._rng.choice(towns) if towns else GIVE_UP

    def _break(self, call: str) -> str:
        """A call that is not valid JSON."""
        good, bad = self._rng.choice((('"}}', '"}'), ('{"query', '["query'), ('{"name', "{name")))
        return call.replace(good, bad)


def write_call(query: str) -> str:
    """The text of a turn that searches for `query`."""
    call = {"name": "search", "arguments": {"query": query}}
    return f"<tool_call>\n{json.dumps(call)}\n</tool_call>"
