"""Number puzzles that are long by hand and short in Python, drawn from a seed, each with a program that solves it."""

from __future__ import annotations

import functools
import math
import random
from collections.abc import Callable
from dataclasses import dataclass


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
