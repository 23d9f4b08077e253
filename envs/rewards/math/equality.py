"""Whether two terms are equal: by exact arithmetic, else by values at points; nothing is simplified.

Rational functions are compared at random integer points in exact arithmetic (Schwartz 1980, Zippel 1979), everything
else by high-precision values. Exact arithmetic and a difference in double precision decide at once; agreement of
irrational values is decided with 50 and more digits, in a worker.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterator, Mapping
from fractions import Fraction
from typing import Any

from polyturn.envs.rewards.math.modular import same_residues
from polyturn.envs.rewards.math.numeric import Doubles, Evaluator, Multiprecision, Numbers
from polyturn.envs.rewards.math.terms import Steps, Term, exact, make, operators, variables
from polyturn.envs.rewards.math.verdict import NotRational, TooLarge, Undecided, Undefined

_WHOLE = frozenset(("fact", "binom", "sum", "prod", "gcd", "lcm", "mod"))
"""What is about whole numbers that are not negative."""
_STEPPED = frozenset(("floor", "ceil"))
"""What whole numbers cannot tell from no operation at all."""
_COUNTERS = frozenset("ijkmn")
"""Variables that stand for whole numbers where such operators are applied to them."""
_SIGNS = ((1, 1, 1, 1), (-1, -1, -1, -1), (1, -1, 1, -1), (-1, 1, -1, 1), (1, 1, -1, -1))
_MAGNITUDES = (60_000, 30, 10**9)
_REAL_POINTS = (
    (0.7305, 1.9137, 0.3719, 2.5521),
    (1.3217, 0.5813, 3.1931, 0.9127),
    (-0.6271, -1.4519, -2.2173, -0.2817),
)
_TURNED = (4.3719, 5.1237, -3.7291, 6.0173)
"""Beyond the angles that inverse functions give back, where arcsin(sin x) is not x, and cos x is negative."""
_TURNING = frozenset(
    ("sin", "cos", "tan", "sec", "csc", "cot", "asin", "acos", "atan", "asec", "acsc", "acot")
)
_MAX_DIGITS = 3_000
QUICK_STEPS = 20_000
"""Terms evaluated where nothing bounds the time but this."""
DEEP_STEPS = 10_000_000


class Equality:
    """Compares terms.

    Args:
        seed: Chooses the random points.
        deep: Whether to decide what takes more than exact arithmetic; else that raises `Undecided`.
    """

    def __init__(self, seed: bytes, *, deep: bool) -> None:
        self._random = random.Random(seed)
        self.deep = deep
        # A worker's processor time is bounded; the thread of a caller is not to be held up.
        self._steps = Steps(DEEP_STEPS) if deep else Steps(QUICK_STEPS, Undecided())
        self.symbolic = False
        """Whether any comparison needed more than exact arithmetic."""

    def equal(self, left: Term, right: Term) -> bool:
        """Whether the two have the same value wherever both have one.

        Raises:
            Undefined: a constant has no value.
            TooLarge, Undecided.
        """
        names = sorted(variables(left) | variables(right))
        ops = operators(left) | operators(right)
        if left.op == "const" == right.op and left.name == right.name:
            return True
        try:
            return self._exactly(left, right, names)
        except NotRational:
            pass
        if _infinite(left) or _infinite(right):
            return _infinite(left) == _infinite(right)
        self.symbolic = True
        if self._differ(left, right, names, ops):
            return False
        if not self.deep:
            raise Undecided
        bases = (False, True) if _has_plain_log(left) or _has_plain_log(right) else (False,)
        return any(self._agree(left, right, names, ops, base_ten=base_ten) for base_ten in bases)

    def proportional(self, left: Term, right: Term) -> int:
        """The sign of the constant k, not zero, with left = k right; 0 if there is none. Raises as `equal`."""
        names = sorted(variables(left) | variables(right))
        for value_of, points in (
            (
                self._exact_values(left, right),
                self._exact_points(names, operators(left) | operators(right), wide=True),
            ),
            (self._deep_values(left, right), self._points(names, operators(left) | operators(right))),
        ):
            try:
                pairs = [pair for pair in map(value_of, points) if pair is not None and (pair[0] or pair[1])]
            except NotRational:
                self.symbolic = True
                if not self.deep:
                    raise Undecided from None
                continue
            if len(pairs) < 2 or not pairs[0][1] or not pairs[0][0]:
                return 0
            ratio = pairs[0][0] / pairs[0][1]
            tolerance = 0 if isinstance(ratio, Fraction) else 1e-30
            if all(abs(a - ratio * b) <= tolerance * (abs(a) + abs(b)) for a, b in pairs):
                return 1 if ratio.real > 0 else -1
            return 0
        return 0

    def _exactly(self, left: Term, right: Term, names: list[str]) -> bool:
        if not names:
            try:
                return exact(left, {}, self._steps) == exact(right, {}, self._steps)
            except TooLarge:
                return same_residues(left, right, self._random)
        wide = bool(_exponents(left) | _exponents(right))
        agreed = 0
        for point in self._exact_points(names, operators(left) | operators(right), wide=wide):
            try:
                if exact(left, point, self._steps) != exact(right, point, self._steps):
                    return False
                agreed += 1
            except Undefined:
                continue
            if agreed == 6:
                return True
        if not agreed:
            raise Undefined("no value at any point")
        return agreed >= 4

    def _exact_points(
        self, names: list[str], ops: frozenset[str], *, wide: bool = False
    ) -> Iterator[dict[str, Fraction]]:
        """Points of all signs and sizes: |x| is not x, nor is floor(x); small ones where variables are exponents."""
        positive = bool(ops & _WHOLE)
        stepped = ops & _STEPPED and not set(names) <= _COUNTERS and not positive
        for turn in range(14):
            parts = 7 if stepped and turn % 3 else 1
            signs = _SIGNS[turn % len(_SIGNS)]
            largest = 6 if wide or positive else _MAGNITUDES[turn % len(_MAGNITUDES)]
            yield {
                name: Fraction(
                    self._random.randrange(2, 10 + largest) * (1 if positive else signs[index % 4])
                )
                + (Fraction(self._random.randrange(1, parts), parts) if parts > 1 else 0)
                for index, name in enumerate(names)
            }

    def _points(
        self, names: list[str], ops: frozenset[str], *, whole: bool = False
    ) -> list[dict[str, Fraction]]:
        """Real points, or whole ones where the terms are about whole numbers."""
        if whole or ops & _WHOLE or (ops & _STEPPED and set(names) <= _COUNTERS):
            sign = 1 if ops & _WHOLE else -1
            return [
                {name: Fraction((2 + 3 * turn + index) * sign**turn) for index, name in enumerate(names)}
                for turn in range(4)
            ]
        if not names:
            return [{}]
        shifted = [
            {
                name: Fraction(values[index % 4]).limit_denominator(10_000) + index // 4
                for index, name in enumerate(names)
            }
            for values in (*_REAL_POINTS, *((_TURNED,) if ops & _TURNING else ()))
        ]
        signs = {
            name: value if index % 2 else -value for index, (name, value) in enumerate(shifted[1].items())
        }
        return [*shifted, signs]

    def _differ(self, left: Term, right: Term, names: list[str], ops: frozenset[str]) -> bool:
        """Whether the values differ by far more than double precision explains, at a point where both are real."""
        if _has_plain_log(left) or _has_plain_log(right):
            return False
        complex_allowed = not names or _imaginary(left) or _imaginary(right)
        # ln|x| has values where ln x has none.
        one_sided = ("abs" in operators(left)) != ("abs" in operators(right))
        differences = 0
        for point in self._points(names, ops):
            evaluator = Evaluator(Doubles(), steps=self._steps)
            try:
                values = _pair(evaluator, left, right, point)
            except (Undefined, OverflowError, ValueError, ZeroDivisionError, ArithmeticError):
                continue
            not_real = [isinstance(value, complex) for value in values]
            if not complex_allowed and any(not_real):
                differences += not all(not_real) and one_sided
                continue
            size = max(map(abs, values))
            if not math.isfinite(size) or not math.isfinite(float(evaluator.largest)):
                continue
            differences += abs(values[0] - values[1]) > 1e-7 * size + 1e-9 * float(evaluator.largest) + 1e-12
        return differences > 0

    def _agree(
        self, left: Term, right: Term, names: list[str], ops: frozenset[str], *, base_ten: bool
    ) -> bool:
        """Whether the values agree to 40 digits and more at every point where both are real, and at two at least."""
        complex_allowed = not names or _imaginary(left) or _imaginary(right)
        for points in (self._points(names, ops), self._points(names, ops, whole=True)):
            agreed = 0
            for point in points:
                result = _close(left, right, point, base_ten=base_ten, complex_allowed=complex_allowed)
                if result is False:
                    return False
                agreed += result is True
            if agreed >= (2 if names else 1):
                return True
        if not names:
            raise Undefined("no value")
        return False

    def _exact_values(
        self, left: Term, right: Term
    ) -> Callable[[Mapping[str, Fraction]], tuple[Any, Any] | None]:
        def values(point: Mapping[str, Fraction]) -> tuple[Any, Any] | None:
            try:
                return exact(left, point, self._steps), exact(right, point, self._steps)
            except Undefined:
                return None

        return values

    def _deep_values(
        self, left: Term, right: Term
    ) -> Callable[[Mapping[str, Fraction]], tuple[Any, Any] | None]:
        def values(point: Mapping[str, Fraction]) -> tuple[Any, Any] | None:
            import mpmath

            with mpmath.workdps(60):
                try:
                    return _pair(Evaluator(Multiprecision(), steps=self._steps), left, right, point)
                except (Undefined, ValueError, ArithmeticError):
                    return None

        return values


def _pair(evaluator: Evaluator, left: Term, right: Term, point: Mapping[str, Fraction]) -> tuple[Any, Any]:
    env = {name: evaluator.numbers.rational(value) for name, value in point.items()}
    return evaluator.value(left, env), evaluator.value(right, env)


def _close(
    left: Term, right: Term, point: Mapping[str, Fraction], *, base_ten: bool, complex_allowed: bool
) -> bool | None:
    """Whether the values agree to some 40 digits at a point; None where there is nothing to compare."""
    import mpmath

    digits = 50 + _literal_digits(left) + _literal_digits(right)
    while digits <= _MAX_DIGITS:
        with mpmath.workdps(digits):
            numbers: Numbers = Multiprecision()
            evaluator = Evaluator(numbers, base_ten=base_ten, steps=Steps(DEEP_STEPS))
            try:
                values = _pair(evaluator, left, right, point)
            except (Undefined, ZeroDivisionError):
                return None
            if not complex_allowed and any(isinstance(value, mpmath.mpc) for value in values):
                return None
            largest = evaluator.largest
            lost = int(mpmath.log10(largest)) if largest > 1 else 0
            size = max(map(abs, values))
            if lost > digits - 45 and lost > 5:
                digits = 60 + lost + _literal_digits(left) + _literal_digits(right)
                continue
            tolerance = mpmath.mpf(10) ** (lost + 8 - digits) + size * mpmath.mpf(10) ** (8 - digits)
            return bool(abs(values[0] - values[1]) <= tolerance)
    raise TooLarge("digits")


def _literal_digits(term: Term) -> int:
    """Decimal digits of the longest number in a term."""
    own = 0
    if term.value is not None:
        own = max(term.value.numerator.bit_length(), term.value.denominator.bit_length()) * 3 // 10
    return max([own, *map(_literal_digits, term.args)])


def _has_plain_log(term: Term) -> bool:
    return (term.op == "log" and len(term.args) == 1) or any(map(_has_plain_log, term.args))


def _imaginary(term: Term) -> bool:
    return (term.op == "const" and term.name == "i") or any(map(_imaginary, term.args))


def _exponents(term: Term) -> frozenset[str]:
    """The variables that stand in exponents, factorials, binomials and bounds."""
    found: frozenset[str] = frozenset()
    if term.op in _WHOLE or term.name in _WHOLE:
        found |= variables(term)
    elif term.op == "pow":
        found |= variables(term.args[1])
    for arg in term.args:
        found |= _exponents(arg)
    return found


def _infinite(term: Term) -> int:
    """1 for infinity, -1 for minus infinity, else 0."""
    if term.op == "const" and term.name == "inf":
        return 1
    return -_infinite(term.args[0]) if term.op == "neg" else 0


def difference(left: Term, right: Term) -> Term:
    """left - right."""
    return make("add", left, make("neg", right))
