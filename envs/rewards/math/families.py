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


def is_family(gold: Qualified) -> bool:
    """Whether a gold answer runs over whole numbers."""
    return bool(gold.parameter) and gold.domain.startswith(("integers", "positive", "naturals"))


def same_family(gold: Answer, answer: Answer, names: tuple[Qualified, Qualified], equality: Equality) -> bool:
    """Whether two families have the same members, where each branch is one of the other's, run through otherwise.

    Raises as `Equality.equal`.
    """
    if names[1].domain and names[1].domain != names[0].domain:
        return False
    branches = _branches(gold), _branches(answer)
    if not branches[0] or not branches[1]:
        return Comparison(equality).same(gold, answer)
    own = names[1].parameter or _only_variable(branches[1], names[0].parameter)
    theirs = [_renamed(term, own, Term("var", name=names[0].parameter)) for term in branches[1]]
    through_all = names[0].domain == "integers"

    def member(term: Term, others: list[Term]) -> bool:
        return any(
            equality.equal(term, run)
            for other in others
            for run in _runs(other, names[0].parameter, through_all)
        )

    return all(member(term, theirs) for term in branches[0]) and all(
        member(term, branches[0]) for term in theirs
    )


def _domain(found: dict[str, str | None]) -> str:
    if found.get("set"):
        if found["set"] == "Z":
            return "positive" if found.get("sign") or found.get("floor") == "+" else "integers"
        return "naturals" if found["set"] == "N" else f"{found['set']}"
    kind = " ".join((found.get("kind") or "").split())
    if "integer" in kind or "whole" in kind:
        return "positive" if "positive" in kind else "integers" if "negative" not in kind else "naturals"
    return "naturals" if "natural" in kind else kind


def _branches(answer: Answer) -> list[Term]:
    """The terms of a family's branches; none where it is not made of values."""
    if isinstance(answer, Relation) and set(answer.ops) == {"="} and answer.label:
        return _branches(answer.sides[-1])
    if isinstance(answer, Many) and answer.opener in ("", "{"):
        found = [_branches(item) for item in answer.items]
        return [term for branch in found for term in branch] if all(found) else []
    if (
        isinstance(answer, Value)
        and (answer.unit is None or answer.unit.powers == (("degree", 1),))
        and not answer.percent
    ):
        return [answer.term if answer.unit is None else make("deg", answer.term)]
    return []


def _only_variable(terms: list[Term], wanted: str) -> str:
    names = sorted(frozenset().union(*map(variables, terms)))
    return names[0] if len(names) == 1 else wanted


def _runs(term: Term, name: str, through_all: bool) -> list[Term]:
    """The term with its parameter run through from another start, and backwards."""
    variable = Term("var", name=name)
    if not through_all:
        return [term]
    forwards = [_renamed(term, name, make("add", variable, number(shift))) for shift in _SHIFTS]
    backwards = [_renamed(term, name, make("add", make("neg", variable), number(shift))) for shift in _SHIFTS]
    return [term, *forwards[1:], *backwards]


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
