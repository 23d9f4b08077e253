"""SolveCritiqueSelect: solvers answer a problem, critics judge the answers, a selector picks one; one policy is all."""

from __future__ import annotations

import functools
import random
import re
from collections.abc import Mapping, Sequence

from polyturn.envs.messages import (
    AssistantMessage,
    ListTasks,
    Message,
    Script,
    Task,
    TaskSource,
    known_split,
    script_of,
)
from polyturn.envs.tool_env import ToolEnv
from polyturn.tools.types import ToolSpec

SPLITS = ("train", "heldout")
NUM_TASKS = 500
MAX_SHOWN = 2000
"""Characters of one agent's message that others are shown."""

_PROMPTS = {
    "solver": "Solve the problem. Think as long as you like; the last line of your message is the number alone.",
    "critic": (
        "Check the solution of the problem. "
        "The last line of your message is the word right or the word wrong alone."
    ),
    "selector": (
        "Pick the best solution of the problem. The last line of your message is its number alone, counted from 1."
    ),
}
_NUMBER = re.compile(r"-?\d{1,12}\Z")


class SolveCritiqueSelectEnv(ToolEnv):
    """One problem, several roles, one policy behind all of them.

    `solver/0`, `solver/1`, ... answer on their own; `critic/0`, ... each judge one solution; `selector` sees all
    solutions and verdicts and picks one. Each role sees what is addressed to it only, and has a ledger of its own.
    The episode's reward is 1.0 when the picked solution is right. In training a solver earns 1.0 for a right answer, a
    critic for a right verdict, the selector for a right pick.
    """

    def __init__(
        self,
        *,
        num_solvers: int = 2,
        split: str = "train",
        max_turns: int | None = None,
        tasks: TaskSource | None = None,
        render_mode: str | None = None,
    ) -> None:
        """
        Args:
            num_solvers: Solvers, and as many critics.
            split: `train` or `heldout`.
            max_turns: Messages of all roles together; None leaves limits to the caller.
            tasks: Take the place of the generated problems; the label is a whole number.
            render_mode: None or "ansi".

        Raises:
            ValueError: an unknown split, or fewer than one solver.
        """
        if num_solvers < 1:
            raise ValueError(f"num_solvers must be at least 1, not {num_solvers}")
        known_split(split, SPLITS)
        self.num_solvers = num_solvers
        self._order = (
            *(f"solver/{index}" for index in range(num_solvers)),
            *(f"critic/{index}" for index in range(num_solvers)),
            "selector",
        )
        super().__init__(tasks=tasks, split=split, max_turns=max_turns, render_mode=render_mode)

    def tasks(self, split: str) -> TaskSource:
        """The problems of `train` or `heldout`, or the tasks given to the constructor."""
        return self._given_tasks if self._given_tasks is not None else problems(known_split(split, SPLITS))

    def begin(self, task: Task) -> Sequence[Message]:
        """The first solver's prompt."""
        self._said: dict[str, str] = {}
        self._problem = "\n".join(m["content"] for m in task.messages if m["role"] == "user")
        return self._address(self._order[0])

    def follow_up(self, message: AssistantMessage) -> Sequence[Message]:
        """The prompt of the next role; nothing after the selector's message."""
        self._said[self.role] = message.content
        position = len(self._said)
        return self._address(self._order[position]) if position < len(self._order) else ()

    def grade(self, message: AssistantMessage) -> Mapping[str, float]:
        """1.0 for the pick of a right solution; the rewards of all roles beside it."""
        del message
        right = [self._is_right(index) for index in range(self.num_solvers)]
        for index, is_right in enumerate(right):
            self.role_rewards[f"solver/{index}"] = float(is_right)
            verdict = {"right": True, "wrong": False}.get(last_line(self._said[f"critic/{index}"]).lower())
            self.role_rewards[f"critic/{index}"] = float(verdict is is_right)
        pick = last_line(self._said["selector"])
        picked = int(pick) - 1 if re.fullmatch(r"\d{1,4}", pick, re.ASCII) else -1
        reward = float(0 <= picked < self.num_solvers and right[picked])
        self.role_rewards["selector"] = reward
        self.metrics["any_right"] = float(any(right))
        return {"picked_right": reward}

    def oracle(self, messages: Sequence[Message], tools: Sequence[ToolSpec]) -> AssistantMessage:
        """Solves right, finds every solution right, and picks the first."""
        del messages, tools
        answers = {"solver": str(self.task.label), "critic": "right", "selector": "1"}
        return AssistantMessage(content=answers[self.role.partition("/")[0]])

    def random_policy(self, seed: int) -> Script:
        """Answers with a small number or a verdict at random."""
        rng = random.Random(seed)
        verdicts = ("right", "wrong")
        return script_of(lambda: AssistantMessage(content=rng.choice((*verdicts, str(rng.randint(0, 99))))))

    def _address(self, role: str) -> list[Message]:
        self.role = role
        kind, _, index = role.partition("/")
        parts = [f"Problem: {self._problem}"]
        if kind == "critic":
            parts.append(f"Solution: {self._shown(f'solver/{index}')}")
        if kind == "selector":
            parts += [
                f"Solution {number + 1}: {self._shown(f'solver/{number}')}\n"
                f"Verdict on solution {number + 1}: {self._shown(f'critic/{number}')}"
                for number in range(self.num_solvers)
            ]
        return [
            {"role": "system", "content": _PROMPTS[kind]},
            {"role": "user", "content": "\n\n".join(parts)},
        ]

    def _shown(self, role: str) -> str:
        text = self._said[role]
        return text if len(text) <= MAX_SHOWN else f"... {text[-MAX_SHOWN:]}"

    def _is_right(self, index: int) -> bool:
        answer = last_line(self._said[f"solver/{index}"])
        return bool(_NUMBER.match(answer)) and int(answer) == int(self.task.label)


def last_line(text: str) -> str:
    """The last line that is not empty, without the white space around it."""
    return next((line.strip() for line in reversed(text.splitlines()) if line.strip()), "")


@functools.lru_cache(maxsize=4)
def problems(split: str) -> ListTasks:
    """The generated problems of one split: sums, differences and products of small numbers."""
    tasks: list[Task] = []
    seen: set[str] = set()
    rng = random.Random(f"solve-critique-select/{split}")
    first = {"train": 0, "heldout": 1}[split]
    while len(tasks) < NUM_TASKS:
        a, b, c = (rng.randint(2, 99) for _ in range(3))
        text, value = rng.choice(
            (
                (f"{a} + {b} * {c}", a + b * c),
                (f"{a} * {b} - {c}", a * b - c),
                (f"({a} - {b}) * {c}", (a - b) * c),
            )
        )
        # Even sums of the operands are trained on, odd ones are held out: no problem is in both splits.
        if text in seen or (a + b + c) % len(SPLITS) != first:
            continue
        seen.add(text)
        tasks.append(Task.from_prompt(f"{split}-{len(tasks)}", f"What is {text}?", label=value))
    return ListTasks(tasks)
