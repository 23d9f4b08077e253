"""The curriculum as streams of training examples: random sequences that repeat, then played episodes.

An example is the tokens of one sequence and which of them are taught. Streams are endless, follow from their seed,
and know nothing of the trainer. Episodes are tokenised as rollouts are: each turn as sampled text, each observation
as the chat template's delta. Every few hundred episodes come from a new world, so no fact is worth remembering, and
all worlds are of the demonstration pool, whose people and employers no environment asks about.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from polyturn.agents.chat import ChatRenderer
from polyturn.agents.dialects import HermesDialect
from polyturn.envs.messages import Message, Task
from polyturn.envs.two_hop.env import Demonstrator, task_of, write_call
from polyturn.envs.two_hop.world import World, WorldSize, make_world
from polyturn.tools.search.bm25 import BM25Index
from polyturn.tools.search.retrieval import search_tool
from polyturn.tools.toolset import Toolset

Example = tuple[list[int], list[bool]]
"""Token ids, and which of them are taught."""


def repeated_sequences(
    *, vocab_size: int, length: int = 128, shortest_period: int = 6, longest_period: int = 48, seed: int = 0
) -> Iterator[Example]:
    """Blocks of distinct random tokens, repeated until `length`; all but the first of each block's rounds is taught.

    A model can only predict these by looking for an earlier occurrence and copying what came after it.
    """
    rng = np.random.default_rng(seed)
    while True:
        period = int(rng.integers(shortest_period, longest_period + 1))
        block = rng.permutation(vocab_size)[:period]
        token_ids = np.resize(block, length).tolist()
        yield token_ids, [position >= period for position in range(length)]


@dataclass(frozen=True, kw_only=True, slots=True)
class EpisodeStream:
    """What kind of episodes a stream holds."""

    skill: float = 1.0
    """Of the demonstrator; 1.0 makes only right episodes."""
    top_k: int = 2
    num_turns: int = 4
    episodes_per_world: int = 400
    num_people: int = 1500
    num_employers: int = 500
    first_world_seed: int = 1_000_000
    observation_share: float = 0.0
    """How many of the tokens of observations are taught too, drawn at random. Learning what comes next in a passage
    teaches a model to tell its phrases apart; without it, each phrase is found separately, and late."""


def worlds(stream: EpisodeStream, seed: int) -> Iterator[tuple[World, int]]:
    """Worlds without end, each with a number that is its own: it seeds what is played in it."""
    size = WorldSize(num_people=stream.num_people, num_employers=stream.num_employers)
    for world_seed in itertools.count(stream.first_world_seed + 100_000 * seed):
        yield make_world(world_seed, size=size, pools=("demonstration",)), world_seed + 1


def played_episodes(tokenizer: Any, stream: EpisodeStream, *, seed: int = 0) -> Iterator[Example]:
    """Episodes of a demonstrator in ever new worlds; the demonstrator's tokens are taught, and a share of the rest."""
    renderer = ChatRenderer(tokenizer)
    rng = np.random.default_rng(seed)
    for world, world_seed in worlds(stream, seed):
        toolset = Toolset([search_tool(BM25Index.build(world.passages), top_k=stream.top_k)])
        demonstrator = Demonstrator(skill=stream.skill, seed=world_seed, num_turns=stream.num_turns)
        questions = world.questions["demonstration"]
        for index in rng.permutation(len(questions))[: stream.episodes_per_world]:
            question = questions[index]
            task = task_of(question.id, question.text, question.town)
            yield _play(tokenizer, renderer, toolset, demonstrator, task, stream, rng)


def _play(
    tokenizer: Any,
    renderer: ChatRenderer,
    toolset: Toolset,
    demonstrator: Demonstrator,
    task: Task,
    stream: EpisodeStream,
    rng: np.random.Generator,
) -> Example:
    dialect, end_of_turn = HermesDialect(), tokenizer.eos_token_id
    messages: list[Message] = list(task.messages)
    token_ids = renderer.start(messages, toolset.specs)
    taught = [False] * len(token_ids)
    for _ in range(stream.num_turns):
        text = demonstrator.reply(messages)
        turn = [*tokenizer.encode(text, add_special_tokens=False), end_of_turn]
        token_ids += turn
        taught += [True] * len(turn)
        action = dialect.parse(text)
        if not action.tool_calls:
            break
        results = [toolset.call(call) for call in action.tool_calls]
        observation: list[Message] = [
            {"role": "tool", "tool_call_id": r.call_id, "name": r.name, "content": r.content} for r in results
        ]
        messages += [action.to_message(), *observation]
        delta = renderer.extend(observation, last_token_id=end_of_turn)
        token_ids += delta
        taught += (rng.random(len(delta)) < stream.observation_share).tolist()
    return token_ids, taught


def readings(
    tokenizer: Any, stream: EpisodeStream, *, seed: int = 0, num_tokens: int = 400
) -> Iterator[Example]:
    """Search results, one after the other, each with what is to be read from it: the dense form of an episode.

    The results for an employer are followed by the town, those for a person by the search for the employer.
    """
    renderer = ChatRenderer(tokenizer)
    rng = np.random.default_rng(seed)
    for world, _ in worlds(stream, seed):
        search = search_tool(BM25Index.build(world.passages), top_k=stream.top_k).function
        questions = world.questions["demonstration"]
        for _ in range(stream.episodes_per_world // 4):
            token_ids: list[int] = []
            taught: list[bool] = []
            while len(token_ids) < num_tokens:
                question = questions[rng.integers(len(questions))]
                about_employer = rng.random() < 0.7
                query = question.employer if about_employer else question.person
                text = question.town if about_employer else write_call(question.employer)
                result: Message = {"role": "tool", "content": search(query=query)}
                delta = renderer.extend([result], last_token_id=tokenizer.eos_token_id)
                turn = [*tokenizer.encode(text, add_special_tokens=False), tokenizer.eos_token_id]
                token_ids += [*delta, *turn]
                taught += (rng.random(len(delta)) < stream.observation_share).tolist() + [True] * len(turn)
            yield token_ids, taught
