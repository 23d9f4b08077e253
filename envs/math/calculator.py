"""A calculator for a model: reads arithmetic with the verifier's own bounded parser, and evaluates no text."""

from __future__ import annotations

from fractions import Fraction

from polyturn.envs.rewards.math.expressions import parse
from polyturn.envs.rewards.math.lexer import lex
from polyturn.envs.rewards.math.normalise import normalise
from polyturn.envs.rewards.math.numeric import Doubles, Evaluator
from polyturn.envs.rewards.math.terms import Term, exact, variables
from polyturn.envs.rewards.math.verdict import NotRational, TooLarge, Undefined, Unreadable
from polyturn.tools.tool import tool
from polyturn.tools.types import ToolError

MAX_CHARACTERS = 500
MAX_DIGITS = 40
"""Of a whole number that is written out."""


@tool
def calculator(expression: str) -> str:
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
