"""Problems made from a seed, with answers in LaTeX: numbers, fractions, radicals, sets, intervals, pairs."""

from __future__ import annotations

import functools
import math
import random
from collections.abc import Callable
from fractions import Fraction

MAX_PROBLEMS = 20_000
"""Of both splits; there are many more, but not of every kind."""

Problem = tuple[str, str]
"""A problem and its answer."""


def make_problem(rng: random.Random) -> Problem:
    """One problem of a random kind."""
    return rng.choice(_KINDS)(rng)


@functools.lru_cache(maxsize=8)
def make_problems(seed: int, num_train: int, num_heldout: int) -> dict[str, tuple[Problem, ...]]:
    """Different problems for the splits `train` and `heldout`; none is in both.

    Raises:
        ValueError: more than `MAX_PROBLEMS`.
    """
    if num_train + num_heldout > MAX_PROBLEMS:
        raise ValueError(
            f"there are no {num_train + num_heldout} different problems; ask for up to {MAX_PROBLEMS}"
        )
    rng = random.Random(f"math-{seed}")
    found: dict[str, str] = {}
    while len(found) < num_train + num_heldout:
        problem, answer = make_problem(rng)
        found.setdefault(problem, answer)
    problems = tuple(found.items())
    return {"train": problems[:num_train], "heldout": problems[num_train:]}


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
