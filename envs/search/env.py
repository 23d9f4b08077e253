"""SearchEnv: answer a question by searching, in the way of a chosen project.

Questions come from the two-hop world, or from a file like NQ's and HotpotQA's.
"""

from __future__ import annotations

import functools
import random
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

from polyturn.envs.messages import AssistantMessage, ListTasks, Message, Script, Task, TaskSource, known_split
from polyturn.envs.rewards import exact_match, normalise_answer
from polyturn.envs.search.published_score import ANSWER, cut_behind_action, published_answer, published_match
from polyturn.envs.search.questions import read_questions
from polyturn.envs.search.styles import (
    AnswerForm,
    RewardName,
    SearchStyle,
    is_well_formed,
    last_block,
    style_named,
    write_turn,
)
from polyturn.envs.search.tool import SearchDesk, choose_retriever, search_tools
from polyturn.envs.tool_env import StepResult, ToolEnv
from polyturn.envs.two_hop.env import build_world, next_hop
from polyturn.envs.two_hop.world import Pool, WorldSize
from polyturn.tools.search.retrieval import Retriever
from polyturn.tools.types import ToolCall, ToolSpec

SPLITS: tuple[Pool, ...] = ("train", "heldout")


@functools.lru_cache(maxsize=8)
def world_questions(seed: int, size: WorldSize, split: Pool) -> ListTasks:
    """The two-hop questions of a world, each with its town as the answer."""
    questions = build_world(seed, size).questions[split]
    return ListTasks([Task.from_prompt(q.id, q.text, label=(q.town,)) for q in questions])


def question_of(task: Task) -> str:
    """What a task asks: its last user message."""
    return next(message["content"] for message in reversed(task.messages) if message["role"] == "user")


def read_golds(label: Any) -> Sequence[str]:
    """The answers that a label counts as right.

    Raises:
        ValueError: it is no text and no list of texts, or none of them can be given as an answer.
    """
    golds = (label,) if isinstance(label, str) else label
    if not isinstance(golds, (list, tuple)) or not golds or not all(isinstance(gold, str) for gold in golds):
        raise ValueError(f"the label must be a text or a list of texts, not {label!r:.200}")
    if not any(gold.strip() for gold in golds):
        raise ValueError("the label is empty, so no answer can be right")
    return golds


EXACT, FORMAT, ATTEMPT = 0.8, 0.2, 0.1
"""Search-R1's rewards with format: 1.0 right and well formed, 0.8 right, 0.2 well formed, 0.1 an answer, else 0."""


def find_answer(style: SearchStyle, text: str) -> str | None:
    """The answer that stands in a policy's message; None without one in the style's form."""
    form: AnswerForm = style.answer
    if form == "text":
        return text.strip()
    if form == "boxed":
        block = last_block(text, style.tags.answer) if style.tags else text
        return None if block is None else _last_box(block)
    inside = last_block(text, style.tags.answer if style.tags else ANSWER)
    return None if inside is None else inside.strip()


def reward_parts(
    reward: RewardName, answer: str | None, golds: Sequence[str], *, well_formed: bool, missing: float = 0.0
) -> Mapping[str, float]:
    """The parts of a reward; their sum is its value.

    Args:
        answer: None where the episode ended without one.
        golds: Any of them is right.
        well_formed: Whether every turn has its one thought and its one action.
        missing: The reward without an answer.
    """
    if reward == "f1":
        return {"f1": missing if answer is None else max(token_f1(answer, gold) for gold in golds)}
    if reward == "qa_em":
        return {"exact_match": missing if answer is None else published_match(answer, golds)}
    exact = 0.0 if answer is None else exact_match(answer, golds)
    if reward == "exact_match":
        return {"exact_match": missing if answer is None else exact}
    attempted = answer is not None and not exact and not well_formed
    return {"exact_match": EXACT * exact, "format": FORMAT * well_formed, "attempt": ATTEMPT * attempted}


def token_f1(answer: str, gold: str) -> float:
    """Harmonic mean of precision and recall of the words, with their counts, after normalisation (SQuAD, 1606.05250).

    Yes and no are right or wrong as a whole, and so is a gold answer without words.
    """
    found, wanted = normalise_answer(answer).split(), normalise_answer(gold).split()
    if found == wanted:
        return 1.0
    if not found or not wanted or {" ".join(found), " ".join(wanted)} & {"yes", "no", "noanswer"}:
        return 0.0
    shared = (Counter(found) & Counter(wanted)).total()
    return 2 * shared / (len(found) + len(wanted))


def _last_box(text: str) -> str | None:
    """What stands in the last `\\boxed{...}` whose braces are balanced."""
    start = text.rfind("\\boxed{")
    if start < 0:
        return None
    depth = 0
    for index in range(start + len("\\boxed"), len(text)):
        depth += {"{": 1, "}": -1}.get(text[index], 0)
        if depth == 0:
            return text[start + len("\\boxed{") : index].strip()
    return None


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
    query, town = next_hop(results, question, _fact)
    return search_message(style, query) if query else answer_message(style, town or UNKNOWN)


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


class SearchEnv(ToolEnv):
    """A question, a search engine, and an answer that is compared with the right ones.

    A turn is one assistant message. There are `max_searches` of them in which a search counts, and with
    `final_answer_turn` one more in which only an answer does. A turn without an action takes its turn too. An episode
    that never answers is truncated, with a reward of 0.

    Without options it plays over the two-hop world: 1,500 questions a split, an index of 3,696 passages.
    """

    is_replayable = True

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
        data_source: str | None = None,
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
            reward: `exact_match`, `qa_em` (exactly Search-R1's scorer), `exact_match_and_format` (its 1.0, 0.8, 0.2,
                0.1, 0) or `f1`.
            prompt: The user's message, with `{question}` in it.
            top_k: Passages per search.
            max_searches: Turns in which a search counts.
            final_answer_turn: Whether one more turn follows in which only an answer counts.
            questions: A JSONL or Parquet file of `{"question", "golden_answers"}`, in place of the world's `train`
                questions.
            heldout_questions: Another, in place of its `heldout` questions.
            data_source: Of files that hold several sets, as Search-R1's `test.parquet`, the one that is played.
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
            name: read_questions(str(path), data_source) for name, path in files.items() if path is not None
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
        read_golds(task.label)
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
        """The style's reward of the last answer in the policy's own text; `qa_em` looks as its scorer does."""
        if self.style.reward == "qa_em":
            answer = published_answer(self._response(message))
        else:
            answer = find_answer(self.style, message.content)
        return reward_parts(
            self.style.reward,
            answer,
            read_golds(self.task.label),
            well_formed=self._is_well_formed(),
            missing=self.style.missing_answer,
        )

    def answer_of(self, message: AssistantMessage) -> str | None:
        """What stands in the answer's form, normalised as it is compared."""
        found = find_answer(self.style, message.content)
        return None if found is None else normalise_answer(found) or found.strip() or None

    def step(self, action: AssistantMessage) -> StepResult:
        self._note(action)
        return super().step(action)

    async def step_async(self, action: AssistantMessage) -> StepResult:
        self._note(action)
        return await super().step_async(action)

    def oracle(self, messages: Sequence[Message], tools: Sequence[Any]) -> AssistantMessage:
        """Searches twice and reads, in the two-hop world; elsewhere searches for the question and knows the answer."""
        del tools
        gold = None if self._is_two_hop else read_golds(self.task.label)[0]
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

    def _response(self, last: AssistantMessage) -> str:
        """All that follows the prompt, turns and results, as Search-R1 keeps it: turns end behind their action."""
        parts = []
        for message in self._transcript:
            if message["role"] == "assistant":
                parts.append("")
            elif parts:
                parts[-1] += message["content"]
        tags = self.style.tags
        turns = [write_turn(turn, tags) if tags else turn.content for turn in self._turns[:-1]]
        told = [*turns, last.content]
        return "".join(cut_behind_action(turn) + part for turn, part in zip(told, parts, strict=True))

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
