"""TwoHopSearch: questions over a synthetic knowledge base that take two searches in sequence."""

from __future__ import annotations

import functools
from collections.abc import Mapping

from polyturn.envs.messages import AssistantMessage, known_split
from polyturn.envs.rewards import exact_match
from polyturn.envs.spaces import Script
from polyturn.envs.tasks import ListTasks, Task, TaskSource
from polyturn.envs.tool_env import ToolEnv
from polyturn.envs.two_hop.names import Pool
from polyturn.envs.two_hop.oracle import make_random_policy, oracle
from polyturn.envs.two_hop.world import World, WorldSize, make_world
from polyturn.tools.search.bm25 import BM25Index
from polyturn.tools.search.retrieval import search_tool

SYSTEM_PROMPT = "Answer with a name only. Use the search tool to look things up."
SPLITS: tuple[Pool, ...] = ("train", "heldout")


class TwoHopSearchEnv(ToolEnv):
    """Find where somebody's employer is based: search for the person, then for the employer, then answer.

    The reward is 1.0 for an answer that matches the town exactly after normalisation, else 0.0. Train and held-out
    questions are about disjoint people and employers, all in one index.
    """

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
