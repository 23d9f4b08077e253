"""PythonTool: questions that are answered with the help of a Python interpreter (ReTool, arXiv 2504.11536).

They are number puzzles, long by hand and short in Python, drawn from a seed, each with a program that solves it.
"""

from __future__ import annotations

import functools
import math
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from polyturn.envs.messages import AssistantMessage, ListTasks, Message, Script, Task, TaskSource, known_split
from polyturn.envs.rewards.math import verify
from polyturn.envs.rewards.math.extract import extract
from polyturn.envs.tool_env import ToolEnv
from polyturn.tools.python import PythonTool, SharedSandboxes
from polyturn.tools.sandbox import BackendName, Limits
from polyturn.tools.types import ToolCall, ToolSpec


@dataclass(frozen=True, kw_only=True, slots=True)
class Puzzle:
    """A question with a whole number for an answer."""

    question: str
    answer: int
    program: str
    """Python that prints the answer."""


def make_puzzle(rng: random.Random) -> Puzzle:
    """One puzzle; the answer is computed here, without running `program`."""
    return rng.choice(_FAMILIES)(rng)


def _digit_sum(rng: random.Random) -> Puzzle:
    base, exponent = rng.randint(12, 99), rng.randint(60, 200)
    return Puzzle(
        question=f"What is the sum of the decimal digits of {base}^{exponent}?",
        answer=sum(map(int, str(base**exponent))),
        program=f"print(sum(map(int, str({base}**{exponent}))))",
    )


def _multiples(rng: random.Random) -> Puzzle:
    a, b, c = rng.sample([3, 4, 5, 6, 7, 8, 9, 10, 11, 13], 3)
    top = rng.randint(2_000, 20_000)
    numbers = [n for n in range(1, top + 1) if (n % a == 0 or n % b == 0) and n % c != 0]
    return Puzzle(
        question=f"How many whole numbers from 1 to {top} are divisible by {a} or by {b}, but not by {c}?",
        answer=len(numbers),
        program=f"print(sum((n % {a} == 0 or n % {b} == 0) and n % {c} != 0 for n in range(1, {top + 1})))",
    )


def _recurrence(rng: random.Random) -> Puzzle:
    p, q, modulus = rng.randint(2, 9), rng.randint(2, 9), rng.choice([997, 1009, 9973, 10007])
    first, second, index = rng.randint(1, 9), rng.randint(1, 9), rng.randint(200, 900)
    a, b = first, second
    for _ in range(index - 1):
        a, b = b, (p * b + q * a) % modulus
    return Puzzle(
        question=(
            f"A sequence begins with a(1) = {first} and a(2) = {second}, and goes on with "
            f"a(n) = {p} a(n-1) + {q} a(n-2). What is the remainder of a({index}) on division by {modulus}?"
        ),
        answer=a % modulus,
        program=(
            f"a, b = {first}, {second}\nfor _ in range({index - 1}):\n    a, b = b, {p} * b + {q} * a\n"
            f"print(a % {modulus})"
        ),
    )


def _primes(rng: random.Random) -> Puzzle:
    low = rng.randint(500, 5_000)
    high = low + rng.randint(300, 1_500)
    primes = [n for n in range(low, high + 1) if all(n % d for d in _small_primes() if d * d <= n)]
    return Puzzle(
        question=f"What is the sum of all prime numbers from {low} to {high}?",
        answer=sum(primes),
        program=(
            f"print(sum(n for n in range({low}, {high + 1}) if all(n % d for d in range(2, int(n**0.5) + 1))))"
        ),
    )


def _collatz(rng: random.Random) -> Puzzle:
    top = rng.randint(300, 1_500)
    return Puzzle(
        question=(
            "Halve a number that is even, and take three times it plus 1 of one that is odd, until it is 1. Which "
            f"number from 1 to {top} takes the most steps? (Of several, the smallest.)"
        ),
        answer=max(range(1, top + 1), key=lambda n: (_num_steps(n), -n)),
        program=(
            "def steps(n):\n    count = 0\n    while n != 1:\n        n = n // 2 if n % 2 == 0 else 3 * n + 1\n"
            f"        count += 1\n    return count\nprint(max(range(1, {top + 1}), key=lambda n: (steps(n), -n)))"
        ),
    )


@functools.cache
def _num_steps(n: int) -> int:
    return 0 if n == 1 else 1 + _num_steps(n // 2 if n % 2 == 0 else 3 * n + 1)


@functools.cache
def _small_primes() -> tuple[int, ...]:
    return tuple(n for n in range(2, 100) if all(n % d for d in range(2, math.isqrt(n) + 1)))


_FAMILIES: tuple[Callable[[random.Random], Puzzle], ...] = (
    _digit_sum,
    _multiples,
    _recurrence,
    _primes,
    _collatz,
)


SYSTEM_PROMPT = (
    "Solve the problem. You can run Python with the tool; variables stay from one call to the next. "
    r"End with the answer in \boxed{}."
)
SIZES = {"train": 500, "heldout": 100}


class PythonToolEnv(ToolEnv):
    """Mathematical questions, with a stateful Python interpreter in a sandbox of the episode's own.

    The reward is `correct`: 1.0 if the last box of the answer holds what equals the label, else 0.0; it is graded
    outside the sandbox, so nothing that the code does there counts.
    """

    def __init__(
        self,
        *,
        tasks_seed: int = 1,
        timeout_s: float = 5.0,
        backend: BackendName = "auto",
        limits: Limits | None = None,
        split: str = "train",
        max_turns: int | None = 6,
        tasks: TaskSource | None = None,
        render_mode: str | None = None,
    ) -> None:
        r"""
        Args:
            tasks_seed: Which puzzles; the same seed gives the same ones.
            timeout_s: Seconds for one call of the tool.
            backend: Of the sandbox.
            limits: Of the sandbox.
            split: `train` or `heldout`.
            max_turns: Calls and the answer together.
            tasks: Other questions; the label is the answer, as text or number. Should ask for a `\boxed{}`.
            render_mode: None or "ansi".

        Raises:
            ValueError: a split that does not exist, or limits that cannot be.
        """
        if not timeout_s > 0:
            raise ValueError(f"timeout_s must be above 0, not {timeout_s}")
        known_split(split, SIZES)
        self.tasks_seed = tasks_seed
        self.sandboxes = SharedSandboxes(backend)
        super().__init__(
            tools=[PythonTool.using(sandboxes=self.sandboxes, timeout_s=timeout_s, limits=limits)],
            tasks=tasks,
            split=split,
            max_turns=max_turns,
            render_mode=render_mode,
        )

    def tasks(self, split: str) -> TaskSource:
        """The puzzles of `train` or `heldout`, or the tasks given to the constructor."""
        return (
            self._given_tasks
            if self._given_tasks is not None
            else puzzle_tasks(self.tasks_seed, known_split(split, SIZES))
        )

    def grade(self, message: AssistantMessage) -> Mapping[str, float]:
        """Whether the boxed answer equals the label."""
        self.state_of(
            PythonTool
        ).close()  # the episode is over: do not hold its interpreter until the next one
        return {"correct": verify(str(self.task.label), message.content, mode="box_only").score()}

    def answer_of(self, message: AssistantMessage) -> str | None:
        """What stands in the box."""
        return extract(message.content, box_only=True)

    def oracle(self, messages: Sequence[Message], tools: Sequence[ToolSpec]) -> AssistantMessage:  # type: ignore[override]
        """Runs the task's own program, and answers with what it prints."""
        del tools
        if messages[-1]["role"] != "tool":
            arguments = {"code": self.task.metadata["program"]}
            return AssistantMessage(tool_calls=(ToolCall(id="call_0", name="python", arguments=arguments),))
        return AssistantMessage(content=rf"The answer is \boxed{{{messages[-1]['content'].strip()}}}.")

    def random_policy(self, seed: int) -> Script:
        """Runs nothing of use and guesses a number."""
        rng = random.Random(seed)

        def script(messages: Sequence[Message], tools: Sequence[ToolSpec]) -> AssistantMessage:
            del messages, tools
            number = rng.randint(0, 999)
            if rng.random() < 0.5:
                arguments = {"code": f"x = {number}\nprint(x)"}
                return AssistantMessage(
                    tool_calls=(ToolCall(id="call_0", name="python", arguments=arguments),)
                )
            return AssistantMessage(content=rf"\boxed{{{number}}}")

        return script

    def close(self) -> None:
        """Free the sandboxes."""
        super().close()
        self.sandboxes.close()


@functools.lru_cache(maxsize=4)
def puzzle_tasks(seed: int, split: str) -> ListTasks:
    """The puzzles of one split; no question is in both."""
    rng = random.Random(f"puzzles {seed}")
    questions: set[str] = set()
    tasks: dict[str, list[Task]] = {name: [] for name in SIZES}
    for name, size in SIZES.items():
        while len(tasks[name]) < size:
            puzzle = make_puzzle(rng)
            if puzzle.question in questions:
                continue
            questions.add(puzzle.question)
            tasks[name].append(
                Task(
                    task_id=f"{name}-{len(tasks[name])}",
                    messages=(
                        {"role": "system", "content": SYSTEM_PROMPT},
                        {"role": "user", "content": puzzle.question},
                    ),
                    label=str(puzzle.answer),
                    metadata={"program": puzzle.program},
                )
            )
    return ListTasks(tasks[split])
