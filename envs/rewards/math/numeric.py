"""Approximate values of terms: double precision here, any precision through mpmath in a worker."""

from __future__ import annotations

import cmath
import math
from collections.abc import Mapping
from fractions import Fraction
from typing import Any, Protocol

from polyturn.envs.rewards.math.terms import MAX_ITERATIONS, Steps, Term
from polyturn.envs.rewards.math.verdict import TooLarge, Undefined, Unreadable

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
