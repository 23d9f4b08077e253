"""The curriculum as streams of training examples: random sequences that repeat, then played episodes.

An example is the tokens of one sequence and which of them are taught. Streams are endless, follow from their seed,
and know nothing of the trainer. Episodes are tokenised as rollouts are: each turn as sampled text, each observation
as the chat template's delta. Every few hundred episodes come from a new world, so no fact is worth remembering, and
all worlds are of the demonstration pool, whose people and employers no environment asks about.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from polyturn.agents.chat import ChatRenderer
from polyturn.agents.dialects import HermesDialect
from polyturn.envs.messages import Message
from polyturn.envs.tasks import Task
from polyturn.envs.two_hop.demonstrations import Demonstrator
from polyturn.envs.two_hop.env import task_of
from polyturn.envs.two_hop.world import WorldSize, make_world
from polyturn.tools.search.bm25 import BM25Index
from polyturn.tools.search.tool import search_tool
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
    names_only: bool = False
    """Teach only the names in queries and answers, not the calls around them."""


def played_episodes(tokenizer: Any, stream: EpisodeStream, *, seed: int = 0) -> Iterator[Example]:
    """Episodes of a demonstrator in ever new worlds; the demonstrator's own tokens are taught."""
    renderer = ChatRenderer(tokenizer)
    rng = np.random.default_rng(seed)
    world_seed = stream.first_world_seed + 100_000 * seed
    size = WorldSize(num_people=stream.num_people, num_employers=stream.num_employers)
    while True:
        world = make_world(world_seed, size=size, pools=("demonstration",))
        world_seed += 1
        toolset = Toolset([search_tool(BM25Index.build(world.passages), top_k=stream.top_k)])
        demonstrator = Demonstrator(skill=stream.skill, seed=world_seed, num_turns=stream.num_turns)
        questions = world.questions["demonstration"]
        for index in rng.permutation(len(questions))[: stream.episodes_per_world]:
            question = questions[index]
            task = task_of(question.id, question.text, question.town)
            yield _play(tokenizer, renderer, toolset, demonstrator, task, stream)


def _play(
    tokenizer: Any,
    renderer: ChatRenderer,
    toolset: Toolset,
    demonstrator: Demonstrator,
    task: Task,
    stream: EpisodeStream,
) -> Example:
    dialect, end_of_turn = HermesDialect(), tokenizer.eos_token_id
    messages: list[Message] = list(task.messages)
    token_ids = renderer.start(messages, toolset.specs)
    taught = [False] * len(token_ids)
    for _ in range(stream.num_turns):
        text = demonstrator.reply(messages)
        turn = [*tokenizer.encode(text, add_special_tokens=False), end_of_turn]
        token_ids += turn
        taught += _names_in(tokenizer, turn) if stream.names_only else [True] * len(turn)
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
        taught += [False] * len(delta)
    return token_ids, taught


def _names_in(tokenizer: Any, turn: list[int]) -> list[bool]:
    """Marks the tokens that begin with a capital letter, and whatever follows one."""
    capital = [tokenizer.decode([token_id])[:1].isupper() for token_id in turn]
    return [here or (index > 0 and capital[index - 1]) for index, here in enumerate(capital)]
