"""Expressions as trees, and their exact values: rational arithmetic with caps, no floating point."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

from polyturn.envs.rewards.math.verdict import NotRational, TooLarge, Undefined

MAX_DEPTH = 150
MAX_BITS = 20_000
"""Of numerators and denominators."""
MAX_ITERATIONS = 1_000
"""Of sums, products and factorials."""
MAX_STEPS = 50_000
"""Terms evaluated for one value."""


@dataclass(frozen=True, slots=True)
class Term:
    """An operator with its operands, a number, a variable or a constant.

    Operators: `num` (value), `var` and `const` (name: pi, e, i, inf), `add`, `mul`, `neg`, `div`, `pow`, `root`
    (radicand, index), `log` (argument, base), `fn` (name; arguments), `fact`, `binom`, `deg` (degrees to radians),
    `pct`, `pm` (choice of signs: a, b for a ± b), `sum` and `prod` (name of the index; first, last, body).
    """

    op: str
    args: tuple[Term, ...] = ()
    value: Fraction | None = None
    name: str = ""
    depth: int = 0


def make(op: str, *args: Term, name: str = "") -> Term:
    """A term over others.

    Raises:
        TooLarge: it is nested too deeply.
    """
    depth = 1 + max((arg.depth for arg in args), default=0)
    if depth > MAX_DEPTH:
        raise TooLarge("nested too deeply")
    return Term(op, args, None, name, depth)


def number(value: Fraction | int) -> Term:
    """A rational constant."""
    return Term("num", (), Fraction(value))


def variables(term: Term) -> frozenset[str]:
    """The names of the free variables."""
    if term.op == "var":
        return frozenset((term.name,))
    found: frozenset[str] = frozenset()
    for arg in term.args:
        found |= variables(arg)
    return found - {term.name} if term.op in ("sum", "prod") else found


def operators(term: Term) -> frozenset[str]:
    """All operators and function names in a term."""
    found = frozenset((term.op, term.name)) if term.op == "fn" else frozenset((term.op,))
    for arg in term.args:
        found |= operators(arg)
    return found


class Steps:
    """How many terms may still be evaluated: sums in sums take as many steps as all their rounds together.

    Args:
        left: So many terms.
        error: What is raised when they are used up.
    """

    def __init__(self, left: int = MAX_STEPS, error: Exception | None = None) -> None:
        self.left = left
        self._error = error or TooLarge("steps")

    def take(self) -> None:
        self.left -= 1
        if self.left < 0:
            raise self._error


def exact(term: Term, env: Mapping[str, Fraction], steps: Steps | None = None) -> Fraction:
    """The rational value of a term where its variables have the values of `env`.

    Raises:
        NotRational: it has none, or none that rational arithmetic finds.
        Undefined: it divides by zero, for example.
        TooLarge: a number on the way exceeds the caps, or there are too many `steps`.
    """
    op = term.op
    steps = steps or Steps()
    steps.take()
    if op == "num":
        assert term.value is not None
        return term.value
    if op == "var":
        if term.name not in env:
            raise NotRational(term.name)
        return env[term.name]
    if op in ("sum", "prod"):
        return _iterate(term, env, steps)
    if op in ("const", "deg", "pm"):
        raise NotRational(op)
    values = [exact(arg, env, steps) for arg in term.args]
    if op == "add":
        return _capped(_sum(values))
    if op == "mul":
        total = Fraction(1)
        for value in values:
            total = _capped(total * value)
        return total
    if op == "neg":
        return -values[0]
    if op == "pct":
        return values[0] / 100
    if op == "div":
        if values[1] == 0:
            raise Undefined("division by zero")
        return _capped(values[0] / values[1])
    return _function(term, values)


def _function(term: Term, values: list[Fraction]) -> Fraction:
    op = term.op
    if op == "pow":
        return power(values[0], values[1])
    if op == "root":
        return _root(values[0], values[1])
    if op == "log":
        return _log(values)
    if op == "fact":
        return Fraction(math.factorial(_count(values[0])))
    if op == "binom":
        chosen = _count(values[1])
        if values[0].denominator == 1 and values[0] >= 0:
            whole = int(values[0])
            smaller = min(chosen, whole - chosen) if chosen <= whole else 0
            if smaller > MAX_ITERATIONS or smaller * whole.bit_length() > MAX_BITS:
                raise TooLarge("binomial")
            return Fraction(math.comb(whole, chosen))
        raise NotRational(op)
    simple = _SIMPLE.get(term.name)
    if simple is None:
        raise NotRational(term.name)
    if term.name in ("gcd", "lcm") and any(value.denominator != 1 for value in values):
        raise Undefined(term.name)
    return _capped(Fraction(simple(values)))


_SIMPLE: Mapping[str, Callable[[list[Fraction]], Any]] = {
    "abs": lambda values: abs(values[0]),
    "floor": lambda values: math.floor(values[0]),
    "ceil": lambda values: math.ceil(values[0]),
    "max": max,
    "min": min,
    "gcd": lambda values: math.gcd(*map(int, values)),
    "lcm": lambda values: math.lcm(*map(int, values)),
    "mod": lambda values: values[0] % values[1] if values[1] else _undefined(),
}


def _undefined() -> Fraction:
    raise Undefined("modulo zero")


def power(base: Fraction, exponent: Fraction) -> Fraction:
    """`base ** exponent` where that is rational. Raises as `exact`."""
    if exponent.denominator != 1:
        if base < 0 or abs(exponent.numerator) > MAX_BITS:
            raise NotRational("power")
        return power(_root(base, Fraction(exponent.denominator)), Fraction(exponent.numerator))
    if base == 0 and exponent < 0:
        raise Undefined("division by zero")
    if base in (0, 1):
        return base if exponent != 0 else Fraction(1)
    if base == -1:
        return Fraction(-1 if exponent.numerator % 2 else 1)
    bits = max(base.numerator.bit_length(), base.denominator.bit_length())
    if abs(exponent.numerator) > MAX_BITS or bits * abs(exponent.numerator) > MAX_BITS:
        raise TooLarge("power")
    return base**exponent.numerator


def _root(radicand: Fraction, index: Fraction) -> Fraction:
    """The real root where it is rational; of a negative number where the index is odd."""
    if index.denominator != 1 or not 1 <= index.numerator <= 64:
        raise NotRational("root")
    degree = index.numerator
    if radicand < 0:
        if degree % 2 == 0:
            raise NotRational("root")
        return -_root(-radicand, index)
    numerator = _integer_root(radicand.numerator, degree)
    denominator = _integer_root(radicand.denominator, degree)
    if numerator**degree != radicand.numerator or denominator**degree != radicand.denominator:
        raise NotRational("root")
    return Fraction(numerator, denominator)


def _integer_root(value: int, degree: int) -> int:
    """The largest integer whose power does not exceed `value`."""
    if degree == 2:
        return math.isqrt(value)
    low, high = 0, 1 << (value.bit_length() // degree + 1)
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if middle**degree <= value else (low, middle - 1)
    return low


def _log(values: list[Fraction]) -> Fraction:
    """The logarithm to a given rational base where it is an integer, or a half, third or fourth of one."""
    argument, base = values[0], values[1] if len(values) > 1 else None
    if argument <= 0 or (base is not None and (base <= 0 or base == 1)):
        raise Undefined("logarithm")
    if argument == 1:
        return Fraction(0)
    if base is None:
        raise NotRational("log")
    guess = _log2(argument) / _log2(base) if abs(_log2(base)) > 1e-12 else math.inf
    if not math.isfinite(guess) or abs(guess) > MAX_BITS:
        raise NotRational("log")
    for parts in (1, 2, 3, 4):
        exponent = round(guess * parts)
        if abs(guess * parts - exponent) < 1e-9 and power(base, Fraction(exponent)) == argument**parts:
            return Fraction(exponent, parts)
    raise NotRational("log")


def _log2(value: Fraction) -> float:
    return math.log2(value.numerator) - math.log2(value.denominator)


def _iterate(term: Term, env: Mapping[str, Fraction], steps: Steps) -> Fraction:
    first, last = (exact(bound, env, steps) for bound in term.args[:2])
    if first.denominator != 1 or last.denominator != 1:
        raise NotRational(term.op)
    if last - first > MAX_ITERATIONS:
        raise TooLarge(term.op)
    total = Fraction(0 if term.op == "sum" else 1)
    for index in range(int(first), int(last) + 1):
        value = exact(term.args[2], {**env, term.name: Fraction(index)}, steps)
        total = _capped(total + value if term.op == "sum" else total * value)
    return total


def _sum(values: list[Fraction]) -> Fraction:
    """The sum, fast where all are integers."""
    if all(value.denominator == 1 for value in values):
        return Fraction(sum(value.numerator for value in values))
    return sum(values, Fraction(0))


def _count(value: Fraction) -> int:
    if value.denominator != 1 or value < 0:
        raise NotRational("not a count")
    if value > MAX_ITERATIONS:
        raise TooLarge("count")
    return int(value)


def _capped(value: Fraction) -> Fraction:
    if value.numerator.bit_length() > MAX_BITS or value.denominator.bit_length() > MAX_BITS:
        raise TooLarge("number")
    return value
