"""SearchEnv: answer a question by searching, in the way of a chosen project."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from concurrent.futures import Executor
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

from polyturn.envs.messages import AssistantMessage, Message, known_split
from polyturn.envs.search.backends import choose_retriever
from polyturn.envs.search.grading import find_answer, reward_parts
from polyturn.envs.search.questions import (
    SPLITS,
    golds_of,
    question_of,
    read_golds,
    read_questions,
    world_questions,
)
from polyturn.envs.search.scripts import next_oracle_message, random_searcher
from polyturn.envs.search.styles import RewardName, SearchStyle, style_named
from polyturn.envs.search.tags import is_well_formed, write_turn
from polyturn.envs.search.tool import SearchDesk, search_tools
from polyturn.envs.spaces import Script
from polyturn.envs.tasks import Task, TaskSource
from polyturn.envs.tool_env import StepResult, ToolEnv
from polyturn.envs.two_hop.world import WorldSize
from polyturn.tools.search.retrieval import Retriever


class SearchEnv(ToolEnv):
    """A question, a search engine, and an answer that is compared with the right ones.

    A turn is one assistant message. There are `max_searches` of them in which a search counts, and with
    `final_answer_turn` one more in which only an answer does. A turn without an action takes its turn too. An episode
    that never answers is truncated, with a reward of 0.

    Without options it plays over the two-hop world: 1,500 questions a split, an index of 3,696 passages.
    """

    def __init__(
        self,
        *,
        style: str | SearchStyle = "search_r1",
        reward: RewardName | None = None,
        prompt: str | None = None,
        top_k: int | None = None,
        max_searches: int | None = None,
        final_answer_turn: bool | None = None,
        questions: str | Path | None = None,
        heldout_questions: str | Path | None = None,
        index: str | Path | None = None,
        corpus: str | Path | None = None,
        search_url: str | None = None,
        retriever: Retriever | None = None,
        world_seed: int = 1,
        split: str = "train",
        tasks: TaskSource | None = None,
        render_mode: str | None = None,
    ) -> None:
        """
        Args:
            style: A `SearchStyle` or the name of one. What follows is the style's own where it is None.
            reward: `exact_match`, `exact_match_and_format` (Search-R1's 1.0, 0.8, 0.2, 0.1, 0) or `f1`.
            prompt: The user's message, with `{question}` in it.
            top_k: Passages per search.
            max_searches: Turns in which a search counts.
            final_answer_turn: Whether one more turn follows in which only an answer counts.
            questions: A JSONL file of `{"question", "golden_answers"}`, in place of the world's `train` questions.
            heldout_questions: Another, in place of its `heldout` questions.
            index: The directory of an index, in place of the world's passages.
            corpus: A passage file in wiki-18's format, to be indexed in memory.
            search_url: A search server, such as `http://127.0.0.1:8000`, or `replay:FILE` for recorded answers.
            retriever: Any retriever; the four exclude each other.
            world_seed: Which two-hop world.
            split: `train` or `heldout`.
            tasks: Takes the place of all questions: the last user message is the question, the label its answers.
            render_mode: None or "ansi".

        Raises:
            ValueError: an option that cannot be used.
        """
        base = style if isinstance(style, SearchStyle) else style_named(style)
        changes: dict[str, Any] = {
            "reward": reward,
            "prompt": prompt,
            "top_k": top_k,
            "max_searches": max_searches,
            "final_answer_turn": final_answer_turn,
        }
        self.style = replace(base, **{key: value for key, value in changes.items() if value is not None})
        _check_style(self.style)
        self.world_seed = world_seed
        files = {"train": questions, "heldout": heldout_questions}
        self._questions = {
            name: read_questions(str(path)) for name, path in files.items() if path is not None
        }
        own = (questions, heldout_questions, tasks, index, corpus, search_url, retriever)
        self._is_two_hop = all(option is None for option in own)
        self._desk = SearchDesk(
            style=self.style,
            retriever=choose_retriever(
                index=index, corpus=corpus, search_url=search_url, retriever=retriever, world_seed=world_seed
            ),
        )
        self._turns: list[AssistantMessage] = []
        super().__init__(
            tools=search_tools(self._desk),
            tasks=tasks,
            split=split,
            max_turns=self.style.max_searches + self.style.final_answer_turn,
            render_mode=render_mode,
        )

    def tasks(self, split: str) -> TaskSource:
        """The questions of a split."""
        if self._given_tasks is not None:
            return self._given_tasks
        known_split(split, SPLITS)
        if self._questions:
            if split not in self._questions:
                name = "questions" if split == "train" else "heldout_questions"
                raise ValueError(f"there is no split {split!r}: give a file of it as {name}=")
            return self._questions[split]
        return world_questions(self.world_seed, WorldSize(), split)

    def begin(self, task: Task) -> Sequence[Message]:
        """The style's prompt with the question in it."""
        golds_of(task)
        self._turns = []
        self._desk.open(self.metrics)
        question = question_of(task).strip()
        if self.style.ends_in_question_mark and not question.endswith("?"):
            question += "?"
        prompt: Message = {"role": "user", "content": self.style.prompt.replace("{question}", question)}
        if self.style.system is None:
            return (prompt,)
        return ({"role": "system", "content": self.style.system}, prompt)

    def check_label(self, label: Any) -> None:
        """Raise `ValueError` for a label that names no answer."""
        read_golds(label)

    def follow_up(self, message: AssistantMessage) -> Sequence[Message]:
        """A message with neither a search nor an answer is told so, where the style goes on after one."""
        tags = self.style.tags
        if tags is None or tags.invalid is None or find_answer(self.style, message.content) is not None:
            return ()
        return ({"role": "user", "content": tags.invalid},)

    def grade(self, message: AssistantMessage) -> Mapping[str, float]:
        """The style's reward of the last answer in the policy's own text."""
        return reward_parts(
            self.style.reward,
            find_answer(self.style, message.content),
            golds_of(self.task),
            well_formed=self._is_well_formed(),
            missing=self.style.missing_answer,
        )

    def step(self, action: AssistantMessage) -> StepResult:
        self._note(action)
        return super().step(action)

    async def step_async(self, action: AssistantMessage, *, executor: Executor | None = None) -> StepResult:
        self._note(action)
        return await super().step_async(action, executor=executor)

    def oracle(self, messages: Sequence[Message], tools: Sequence[Any]) -> AssistantMessage:
        """Searches twice and reads, in the two-hop world; elsewhere searches for the question and knows the answer."""
        del tools
        gold = None if self._is_two_hop else golds_of(self.task)[0]
        return next_oracle_message(self.style, messages, question=question_of(self.task), gold=gold)

    def random_policy(self, seed: int) -> Script:
        """Searches for and answers with names that it has read."""
        return random_searcher(self.style, seed)

    def _note(self, action: AssistantMessage) -> None:
        """Count what Search-R1's collapses show first: actions that are none, and thoughts that dwindle."""
        if not isinstance(action, AssistantMessage):
            return
        self._turns.append(action)
        self._desk.start_turn(len(self._turns))
        unread = any(call.error is not None for call in action.tool_calls)
        silent = not action.tool_calls and find_answer(self.style, action.content) is None
        self._desk.count("num_invalid_actions", float(unread or silent))
        thought, closed, _ = action.text.partition("</think>")
        self._desk.count(
            "num_thought_words", float(len(thought.replace("<think>", " ").split())) if closed else 0.0
        )

    def _is_well_formed(self) -> bool:
        if self.style.tags is None:
            return all(call.error is None for turn in self._turns for call in turn.tool_calls)
        return is_well_formed([write_turn(turn, self.style.tags) for turn in self._turns], self.style.tags)


def _check_style(style: SearchStyle) -> None:
    if style.reward not in get_args(RewardName):
        raise ValueError(f"reward must be one of {', '.join(get_args(RewardName))}, not {style.reward!r}")
    if "{question}" not in style.prompt:
        raise ValueError("the prompt must contain {question}")
    for name, value, least in (("top_k", style.top_k, 1), ("max_searches", style.max_searches, 0)):
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            raise ValueError(f"{name} must be a whole number of at least {least}, not {value!r}")
    if style.max_searches == 0 and not style.final_answer_turn:
        raise ValueError("without searches and without a final_answer_turn there is no turn to play")
