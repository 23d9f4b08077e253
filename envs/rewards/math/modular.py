"""Rational numbers too large to write out, compared by what remains of them modulo random primes.

Two different rationals agree modulo a random prime of 61 bits with a probability of about (bits of their difference) /
2^55 (Karp and Rabin 1987); four primes are drawn anew for every comparison.
"""

from __future__ import annotations

import random
from fractions import Fraction

from polyturn.envs.rewards.math.terms import Term, exact
from polyturn.envs.rewards.math.verdict import NotRational, TooLarge, Undefined

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
