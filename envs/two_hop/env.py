"""TwoHopSearch: questions over a synthetic knowledge base that take two searches in sequence.

Scripted players: one that is always right, one that acts at random, and for a warm start one that knows how it goes,
and slips.
"""

from __future__ import annotations

import functools
import json
import random
import re
from collections.abc import Callable, Mapping, Sequence

from polyturn.envs.messages import AssistantMessage, ListTasks, Message, Script, Task, TaskSource, known_split
from polyturn.envs.rewards import exact_match, normalise_answer
from polyturn.envs.tool_env import ToolEnv
from polyturn.envs.two_hop.world import (
    BASE_PHRASES,
    BIRTH_PHRASES,
    EMPLOYER_PHRASES,
    Pool,
    World,
    WorldSize,
    make_world,
    town_names,
)
from polyturn.tools.search.bm25 import BM25Index
from polyturn.tools.search.retrieval import search_tool
from polyturn.tools.types import ToolCall, ToolSpec

GIVE_UP = "I do not know."
_NAME = r"([A-Z][a-z]+(?: [A-Z][a-z]+)*)"
_RESULT = re.compile(r"^Doc \d+\(Title: (.*?)\) (.*)$", re.MULTILINE)


def search_for(query: str) -> AssistantMessage:
    """The action that searches for `query`."""
    return AssistantMessage(tool_calls=(ToolCall(id="call_0", name="search", arguments={"query": query}),))


def oracle(messages: Sequence[Message], tools: Sequence[ToolSpec]) -> AssistantMessage:
    """The right next message: search for the person, then for the employer, then the town."""
    del tools
    results = [message["content"] for message in messages if message["role"] == "tool"]
    query, town = next_hop(results, next(m["content"] for m in messages if m["role"] == "user"), find_fact)
    return search_for(query) if query else AssistantMessage(content=town or GIVE_UP)


FindFact = Callable[[str, str, Sequence[str]], str | None]


def next_hop(results: Sequence[str], question: str, find: FindFact) -> tuple[str | None, str | None]:
    """What to search for next, after the results so far; or None and the town, where that was found."""
    person = person_of(question)
    if not results:
        return person, None
    employer = find(results[0], person, EMPLOYER_PHRASES)
    if employer is None or len(results) == 1:
        return employer, None
    return None, find(results[1], employer, BASE_PHRASES)


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


SYSTEM_PROMPT = "Answer with a name only. Use the search tool to look things up."
SPLITS: tuple[Pool, ...] = ("train", "heldout")


class TwoHopSearchEnv(ToolEnv):
    """Find where somebody's employer is based: search for the person, then for the employer, then answer.

    The reward is 1.0 for an answer that matches the town exactly after normalisation, else 0.0. Train and held-out
    questions are about disjoint people and employers, all in one index.
    """

    hooks_run = "event_loop"  # a search takes a tenth of a millisecond
    is_replayable = True
    oracle = staticmethod(oracle)

    def __init__(
        self,
        *,
        world_seed: int = 1,
        num_people: int = WorldSize().num_people,
        num_employers: int = WorldSize().num_employers,
        top_k: int = 2,
        split: str = "train",
        max_turns: int | None = 4,
        tasks: TaskSource | None = None,
        render_mode: str | None = None,
    ) -> None:
        """
        Args:
            world_seed: Which knowledge base; the same seed and sizes give the same one.
            num_people: People, and so questions, of each split.
            num_employers: Employers of each split.
            top_k: Passages per search.
            split: `train` or `heldout`.
            max_turns: Searches and the answer together.
            tasks: Takes the place of the world's own questions.
            render_mode: None or "ansi".

        Raises:
            ValueError: sizes that names do not suffice for, a split that does not exist, or `top_k` below 1.
        """
        if top_k < 1:
            raise ValueError(f"top_k must be at least 1, not {top_k}")
        known_split(split, SPLITS)
        self.size = WorldSize(num_people=num_people, num_employers=num_employers)
        self.world_seed = world_seed
        index = build_index(world_seed, self.size)
        super().__init__(
            tools=[search_tool(index, top_k=top_k)],
            tasks=tasks,
            split=split,
            max_turns=max_turns,
            render_mode=render_mode,
        )

    def tasks(self, split: str) -> TaskSource:
        """The questions of `train` or `heldout`, or the tasks given to the constructor."""
        if self._given_tasks is not None:
            return self._given_tasks
        return world_tasks(self.world_seed, self.size, known_split(split, SPLITS))

    def random_policy(self, seed: int) -> Script:
        """Searches for and answers with names that it has read."""
        return make_random_policy(seed)

    def grade(self, message: AssistantMessage) -> Mapping[str, float]:
        """Exact match with the town, after normalisation."""
        return {"exact_match": exact_match(message.content, self.task.label)}

    def answer_of(self, message: AssistantMessage) -> str | None:
        """The message, normalised as it is compared."""
        return None if message.tool_calls else normalise_answer(message.content) or None


def task_of(task_id: str, question: str, town: str) -> Task:
    """A task that asks `question`."""
    return Task(
        task_id=task_id,
        messages=({"role": "system", "content": SYSTEM_PROMPT}, {"role": "user", "content": question}),
        label=town,
    )


# Worlds and indexes are immutable, and a process plays many episodes in the same one.


@functools.lru_cache(maxsize=4)
def build_world(seed: int, size: WorldSize) -> World:
    """The world with both splits in it."""
    return make_world(seed, size=size, pools=SPLITS)


@functools.lru_cache(maxsize=4)
def build_index(seed: int, size: WorldSize) -> BM25Index:
    """The search index over all passages of the world."""
    return BM25Index.build(build_world(seed, size).passages)


@functools.lru_cache(maxsize=8)
def world_tasks(seed: int, size: WorldSize, split: Pool) -> ListTasks:
    """The tasks of one split."""
    return ListTasks([task_of(q.id, q.text, q.town) for q in build_world(seed, size).questions[split]])
