"""A prompt, an answer, a rule: tasks that need no environment of their own."""

from __future__ import annotations

import functools
import random
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from polyturn.configs.schema.tasks import TaskSourceConfig
from polyturn.envs.messages import (
    AssistantMessage,
    EpisodeView,
    ListTasks,
    Message,
    Observation,
    Score,
    Script,
    Task,
    TaskSource,
    as_score,
    is_async,
    known_split,
)
from polyturn.envs.rewards.answers import LETTERS
from polyturn.envs.rewards.factory import read_reward
from polyturn.envs.rewards.rules import MultipleChoice, check_label
from polyturn.envs.tasks.sources import open_tasks
from polyturn.envs.tool_env import ToolEnv
from polyturn.tools.types import ToolSpec

SPLITS = {"train": range(200), "heldout": range(1000, 1100)}


class SingleTurnEnv(ToolEnv):
    """Asks a task's prompt and grades the answer by a rule; no tools.

    Without tasks of one's own it asks for sums of two numbers.
    """

    def __init__(
        self,
        *,
        reward: str | Mapping[str, Any] = "exact_match",
        tasks: TaskSource | str | Path | None = None,
        system_prompt: str | None = None,
        split: str = "train",
        max_turns: int | None = None,
        render_mode: str | None = None,
    ) -> None:
        """
        Args:
            reward: The name of a rule, or `{name, options}`, or a mapping as the section `reward` of a config.
            tasks: A source, or the path of a task file (`path@[a:b]` too); they are the tasks of every split.
            system_prompt: Comes before the prompt of every task.
            split: `train` or `heldout`.
            max_turns: Has no effect beyond the first turn.
            render_mode: None or "ansi".

        Raises:
            ValueError: a reward, a file or a split that does not exist; a reward that is asynchronous.
        """
        if isinstance(tasks, str | Path):
            tasks = open_tasks([TaskSourceConfig(path=str(tasks))])
        if tasks is None:
            known_split(split, SPLITS)
        super().__init__(tasks=tasks, split=split, max_turns=max_turns, render_mode=render_mode)
        self._rule = read_reward(dict(reward) if isinstance(reward, Mapping) else reward)
        if is_async(self._rule):
            raise ValueError(
                f"SingleTurn's own reward must be a rule or a function that is not async, not {reward!r}"
            )
        self._system_prompt = system_prompt

    def tasks(self, split: str) -> TaskSource:
        """Sums, or the tasks given to the constructor."""
        if self._given_tasks is not None:
            return self._given_tasks
        return sums(known_split(split, SPLITS))

    def begin(self, task: Task) -> Observation:
        """The task's prompt, after the system prompt where there is one."""
        if self._system_prompt is None:
            return task.messages
        return ({"role": "system", "content": self._system_prompt}, *task.messages)

    def check_label(self, label: Any) -> None:
        """Raise `ValueError` for a label that the rule can pay no answer for."""
        check_label(self._rule, label)

    def grade(self, message: AssistantMessage) -> Score:
        """What the rule says of the answer."""
        episode = EpisodeView(
            task=self.task, message=message, messages=tuple(self._transcript), metrics=self.metrics
        )
        return as_score(self._rule(episode), name=getattr(self._rule, "name", "reward"))

    def oracle(self, messages: Sequence[Message], tools: Sequence[ToolSpec]) -> AssistantMessage:
        """Answers with the label, the first of several."""
        del messages, tools
        label = self.task.label
        if isinstance(label, list | tuple):
            label = label[0]
        if isinstance(self._rule, MultipleChoice) and isinstance(label, int):
            label = LETTERS[label]
        return AssistantMessage(content=str(label))

    def random_policy(self, seed: int) -> Script:
        """Answers with any number below 200."""
        rng = random.Random(seed)

        def script(messages: Sequence[Message], tools: Sequence[ToolSpec]) -> AssistantMessage:
            del messages, tools
            return AssistantMessage(content=str(rng.randrange(200)))

        return script


@functools.lru_cache(maxsize=2)
def sums(split: str) -> ListTasks:
    """The built-in tasks of a split."""
    return ListTasks([_sum(index) for index in SPLITS[split]])


def _sum(index: int) -> Task:
    rng = random.Random(index)
    a, b = rng.randint(10, 99), rng.randint(10, 99)
    question = f"What is {a} + {b}? Answer with the number only."
    return Task.from_prompt(f"sum-{index}", question, label=str(a + b))
