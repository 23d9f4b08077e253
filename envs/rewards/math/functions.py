"""Terms made of functions and their arguments, as the parser meets them."""

from __future__ import annotations

from polyturn.envs.rewards.math.terms import Term, make, number
from polyturn.envs.rewards.math.verdict import Unreadable

_VARIADIC = frozenset(("gcd", "lcm", "max", "min"))


def apply(name: str, arguments: tuple[Term, ...], base: Term | None) -> Term:
    """A function of its arguments; `base` is what stood as its subscript. Raises `Unreadable`."""
    if name in _VARIADIC:
        return make("fn", *arguments, name=name)
    if name == "binom" and len(arguments) == 2:
        return make("binom", *arguments)
    if name == "log" and len(arguments) == 2 and base is None:
        return make("log", *arguments)
    if len(arguments) != 1:
        raise Unreadable(f"{name} takes one argument")
    argument = arguments[0]
    if name == "sqrt":
        return make("root", argument, number(2))
    if name == "cbrt":
        return make("root", argument, number(3))
    if name == "factorial":
        return make("fact", argument)
    if name == "exp":
        return make("pow", Term("const", name="e"), argument)
    if name == "lg":
        return make("log", argument, number(10))
    if name == "ln":
        return make("log", argument, Term("const", name="e"))
    if name == "log":
        return make("log", argument, *(() if base is None else (base,)))
    return make("fn", argument, name=name)


def renamed(body: Term, name: str) -> Term:
    """The body of a sum, where an index called i or e is no constant."""
    if name not in ("i", "e"):
        return body
    if body.op == "const" and body.name == name:
        return Term("var", name=name)
    return Term(body.op, tuple(renamed(arg, name) for arg in body.args), body.value, body.name, body.depth)


def spelled(term: Term) -> str:
    """An index as part of a name."""
    if term.op == "num":
        return str(term.value)
    return term.name or f"{term.op}({','.join(map(spelled, term.args))})"


def add(terms: list[Term]) -> Term:
    """The sum of terms; of one, itself."""
    return terms[0] if len(terms) == 1 else make("add", *terms)


def multiply(factors: list[Term]) -> Term:
    """The product of factors; of one, itself."""
    return factors[0] if len(factors) == 1 else make("mul", *factors)
