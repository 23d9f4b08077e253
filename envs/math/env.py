"""Mathematics: a problem, perhaps a calculator, perhaps further attempts, and an answer that the verifier checks.

The calculator reads arithmetic with the verifier's own bounded parser, and evaluates no text.
"""

from __future__ import annotations

import random
import re
from collections.abc import Mapping, Sequence
from fractions import Fraction
from typing import Any, Literal, get_args

from polyturn.envs.faults import EnvironmentFault
from polyturn.envs.math.tasks import (
    Made,
    check_split,
    file_tasks,
    generated_tasks,
    gsm8k_sample,
    make_word_tasks,
    whole_file,
)
from polyturn.envs.messages import AssistantMessage, Message, Script, Task, TaskSource
from polyturn.envs.rewards.math import MathVerifier, Verdict, gold_texts, shared_verifier, unpayable_reason
from polyturn.envs.rewards.math.equality import Doubles, Evaluator
from polyturn.envs.rewards.math.terms import Term, exact, parse, variables
from polyturn.envs.rewards.math.tokens import lex, normalise
from polyturn.envs.rewards.math.verdict import NotRational, TooLarge, Undefined, Unreadable
from polyturn.envs.tool_env import ToolEnv
from polyturn.tools.tool import tool
from polyturn.tools.types import ToolCall, ToolError, ToolSpec

MAX_CHARACTERS = 500
MAX_DIGITS = 40
"""Of a whole number that is written out."""


@tool(name="calculator")
def calculator_tool(expression: str) -> str:
    """Evaluate arithmetic: + - * / ^ parentheses, fractions, percentages, sqrt, factorials, sin, cos, tan, ln, log, pi.

    Args:
        expression: What to evaluate, for example (48 + 24) * 3 / 2 or sqrt(2)^2.
    """
    return calculate(expression)


def calculate(expression: str) -> str:
    """The value of an expression as text: exact where it is rational.

    Raises:
        ToolError: it cannot be read, has no value, or is too large.
    """
    if len(expression) > MAX_CHARACTERS:
        raise ToolError(f"the expression is longer than {MAX_CHARACTERS} characters")
    try:
        term = parse(lex(normalise(expression).rstrip(" =")))
        if names := variables(term):
            raise ToolError(f"{min(names)!r} has no value: the calculator knows numbers only")
        return _spelled(term)
    except Unreadable as error:
        raise ToolError(
            f"the expression cannot be read: {error}; write for example (48 + 24) * 3 / 2"
        ) from error
    except (Undefined, ZeroDivisionError) as error:
        raise ToolError(f"the expression has no value: {error}") from error
    except (TooLarge, OverflowError) as error:
        raise ToolError("the numbers become too large") from error


def _spelled(term: Term) -> str:
    try:
        return _fraction(exact(term, {}))
    except NotRational:
        pass
    value = Evaluator(Doubles(), base_ten=True).value(term, {})
    if isinstance(value, complex):
        raise ToolError("the value is not a real number")
    return f"{value:.12g}"


def _fraction(value: Fraction) -> str:
    """A whole number, a decimal that ends, or a fraction with its decimal approximation."""
    if max(abs(value.numerator), value.denominator) >= 10**MAX_DIGITS:
        return f"{float(value):.12g}"
    if value.denominator == 1:
        return str(value.numerator)
    rest = value.denominator
    for prime in (2, 5):
        while rest % prime == 0:
            rest //= prime
    decimal = f"{float(value):.12g}"
    return decimal if rest == 1 and Fraction(decimal) == value else f"{value} (about {decimal})"


AnswerFormat = Literal["boxed", "any"]
_ENDINGS: Mapping[AnswerFormat, str] = {
    "boxed": "Put your final answer in \\boxed{}.",
    "any": "End with a line that has #### and then your final answer.",
}
_CALCULATOR_TURNS = 8
_CALCULATION = re.compile(r"<<([^<>=]+)=[^<>]*>>")
"""As GSM8K's solutions mark one: `48/2=<<48/2=24>>24`."""
_MARKS = re.compile(r"<<[^<>]*>>")


class MathEnv(ToolEnv):
    """Answer a problem. The reward is 1.0 for an answer that equals the gold answer, in whatever form, else 0.0.

    With `max_attempts` above 1 a wrong answer is told to be wrong and may be mended; the k-th attempt earns
    `attempt_decay ** (k - 1)`. How the last verdict came about is a metric, `verdict_<reason>`: what costs too much to
    compare is `verdict_too_costly`. A verdict that says nothing about the answer is a fault, and no zero.
    """

    is_replayable = True

    def __init__(
        self,
        *,
        path: str | None = None,
        heldout_path: str | None = None,
        heldout_fraction: float = 0.1,
        made: Made = "symbols",
        seed: int = 0,
        num_problems: int = 500,
        num_heldout: int = 200,
        split: str = "train",
        answer_format: AnswerFormat = "boxed",
        calculator: bool = False,
        max_attempts: int = 1,
        attempt_decay: float = 1.0,
        system_prompt: str | None = None,
        max_turns: int | None = None,
        tasks: TaskSource | None = None,
        verifier: MathVerifier | None = None,
        render_mode: str | None = None,
    ) -> None:
        """
        Args:
            path: A JSONL or Parquet file of rows with `problem` (or `question`) and `answer` (or a `solution` with a
                box), or a folder with `train.jsonl` and `test.jsonl`. None: problems made from `seed`.
            heldout_path: A file all of which is held out; `path` is then a file all of which is trained on, or None.
            heldout_fraction: The share of a single file that is held out.
            made: What is made without a file: problems in `symbols`, or in `words` as GSM8K's, with solutions.
            seed: Which problems are made.
            num_problems: How many are made for `train`.
            num_heldout: How many are made for `heldout`.
            split: `train` or `heldout` (also called `test`).
            answer_format: `boxed`: only a box counts; `any`: also `#### 42`, "the answer is 42" and the like.
            calculator: Whether there is a calculator tool.
            max_attempts: Answers that one may give.
            attempt_decay: What each further attempt multiplies the reward by, above 0 and up to 1.
            system_prompt: Takes the place of the one that fits the other options.
            max_turns: Truncate after so many messages; None: room for the attempts and eight calculations.
            tasks: Takes the place of all the above.
            verifier: None: the one that the process shares.
            render_mode: None or "ansi".

        Raises:
            ValueError: a value out of range, a split that does not exist, a file that cannot be read.
        """
        if max_attempts < 1:
            raise ValueError(f"max_attempts must be at least 1, not {max_attempts}")
        if not 0 < attempt_decay <= 1:
            raise ValueError(f"attempt_decay must be above 0 and at most 1, not {attempt_decay}")
        if not 0 < heldout_fraction < 1:
            raise ValueError(f"heldout_fraction must be between 0 and 1, not {heldout_fraction}")
        if answer_format not in get_args(AnswerFormat):
            raise ValueError(
                f"answer_format must be {' or '.join(get_args(AnswerFormat))}, not {answer_format!r}"
            )
        if made not in get_args(Made):
            raise ValueError(f"made must be {' or '.join(get_args(Made))}, not {made!r}")
        if min(num_problems, num_heldout) < 1:
            raise ValueError("num_problems and num_heldout must be at least 1")
        turns = max_attempts + (_CALCULATOR_TURNS if calculator else 1) if max_turns is None else max_turns
        super().__init__(
            tools=[calculator_tool] if calculator else [],
            tasks=tasks,
            split=check_split(split),
            max_turns=turns,
            render_mode=render_mode,
        )
        self._num_calculations = turns - max_attempts
        self.system_prompt = system_prompt or _system_prompt(answer_format, calculator)
        self._path, self._heldout_path, self._heldout_fraction = path, heldout_path, heldout_fraction
        self._made, self._seed, self._sizes = made, seed, (num_problems, num_heldout)
        self._mode: Literal["box_only", "text"] = "box_only" if answer_format == "boxed" else "text"
        self._max_attempts, self._attempt_decay = max_attempts, attempt_decay
        self._verifier = verifier
        self._num_attempts = 0
        self._verdict: Verdict | None = None

    def tasks(self, split: str) -> TaskSource:
        """The problems of `train` or `heldout`."""
        split = check_split(split)
        if self._given_tasks is not None:
            return self._given_tasks
        if self._heldout_path is not None:
            file = self._path if split == "train" else self._heldout_path
            if file is None:
                raise ValueError(f"there is no split {split!r}: give a file of it as path=")
            return whole_file(str(file), self.system_prompt)
        if self._path is not None:
            return file_tasks(str(self._path), split, self.system_prompt, self._heldout_fraction)
        return self._own_tasks(split)

    def _own_tasks(self, split: str) -> TaskSource:
        """The problems where no file is given."""
        make = make_word_tasks if self._made == "words" else generated_tasks
        return make(self._seed, *self._sizes, split, self.system_prompt)

    def begin(self, task: Task) -> Sequence[Message]:
        self._num_attempts, self._verdict = 0, None
        gold_texts(task.label)
        return task.messages

    def check_label(self, label: Any) -> None:
        """Raise `ValueError` for a label that no answer can be paid for."""
        if reason := unpayable_reason(label):
            raise ValueError(reason)

    def follow_up(self, message: AssistantMessage) -> Sequence[Message]:
        """Judges the answer; a wrong one with attempts left is told so."""
        self._num_attempts += 1
        verifier = self._verifier or shared_verifier()
        self._verdict = verdict = verifier.verify(self.task.label, message.content, mode=self._mode)
        if not verdict.decided:
            raise EnvironmentFault(
                f"{self.env_id}: the answer to task {self.task.task_id!r} could not be compared with the label: "
                f"{verdict.reason}"
            ).of("grade")
        if verdict.correct or self._num_attempts >= self._max_attempts:
            return ()
        left = self._max_attempts - self._num_attempts
        return (
            {"role": "user", "content": f"{_FEEDBACK.get(verdict.reason, _WRONG)} {_attempts_left(left)}"},
        )

    def grade(self, message: AssistantMessage) -> Mapping[str, float]:
        """What the last attempt earned."""
        del message
        assert self._verdict is not None
        self.metrics["attempts"] = float(self._num_attempts)
        self.metrics[f"verdict_{self._verdict.reason}"] = 1.0
        earned = self._attempt_decay ** (self._num_attempts - 1) if self._verdict.correct else 0.0
        return {"correct": earned}

    def answer_of(self, message: AssistantMessage) -> str | None:
        """What was taken from the last attempt to be compared."""
        del message
        return None if self._verdict is None else self._verdict.extracted

    def oracle(  # type: ignore[override]
        self, messages: Sequence[Message], tools: Sequence[ToolSpec]
    ) -> AssistantMessage:
        """Gives the task's answer, behind its worked solution or that solution's calculations where it has one."""
        solution, gold = self.task.metadata.get("solution", ""), gold_texts(self.task.label)[0]
        expressions = _CALCULATION.findall(solution) if tools else []
        num_made = sum(message["role"] == "tool" for message in messages)
        if num_made < min(len(expressions), self._num_calculations):
            arguments = {"expression": expressions[num_made].strip()}
            call = ToolCall(id=f"call_{num_made}", name="calculator", arguments=arguments)
            return AssistantMessage(tool_calls=(call,))
        steps = "" if tools else _MARKS.sub("", solution.partition("####")[0])
        ending = f"The answer is \\boxed{{{gold}}}." if self._mode == "box_only" else f"#### {gold}"
        return AssistantMessage(content=steps + ending)

    def random_policy(self, seed: int) -> Script:
        """Gives whole numbers at random, now and then after a calculation."""
        rng = random.Random(seed)
        sample = super().random_policy(seed)

        def script(messages: Sequence[Message], tools: Sequence[ToolSpec]) -> AssistantMessage:
            if tools and rng.random() < 0.3:
                return sample(messages, tools)
            return AssistantMessage(content=f"\\boxed{{{rng.randrange(10_000)}}}")

        return script


class GSM8KEnv(MathEnv):
    """GSM8K (arXiv 2110.14168): school problems in words. A sample comes with the package; `path` names the whole.

    Takes the options of `MathEnv`; any form of answer counts by default.
    """

    is_replayable = True

    def __init__(self, *, answer_format: AnswerFormat = "any", **options: Any) -> None:
        super().__init__(answer_format=answer_format, **options)

    def _own_tasks(self, split: str) -> TaskSource:
        return gsm8k_sample(split, self.system_prompt)


def _system_prompt(answer_format: AnswerFormat, calculator: bool) -> str:
    how = "Think step by step"
    if calculator:
        how += ", and let the calculator do the arithmetic"
    return f"Solve the problem. {how}. {_ENDINGS[answer_format]}"


_FEEDBACK: Mapping[str, str] = {
    "no_answer": "There is no final answer in what you wrote.",
    "hedge": "Give one answer, not several.",
    **dict.fromkeys(
        ("too_costly", "too_large"), "Your answer is too large to be checked; write it in a simpler form."
    ),
}
_WRONG = "That is not the right answer."


def _attempts_left(left: int) -> str:
    return (
        "Try again; this is your last attempt." if left == 1 else f"Try again; you have {left} attempts left."
    )
