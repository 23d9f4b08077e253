"""Where the problems come from: files of problems and answers, GSM8K, and problems made from a seed.

Those in symbols have answers in LaTeX: numbers, fractions, radicals, sets, intervals, pairs. Those in words are in
`word_problems`. Where a problem comes with a worked solution, its task has it as the metadata `solution`.
"""

from __future__ import annotations

import functools
import hashlib
import math
import random
from collections.abc import Callable
from fractions import Fraction
from importlib import resources
from pathlib import Path
from typing import Any, Literal

from polyturn.envs.border import read_rows
from polyturn.envs.math.word_problems import make_word_problem
from polyturn.envs.messages import ListTasks, Task, known_split
from polyturn.envs.rewards.math.extract import gold_answer

MAX_PROBLEMS = 20_000
"""Of both splits; there are many more, but not of every kind."""

Problem = tuple[str, str]
"""A problem and its answer."""
Made = Literal["symbols", "words"]
"""What problems that are made from a seed are written in."""


def make_problem(rng: random.Random) -> Problem:
    """One problem of a random kind."""
    return rng.choice(_KINDS)(rng)


@functools.lru_cache(maxsize=8)
def make_problems(seed: int, num_train: int, num_heldout: int) -> dict[str, tuple[Problem, ...]]:
    """Different problems for the splits `train` and `heldout`; none is in both.

    Raises:
        ValueError: more than `MAX_PROBLEMS`.
    """
    _check_sizes(num_train, num_heldout)
    rng = random.Random(f"math-{seed}")
    found: dict[str, str] = {}
    while len(found) < num_train + num_heldout:
        problem, answer = make_problem(rng)
        found.setdefault(problem, answer)
    problems = tuple(found.items())
    return {"train": problems[:num_train], "heldout": problems[num_train:]}


@functools.lru_cache(maxsize=8)
def make_word_tasks(seed: int, num_train: int, num_heldout: int, split: str, system_prompt: str) -> ListTasks:
    """Different problems in words, with their solutions; none is in both splits. Raises as `make_problems`."""
    _check_sizes(num_train, num_heldout)
    rng = random.Random(f"words-{seed}")
    found: dict[str, tuple[str, str]] = {}
    while len(found) < num_train + num_heldout:
        problem = make_word_problem(rng)
        found.setdefault(problem.text, (problem.answer, problem.solution))
    problems = list(found.items())
    chosen = problems[:num_train] if split == "train" else problems[num_train:]
    return ListTasks(
        [
            _task(f"{split}-{index}", text, answer, system_prompt, solution)
            for index, (text, (answer, solution)) in enumerate(chosen)
        ]
    )


def _check_sizes(num_train: int, num_heldout: int) -> None:
    if num_train + num_heldout > MAX_PROBLEMS:
        raise ValueError(
            f"there are no {num_train + num_heldout} different problems; ask for up to {MAX_PROBLEMS}"
        )


def _arithmetic(rng: random.Random) -> Problem:
    a, b, c = rng.randint(12, 99), rng.randint(2, 19), rng.randint(100, 999)
    return f"Compute ${a} \\cdot {b} - {c}$.", str(a * b - c)


def _fractions(rng: random.Random) -> Problem:
    b, d = rng.sample(range(2, 13), 2)
    a, c = rng.randint(1, b - 1), rng.randint(1, d - 1)
    value = Fraction(a, b) + Fraction(c, d)
    return f"Write $\\frac{{{a}}}{{{b}}} + \\frac{{{c}}}{{{d}}}$ as a single fraction.", _latex(value)


def _percent(rng: random.Random) -> Problem:
    percent, whole = rng.randrange(5, 100, 5), rng.randrange(20, 2000, 20)
    return f"What is {percent}\\% of {whole}?", _latex(Fraction(percent * whole, 100))


def _linear(rng: random.Random) -> Problem:
    a, b, c = rng.randint(2, 12), rng.randint(-20, 20), rng.randint(-20, 20)
    return f"Solve ${a}x {b:+d} = {c}$ for $x$.", f"x={_latex(Fraction(c - b, a))}"


def _quadratic(rng: random.Random) -> Problem:
    first, second = rng.sample([n for n in range(-12, 13) if n], 2)
    return (
        f"Find all solutions of $x^2 {-(first + second):+d}x {first * second:+d} = 0$.",
        f"\\{{{min(first, second)}, {max(first, second)}\\}}",
    )


def _radical(rng: random.Random) -> Problem:
    outside, inside = rng.randint(2, 12), rng.choice((2, 3, 5, 6, 7, 10, 11, 13))
    return f"Simplify $\\sqrt{{{outside**2 * inside}}}$.", f"{outside}\\sqrt{{{inside}}}"


def _inequality(rng: random.Random) -> Problem:
    a, b, bound = rng.randint(2, 9), rng.randint(-20, 20), rng.randint(-15, 15)
    return (
        f"For which real $x$ is ${a}x {b:+d} \\le {a * bound + b}$? Answer with an interval.",
        f"(-\\infty, {bound}]",
    )


def _vertex(rng: random.Random) -> Problem:
    x, y = rng.randint(-9, 9), rng.randint(-30, 30)
    return (
        f"Find the vertex $(x, y)$ of the parabola $y = x^2 {-2 * x:+d}x {x * x + y:+d}$.",
        f"({x}, {y})",
    )


def _divisor(rng: random.Random) -> Problem:
    common = rng.randint(3, 30)
    a, b = common * rng.randint(2, 30), common * rng.randint(2, 30)
    return f"What is the greatest common divisor of {a} and {b}?", str(math.gcd(a, b))


def _expand(rng: random.Random) -> Problem:
    a, b = rng.sample([n for n in range(-9, 10) if n], 2)
    return f"Expand $(x {a:+d})(x {b:+d})$.", f"x^2 {a + b:+d}x {a * b:+d}"


_KINDS: tuple[Callable[[random.Random], Problem], ...] = (
    _arithmetic,
    _fractions,
    _percent,
    _linear,
    _quadratic,
    _radical,
    _inequality,
    _vertex,
    _divisor,
    _expand,
)


def _latex(value: Fraction) -> str:
    if value.denominator == 1:
        return str(value.numerator)
    return f"{'-' if value < 0 else ''}\\frac{{{abs(value.numerator)}}}{{{value.denominator}}}"


SPLITS = ("train", "heldout")
_ALIASES = {"test": "heldout"}
_PROBLEM_KEYS = ("problem", "question", "prompt")
_ANSWER_KEYS = ("answer", "final_answer", "solution")


def check_split(split: str) -> str:
    """The split's own name; `test` is another name of `heldout`.

    Raises:
        ValueError: there is no such split.
    """
    return known_split(_ALIASES.get(split, split), SPLITS)


@functools.lru_cache(maxsize=16)
def file_tasks(path: str, split: str, system_prompt: str, heldout_fraction: float) -> ListTasks:
    """The problems of a JSONL or Parquet file, or of `train.jsonl` and `test.jsonl` in a folder.

    Of a single file, a share of `heldout_fraction` is held out, chosen by a hash of the problem: the same whatever the
    order of the rows.

    Raises:
        ValueError: `path:line: ...` for a row that cannot be read; no such file; a split without a problem.
    """
    where = Path(path)
    if where.is_dir():
        names = ("train.jsonl",) if split == "train" else ("test.jsonl", "heldout.jsonl")
        found = next((where / name for name in names if (where / name).is_file()), None)
        if found is None:
            raise ValueError(f"{where}: the folder has no {' or '.join(names)}")
        tasks = _read(found, system_prompt)
    else:
        tasks = [
            task
            for task in _read(where, system_prompt)
            if _held_out(task.messages[-1]["content"], heldout_fraction) == (split == "heldout")
        ]
    if not tasks:
        raise ValueError(f"{where}: no problem is in the split {split!r}; give another heldout_fraction")
    return ListTasks(tasks)


@functools.lru_cache(maxsize=16)
def whole_file(path: str, system_prompt: str) -> ListTasks:
    """All problems of a JSONL or Parquet file. Raises as `file_tasks`."""
    tasks = _read(Path(path), system_prompt)
    if not tasks:
        raise ValueError(f"{path}: the file holds no problem")
    return ListTasks(tasks)


@functools.lru_cache(maxsize=16)
def gsm8k_sample(split: str, system_prompt: str) -> ListTasks:
    """Some problems of GSM8K (arXiv 2110.14168) that come with the package."""
    name = {"train": "gsm8k_train.jsonl", "heldout": "gsm8k_test.jsonl"}[split]
    with resources.as_file(resources.files("polyturn.envs.math") / "data" / name) as path:
        return ListTasks(_read(path, system_prompt))


@functools.lru_cache(maxsize=16)
def generated_tasks(seed: int, num_train: int, num_heldout: int, split: str, system_prompt: str) -> ListTasks:
    """Problems made from a seed. Raises as `make_problems`."""
    problems = make_problems(seed, num_train, num_heldout)[split]
    return ListTasks(
        [_task(f"{split}-{index}", *problem, system_prompt) for index, problem in enumerate(problems)]
    )


def _read(path: Path, system_prompt: str) -> list[Task]:
    tasks: list[Task] = []
    for number, row in read_rows(path, "problem"):
        where = f"{path}:{number}"
        problem = _field(row, _PROBLEM_KEYS, where)
        told = _field(row, _ANSWER_KEYS, where)
        answer = gold_answer(told).strip()
        if not answer:
            raise ValueError(f"{where}: the answer is empty")
        solution = told if "####" in told else None
        tasks.append(_task(f"{path.stem}-{number}", problem, answer, system_prompt, solution))
    return tasks


def _field(row: dict[str, Any], keys: tuple[str, ...], where: str) -> str:
    for key in keys:
        if key in row:
            value = row[key]
            if isinstance(value, bool) or not isinstance(value, str | int | float):
                raise ValueError(f"{where}: {key!r} must be a text or a number, not {type(value).__name__}")
            return str(value)
    raise ValueError(f"{where}: missing key {keys[0]!r}; the keys are {', '.join(row) or 'none'}")


def _task(task_id: str, problem: str, answer: str, system_prompt: str, solution: str | None = None) -> Task:
    return Task(
        task_id=task_id,
        messages=({"role": "system", "content": system_prompt}, {"role": "user", "content": problem}),
        label=answer,
        metadata={} if solution is None else {"solution": solution},
    )


def _held_out(problem: str, fraction: float) -> bool:
    digest = hashlib.blake2b(problem.encode(), digest_size=8).digest()
    return int.from_bytes(digest) < fraction * 2**64
