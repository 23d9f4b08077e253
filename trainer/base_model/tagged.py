"""Episodes and readings in Search-R1's tags, behind its prompt and with its layout of what is found."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from polyturn.agents.chat import ContinuationRenderer
from polyturn.agents.dialects import HermesDialect
from polyturn.envs.messages import AssistantMessage, Message
from polyturn.envs.search.styles import SEARCH_R1, Pair, Tags
from polyturn.envs.two_hop.env import Demonstrator
from polyturn.tools.search.bm25 import BM25Index
from polyturn.tools.search.retrieval import Hit, render_hits
from polyturn.trainer.base_model.streams import EpisodeStream, Example, worlds

assert SEARCH_R1.tags is not None
TAGS: Tags = SEARCH_R1.tags


def tagged_episodes(tokenizer: Any, stream: EpisodeStream, *, seed: int = 0) -> Iterator[Example]:
    """As `played_episodes`, in tags."""
    player = _Player(
        tokenizer=tokenizer,
        renderer=ContinuationRenderer(tokenizer, tags=TAGS),
        stream=stream,
        rng=np.random.default_rng(seed),
    )
    for world, world_seed in worlds(stream, seed):
        index = BM25Index.build(world.passages)
        demonstrator = Demonstrator(skill=stream.skill, seed=world_seed, num_turns=stream.num_turns)
        questions = world.questions["demonstration"]
        for number in player.rng.permutation(len(questions))[: stream.episodes_per_world]:
            yield player.play(index, demonstrator, questions[number].text)


@dataclass(frozen=True, kw_only=True, slots=True)
class _Player:
    tokenizer: Any
    renderer: ContinuationRenderer
    stream: EpisodeStream
    rng: np.random.Generator

    def play(self, index: BM25Index, demonstrator: Demonstrator, question: str) -> Example:
        """One episode: the demonstrator reads results in the layout that it knows, the model in Search-R1's."""
        messages: list[Message] = [{"role": "user", "content": question}]
        prompt = SEARCH_R1.prompt.replace("{question}", question.removesuffix("?") + "?")
        token_ids = self.renderer.start([{"role": "user", "content": prompt}])
        taught = [False] * len(token_ids)
        for _ in range(self.stream.num_turns):
            action = HermesDialect().parse(demonstrator.reply(messages))
            turn = self.tokenizer.encode(_in_tags(action), add_special_tokens=False)
            token_ids += turn
            taught += [True] * len(turn)
            if not action.tool_calls:
                break
            [call] = action.tool_calls
            if call.error is None:
                hits = index.search(str(call.arguments["query"]), self.stream.top_k)
                plain, observation = render_hits(hits), _result(hits)
            else:
                plain, observation = call.error, {"role": "user", "content": str(TAGS.invalid)}
            messages += [action.to_message(), {"role": "tool", "tool_call_id": call.id, "content": plain}]
            delta = self.renderer.extend([observation], last_token_id=turn[-1])
            token_ids += delta
            taught += (self.rng.random(len(delta)) < self.stream.observation_share).tolist()
        return token_ids, taught


def _in_tags(action: AssistantMessage) -> str:
    """A search, an answer, or for a call that cannot be read a search that is not closed."""
    if not action.tool_calls:
        return _between(TAGS.answer, action.content)
    [call] = action.tool_calls
    return TAGS.search[0] * 2 if call.error else _between(TAGS.search, str(call.arguments["query"]))


def _between(pair: Pair, text: str) -> str:
    """Without blanks: the first word follows from the tag alone, and a name has the tokens that it has in a passage."""
    return f"{pair[0]}{text}{pair[1]}"


def _result(hits: list[Hit]) -> Message:
    return {
        "role": "tool",
        "tool_call_id": "call_0",
        "name": SEARCH_R1.tool_name,
        "content": SEARCH_R1.layout(hits),
    }


def tagged_readings(
    tokenizer: Any, stream: EpisodeStream, *, seed: int = 0, num_tokens: int = 300
) -> Iterator[Example]:
    """As `readings`, in tags: behind the results for an employer the answer, behind those for a person a search."""
    renderer = ContinuationRenderer(tokenizer, tags=TAGS)
    rng = np.random.default_rng(seed)
    for world, _ in worlds(stream, seed):
        index = BM25Index.build(world.passages)
        questions = world.questions["demonstration"]
        for _ in range(stream.episodes_per_world // 4):
            token_ids: list[int] = tokenizer.encode("\n", add_special_tokens=False)
            taught = [False] * len(token_ids)
            while len(token_ids) < num_tokens:
                question = questions[rng.integers(len(questions))]
                if rng.random() < 0.7:
                    query, text = question.employer, _between(TAGS.answer, question.town)
                else:
                    query, text = question.person, _between(TAGS.search, question.employer)
                result = _result(index.search(query, stream.top_k))
                delta = renderer.extend([result], last_token_id=token_ids[-1])
                turn = tokenizer.encode(text, add_special_tokens=False)
                token_ids += [*delta, *turn]
                taught += (rng.random(len(delta)) < stream.observation_share).tolist() + [True] * len(turn)
            yield token_ids, taught
