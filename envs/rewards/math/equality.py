"""Whether two terms are equal: by exact arithmetic, else by residues or by values at points; nothing is simplified.

Approximate values are of double precision here, and of any precision through mpmath in a worker. The module is long
because a comparison goes through three arithmetics of the same terms.
"""

from __future__ import annotations

import cmath
import math
import random
from collections.abc import Iterator, Mapping
from fractions import Fraction
from typing import Any, Protocol

from polyturn.envs.rewards.math.terms import (
    MAX_ITERATIONS,
    Steps,
    Term,
    exact,
    make,
    operators,
    subterms,
    variables,
)
from polyturn.envs.rewards.math.verdict import NotRational, TooLarge, Undecided, Undefined, Unreadable

MAX_EXPONENT = 100_000
"""Decimal digits of the largest number that any evaluation may meet."""
_TRIGONOMETRIC = frozenset(("sin", "cos", "tan", "sinh", "cosh", "tanh"))
_RECIPROCAL = {"sec": "cos", "csc": "sin", "cot": "tan"}
_INVERSE_RECIPROCAL = {"asec": "acos", "acsc": "asin", "acot": "atan"}


class Numbers(Protocol):
    """The arithmetic that `Evaluator` evaluates with; values add, multiply and divide by themselves."""

    def rational(self, value: Fraction) -> Any: ...

    def constant(self, name: str) -> Any: ...

    def power(self, base: Any, exponent: Any) -> Any: ...

    def root(self, radicand: Any, index: Any) -> Any: ...

    def log(self, value: Any) -> Any: ...

    def call(self, name: str, value: Any) -> Any: ...

    def gamma(self, value: Any) -> Any: ...


class Evaluator:
    """Evaluates terms; `largest` is the largest magnitude met, which bounds what rounding can have done.

    Args:
        numbers: The arithmetic.
        base_ten: Whether a logarithm without a base is to base ten; else it is natural.
        steps: How many terms may be evaluated.
    """

    def __init__(self, numbers: Numbers, *, base_ten: bool = False, steps: Steps | None = None) -> None:
        self._steps = steps or Steps()
        self.numbers = numbers
        self.base_ten = base_ten
        self.largest: Any = 0

    def value(self, term: Term, env: Mapping[str, Any]) -> Any:
        """The value, real or complex.

        Raises:
            Undefined, TooLarge: as `exact`.
            Unreadable: a function without a value here.
        """
        self._steps.take()
        value = self._value(term, env)
        size = abs(value)
        if size > self.largest:
            self.largest = size
        return value

    def _value(self, term: Term, env: Mapping[str, Any]) -> Any:
        op, numbers = term.op, self.numbers
        if op == "num":
            assert term.value is not None
            return numbers.rational(term.value)
        if op == "var":
            return env[term.name]
        if op == "const":
            return numbers.constant(term.name)
        if op in ("sum", "prod"):
            return self._iterate(term, env)
        values = [self.value(arg, env) for arg in term.args]
        if op in ("add", "mul"):
            total = values[0]
            for value in values[1:]:
                total = total + value if op == "add" else total * value
            return total
        if op == "neg":
            return -values[0]
        if op == "pct":
            return values[0] / 100
        if op == "deg":
            return values[0] * numbers.constant("pi") / 180
        if op == "div":
            return _quotient(values[0], values[1])
        if op == "pow":
            return self._power(values[0], values[1])
        if op == "root":
            return numbers.root(values[0], values[1])
        if op == "log":
            return self._log(values)
        if op == "fact":
            return self._factorial(values[0])
        if op == "binom":
            return _quotient(
                self._factorial(values[0]),
                self._factorial(values[1]) * self._factorial(values[0] - values[1]),
            )
        return self._call(term.name, values)

    def _power(self, base: Any, exponent: Any) -> Any:
        if base == 0:
            if exponent == 0:
                return self.numbers.rational(Fraction(1))
            if _real(exponent) is None or exponent < 0:
                raise Undefined("division by zero")
            return base
        size = abs(base)
        digits = abs(exponent) * abs(float(self.numbers.log(size).real)) if size else 0
        if digits > MAX_EXPONENT * math.log(10):
            raise TooLarge("power")
        return self.numbers.power(base, exponent)

    def _log(self, values: list[Any]) -> Any:
        base = (
            values[1] if len(values) > 1 else (self.numbers.rational(Fraction(10)) if self.base_ten else None)
        )
        if values[0] == 0 or base == 0:
            raise Undefined("logarithm")
        logarithm = self.numbers.log(values[0])
        return logarithm if base is None else _quotient(logarithm, self.numbers.log(base))

    def _factorial(self, value: Any) -> Any:
        real = _real(value)
        if real is None or abs(real) > 10_000:
            raise TooLarge("factorial")
        if real < 0 and real == int(real):
            raise Undefined("factorial")
        return self.numbers.gamma(real + 1)

    def _iterate(self, term: Term, env: Mapping[str, Any]) -> Any:
        if any(bound.op == "const" and bound.name == "inf" for bound in term.args[:2]):
            raise Unreadable("an infinite sum", foreign=True)
        first, last = (_real(self.value(bound, env)) for bound in term.args[:2])
        if (
            first is None
            or last is None
            or not math.isfinite(float(last))
            or first != int(first)
            or last != int(last)
        ):
            raise Unreadable("a sum without whole bounds", foreign=True)
        if last - first > MAX_ITERATIONS:
            raise TooLarge(term.op)
        total = self.numbers.rational(Fraction(0 if term.op == "sum" else 1))
        for index in range(int(first), int(last) + 1):
            value = self.value(term.args[2], {**env, term.name: self.numbers.rational(Fraction(index))})
            total = total + value if term.op == "sum" else total * value
        return total

    def _call(self, name: str, values: list[Any]) -> Any:
        value = values[0]
        if name == "abs":
            return abs(value)
        if name in _RECIPROCAL:
            return _quotient(1, self.numbers.call(_RECIPROCAL[name], value))
        if name in _INVERSE_RECIPROCAL:
            return self.numbers.call(_INVERSE_RECIPROCAL[name], _quotient(1, value))
        if name in ("floor", "ceil", "max", "min", "sign"):
            reals = [_real(each) for each in values]
            if any(each is None for each in reals):
                raise Undefined(name)
            if name == "sign":
                return self.numbers.rational(Fraction((reals[0] > 0) - (reals[0] < 0)))
            if name in ("floor", "ceil"):
                whole = math.floor(reals[0]) if name == "floor" else math.ceil(reals[0])
                return self.numbers.rational(Fraction(whole))
            return max(reals) if name == "max" else min(reals)
        if name in ("gcd", "lcm", "mod"):
            raise Unreadable(name, foreign=True)
        if name in _TRIGONOMETRIC and abs(value) > 10**6:
            raise TooLarge(name)
        return self.numbers.call(name, value)


def _quotient(over: Any, under: Any) -> Any:
    if under == 0:
        raise Undefined("division by zero")
    return over / under


def _real(value: Any) -> Any:
    """The value if it is real, else None."""
    imaginary = getattr(value, "imag", 0)
    return (value.real if hasattr(value, "real") else value) if imaginary == 0 else None


class Doubles:
    """Double precision: floats where a value is real, so that no signed zero picks the wrong branch."""

    def rational(self, value: Fraction) -> float:
        return value.numerator / value.denominator

    def constant(self, name: str) -> complex:
        if name == "inf":
            raise Undefined("infinity")
        return {"pi": math.pi, "e": math.e, "i": 1j}[name]

    def power(self, base: complex, exponent: complex) -> complex:
        if isinstance(base, complex) or isinstance(exponent, complex):
            return _settled(base**exponent)
        if base > 0 or exponent == int(exponent):
            return base**exponent
        return _settled(complex(base) ** exponent)

    def root(self, radicand: complex, index: complex) -> complex:
        if not isinstance(radicand, complex) and not isinstance(index, complex):
            if radicand >= 0:
                return radicand ** (1 / index)
            if index % 2 == 1:
                return -((-radicand) ** (1 / index))
        return _settled(complex(radicand) ** (1 / index))

    def log(self, value: complex) -> complex:
        return math.log(value) if not isinstance(value, complex) and value > 0 else _settled(cmath.log(value))

    def call(self, name: str, value: complex) -> complex:
        return _settled(getattr(cmath, name)(value))

    def gamma(self, value: complex) -> complex:
        assert not isinstance(value, complex)
        return math.gamma(value)


def _settled(value: complex) -> complex:
    """A float where the imaginary part is zero or rounding."""
    return value.real if abs(value.imag) <= 1e-15 * abs(value.real) else value


class Multiprecision:
    """mpmath at its current working precision."""

    def __init__(self) -> None:
        import mpmath

        self._mp = mpmath.mp

    def rational(self, value: Fraction) -> Any:
        return self._mp.mpf(value.numerator) / value.denominator

    def constant(self, name: str) -> Any:
        if name == "inf":
            raise Undefined("infinity")
        return {"pi": +self._mp.pi, "e": +self._mp.e, "i": self._mp.mpc(0, 1)}[name]

    def power(self, base: Any, exponent: Any) -> Any:
        return self._settled(self._mp.power(base, exponent))

    def root(self, radicand: Any, index: Any) -> Any:
        real, degree = _real(radicand), _real(index)
        if real is not None and degree is not None and real < 0 and degree % 2 == 1:
            return -self._mp.power(-real, 1 / degree)
        return self._settled(self._mp.power(radicand, 1 / self._mp.mpmathify(index)))

    def log(self, value: Any) -> Any:
        return self._settled(self._mp.log(value))

    def call(self, name: str, value: Any) -> Any:
        return self._settled(getattr(self._mp, name)(value))

    def gamma(self, value: Any) -> Any:
        return self._mp.gamma(value)

    def _settled(self, value: Any) -> Any:
        if isinstance(value, self._mp.mpc) and abs(value.imag) <= abs(value.real) * self._mp.eps * 16:
            return value.real
        return value


_NUM_PRIMES = 4
MAX_EXPONENT_BITS = 4_000
_WITNESSES = (2, 3, 5, 7, 11, 13, 17, 19, 23, 29, 31, 37)
"""Enough for numbers below 3.3e24 (Sorenson and Webster 2015)."""


def same_residues(left: Term, right: Term, rng: random.Random) -> bool:
    """Whether two constant terms agree modulo random primes.

    Raises:
        TooLarge: an exponent is beyond the caps itself.
        NotRational, Undefined.
    """
    agreed = 0
    for _ in range(4 * _NUM_PRIMES):
        prime = _random_prime(rng)
        try:
            if _residue(left, prime) != _residue(right, prime):
                return False
        except ZeroDivisionError:  # the prime divides a denominator
            continue
        agreed += 1
        if agreed == _NUM_PRIMES:
            return True
    raise Undefined("division by zero")


def _residue(term: Term, prime: int) -> int:
    op = term.op
    if op == "num":
        assert term.value is not None
        return term.value.numerator * _inverse(term.value.denominator, prime) % prime
    if op == "pow":
        exponent = exact(term.args[1], {})
        if exponent.denominator != 1:
            raise NotRational("power")
        if exponent.numerator.bit_length() > MAX_EXPONENT_BITS:
            raise TooLarge("power")
        return _power(_residue(term.args[0], prime), exponent, prime)
    if op not in ("add", "mul", "neg", "div", "pct"):
        value = exact(term, {})
        return value.numerator * _inverse(value.denominator, prime) % prime
    values = [_residue(arg, prime) for arg in term.args]
    if op == "add":
        return sum(values) % prime
    if op == "neg":
        return -values[0] % prime
    if op == "pct":
        return values[0] * _inverse(100, prime) % prime
    if op == "div":
        return values[0] * _inverse(values[1], prime) % prime
    product = 1
    for factor in values:
        product = product * factor % prime
    return product


def _power(base: int, exponent: Fraction, prime: int) -> int:
    return pow(_inverse(base, prime) if exponent < 0 else base, abs(exponent.numerator), prime)


def _inverse(value: int, prime: int) -> int:
    if value % prime == 0:
        raise ZeroDivisionError
    return pow(value, -1, prime)


def _random_prime(rng: random.Random) -> int:
    while True:
        candidate = rng.getrandbits(61) | (1 << 60) | 1
        if all(_is_probable_prime(candidate, witness) for witness in _WITNESSES):
            return candidate


def _is_probable_prime(number: int, witness: int) -> bool:
    """Whether a number passes the Miller-Rabin test to one base."""
    odd, twos = number - 1, 0
    while odd % 2 == 0:
        odd, twos = odd // 2, twos + 1
    value = pow(witness, odd, number)
    if value in (1, number - 1):
        return True
    for _ in range(twos - 1):
        value = value * value % number
        if value == number - 1:
            return True
    return False


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
        bases = (False, True) if _has_plain_log(left, right) else (False,)
        return any(self._agree(left, right, names, ops, base_ten=base_ten) for base_ten in bases)

    def proportional(self, left: Term, right: Term) -> int:
        """The sign of the constant k, not zero, with left = k right; 0 if there is none. Raises as `equal`."""
        names, ops = sorted(variables(left) | variables(right)), operators(left) | operators(right)
        for values_at, points in (
            (self._exact_values, self._exact_points(names, ops, wide=True)),
            (self._deep_values, self._points(names, ops)),
        ):
            try:
                values = [values_at(left, right, point) for point in points]
            except NotRational:
                self.symbolic = True
                if not self.deep:
                    raise Undecided from None
                continue
            pairs = [pair for pair in values if pair is not None and any(pair)]
            if len(pairs) < 2 or not all(pairs[0]):
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
        if _has_plain_log(left, right):
            return False
        complex_allowed = not names or _imaginary(left, right)
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
        complex_allowed = not names or _imaginary(left, right)
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

    def _exact_values(self, left: Term, right: Term, point: Mapping[str, Fraction]) -> tuple[Any, Any] | None:
        try:
            return exact(left, point, self._steps), exact(right, point, self._steps)
        except Undefined:
            return None

    def _deep_values(self, left: Term, right: Term, point: Mapping[str, Fraction]) -> tuple[Any, Any] | None:
        import mpmath

        with mpmath.workdps(60):
            try:
                return _pair(Evaluator(Multiprecision(), steps=self._steps), left, right, point)
            except (Undefined, ValueError, ArithmeticError):
                return None


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
    values = [each.value for each in subterms(term) if each.value is not None]
    return max(
        (max(v.numerator.bit_length(), v.denominator.bit_length()) * 3 // 10 for v in values), default=0
    )


def _has_plain_log(*terms: Term) -> bool:
    return any(each.op == "log" and len(each.args) == 1 for term in terms for each in subterms(term))


def _imaginary(*terms: Term) -> bool:
    return any(each.op == "const" and each.name == "i" for term in terms for each in subterms(term))


def _exponents(term: Term) -> frozenset[str]:
    """The variables that stand in exponents, factorials, binomials and bounds."""
    found: frozenset[str] = frozenset()
    for each in subterms(term):
        if each.op in _WHOLE or each.name in _WHOLE:
            found |= variables(each)
        elif each.op == "pow":
            found |= variables(each.args[1])
    return found


def _infinite(term: Term) -> int:
    """1 for infinity, -1 for minus infinity, else 0."""
    if term.op == "const" and term.name == "inf":
        return 1
    return -_infinite(term.args[0]) if term.op == "neg" else 0


def difference(left: Term, right: Term) -> Term:
    """left - right."""
    return make("add", left, make("neg", right))
