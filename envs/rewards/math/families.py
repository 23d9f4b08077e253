r"""Answers with a free parameter: `x = k\pi, k \in \mathbb{Z}`, and qualifiers that say nothing of the answer."""

from __future__ import annotations

import re
from dataclasses import dataclass

from polyturn.envs.rewards.math.compare import Comparison
from polyturn.envs.rewards.math.equality import Equality
from polyturn.envs.rewards.math.kinds import Answer, Many, Relation, Value
from polyturn.envs.rewards.math.terms import Term, make, number, variables

MAX_TAIL = 120
"""Characters at the end of an answer where a qualifier is looked for."""
_SHIFTS = (0, 1, -1, 2, -2)
_TEXTS = re.compile(r"\\(?:text|mathrm|mbox|textrm)\s*+\{([^{}]*+)\}")
_SETS = re.compile(r"\\math(?:bb|bf|rm)\s*+\{?\s*+([ZNRQC])\s*+\}?")
_SET = r"(?P<set>[ZNRQC])(?:\s*+\^\s*+(?P<sign>[+*])|\s*+_\s*+\{?\s*+(?P<floor>\+|>\s*0|\\ge\s*0)\s*+\}?)?"
_KIND = (
    r"(?:an?\s++|any\s++|some\s++|all\s++|the\s++){0,4}+(?P<kind>(?:arbitrary\s++|positive\s++|non-?negative\s++){0,3}+"
    r"(?:integers?|real\s++numbers?|reals?|real\s++constants?|constants?|natural\s++numbers?|whole\s++numbers?))"
)
_LEAD = r"(?:where|for|with|and|when)?\s*+(?:all|any|every|each|some)?\s*+"
_QUALIFIERS = tuple(
    re.compile(rf"(?:(?<!\s)\s|[,;(\[])\s*+{form}\s*+[)\]]?\s*+$")
    for form in (
        rf"{_LEAD}(?P<name>[a-zA-Z])\s*+\\in\s*+{_SET}",
        rf"{_LEAD}(?P<name>[a-zA-Z])\s++(?:is|are|being|=)?\s*+{_KIND}",
        rf"(?:where|for|with)\s++{_KIND}\s*+(?P<name>[a-zA-Z])?",
        r"(?:for|where)\s++(?:all|any|every|each)\s++(?:real\s++)?(?P<name>[a-zA-Z])",
    )
)
_BUILDER = re.compile(
    r"\\\{(?P<left>[^{}|:]*+(?:\{[^{}]*+\}[^{}|:]*+)*+)(?:\\mid|[|:])(?P<right>.*)\\\}$", re.DOTALL
)


@dataclass(frozen=True, slots=True)
class Qualified:
    """An answer's text without its qualifier, the parameter that this names, and what the parameter runs over."""

    text: str
    parameter: str = ""
    domain: str = ""


def without_qualifier(text: str) -> Qualified:
    """Take `, k \\in \\mathbb{Z}`, `where k is an integer` or `for any real c` off the end of a normalised answer."""
    if len(text) > 10 * MAX_TAIL or not any(
        mark in text for mark in ("\\in", "integer", "real", "constant", "for ", "number")
    ):
        return Qualified(text)
    if found := _BUILDER.fullmatch(text.strip()):
        left, right = found["left"].strip(), found["right"].strip()
        inner = without_qualifier(f"{left}, {right}")
        if inner.parameter and inner.text.rstrip(" ,") == left:
            return Qualified(left, inner.parameter, inner.domain)
        inner = without_qualifier(right)
        if inner.parameter and re.match(r"[a-z]\s*+=", right):
            return inner
        return Qualified(text)
    head, tail = text[:-MAX_TAIL], text[-MAX_TAIL:]
    flat = _SETS.sub(r"\1", _TEXTS.sub(r" \1 ", tail))
    for pattern in _QUALIFIERS:
        if (found := pattern.search(flat)) and (head + flat[: found.start()]).strip():
            rest = (head + flat[: found.start()]).rstrip(" ,;(\\") if flat[: found.start()].strip() else head
            return Qualified(rest.rstrip(" ,;"), found["name"] or "", _domain(found.groupdict()))
    return Qualified(text)


Branch = tuple[str, tuple[Term, ...]]
"""A value, or an interval with its brackets and its ends."""


def is_family(gold: Qualified) -> bool:
    """Whether a gold answer has a parameter of which it says what it runs over."""
    return bool(gold.parameter)


def same_family(gold: Answer, answer: Answer, names: tuple[Qualified, Qualified], equality: Equality) -> bool:
    """Whether two families have the same members, where each branch is one of the other's, run through otherwise.

    Raises as `Equality.equal`.
    """
    if names[1].domain and names[1].domain != names[0].domain:
        return False
    parameter = names[0].parameter
    branches = _branches(gold), _branches(answer)
    if not branches[1] or parameter not in _names(branches[0]):
        return Comparison(equality).same_answer(gold, answer)
    own = names[1].parameter or _own_parameter(branches[1], branches[0]) or parameter
    theirs = [
        (kind, tuple(_renamed(term, own, Term("var", name=parameter)) for term in terms))
        for kind, terms in branches[1]
    ]
    through_all = names[0].domain == "integers"

    def member(branch: Branch, others: list[Branch]) -> bool:
        return any(
            branch[0] == other[0] and all(map(equality.equal, branch[1], run))
            for other in others
            for run in _runs(other[1], parameter, through_all)
        )

    return all(member(each, theirs) for each in branches[0]) and all(
        member(each, branches[0]) for each in theirs
    )


def _domain(found: dict[str, str | None]) -> str:
    if found.get("set"):
        if found["set"] == "Z":
            return "positive" if found.get("sign") or found.get("floor") == "+" else "integers"
        return "naturals" if found["set"] == "N" else "any"
    kind = " ".join((found.get("kind") or "").split())
    if "integer" in kind or "whole" in kind:
        return "positive" if "positive" in kind else "integers" if "negative" not in kind else "naturals"
    return "naturals" if "natural" in kind else "any"


def _branches(answer: Answer) -> list[Branch]:
    """The branches of a family; none where it is made of anything but values and intervals."""
    if (
        isinstance(answer, Relation)
        and set(answer.ops) <= {"=", "in"}
        and len(answer.ops) == 1
        and answer.label
    ):
        return _branches(answer.sides[-1])
    if isinstance(answer, Many) and answer.opener in ("", "{"):
        found = [_branches(item) for item in answer.items]
        return [branch for branches in found for branch in branches] if all(found) else []
    if isinstance(answer, Many) and answer.opener in ("(", "[") and len(answer.items) == 2:
        ends = [_branches(item) for item in answer.items]
        if any(len(end) != 1 or end[0][0] for end in ends):
            return []
        return [(answer.opener + answer.closer, (ends[0][0][1][0], ends[1][0][1][0]))]
    if (
        isinstance(answer, Value)
        and (answer.unit is None or answer.unit.powers == (("degree", 1),))
        and not answer.percent
    ):
        return [("", (answer.term if answer.unit is None else make("deg", answer.term),))]
    return []


def _own_parameter(branches: list[Branch], golds: list[Branch]) -> str:
    """The one variable that the gold answer does not have; empty where there is none, or several."""
    own = _names(branches) - _names(golds)
    return next(iter(own)) if len(own) == 1 else ""


def _names(branches: list[Branch]) -> frozenset[str]:
    return frozenset().union(*(variables(term) for _, terms in branches for term in terms))


def _runs(terms: tuple[Term, ...], name: str, through_all: bool) -> list[tuple[Term, ...]]:
    """The terms with their parameter run through from another start, and backwards."""
    if not through_all:
        return [terms]
    variable = Term("var", name=name)
    starts = [make("add", variable, number(shift)) for shift in _SHIFTS[1:]]
    starts += [make("add", make("neg", variable), number(shift)) for shift in _SHIFTS]
    return [terms, *(tuple(_renamed(term, name, start) for term in terms) for start in starts)]


def _renamed(term: Term, name: str, replacement: Term) -> Term:
    if term.op == "var":
        return replacement if term.name == name else term
    if not term.args:
        return term
    return Term(
        term.op,
        tuple(_renamed(arg, name, replacement) for arg in term.args),
        term.value,
        term.name,
        term.depth + 2,
    )
