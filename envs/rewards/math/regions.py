"""Sets of real numbers - intervals, unions, solutions of inequalities - and whether two are the same."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from polyturn.envs.rewards.math.equality import Equality
from polyturn.envs.rewards.math.kinds import (
    Answer,
    Combined,
    Many,
    Named,
    Relation,
    Value,
    free_variables,
    is_symbol,
)
from polyturn.envs.rewards.math.numeric import Doubles, Evaluator
from polyturn.envs.rewards.math.terms import Term, make
from polyturn.envs.rewards.math.verdict import Undefined, Unreadable

_INFINITY = Term("const", name="inf")
_MINUS_INFINITY = make("neg", _INFINITY)
_FLIPPED = {"<": ">", ">": "<", "<=": ">=", ">=": "<=", "!=": "!=", "=": "="}


@dataclass(frozen=True, slots=True)
class Interval:
    low: Term
    low_closed: bool
    high: Term
    high_closed: bool


@dataclass(frozen=True, slots=True)
class Compound:
    """`cup`, `cap` or `setminus` of regions."""

    op: str
    parts: tuple[Region, ...]


Region = Interval | Compound

_EVERYTHING = Interval(_MINUS_INFINITY, False, _INFINITY, False)
_NAMED: Mapping[str, Region] = {"R": _EVERYTHING, "empty": Compound("cup", ())}


def region_of(answer: Answer) -> Region | None:
    """The set of real numbers that an answer is, or None."""
    if isinstance(answer, Named):
        return _NAMED.get(answer.name)
    if isinstance(answer, Combined):
        return _combine([region_of(part) for part in answer.parts], answer.ops)
    if isinstance(answer, Relation):
        return _solutions(answer)
    if isinstance(answer, Many):
        if answer.opener == "{":
            return _points(answer)
        return _interval(answer) if answer.opener else _conditions(answer)
    return None


def variable_of(answer: Answer) -> str:
    """The variable whose solutions an answer describes; empty where it names none."""
    if isinstance(answer, Relation) and answer.ops == ("in",):
        return answer.label
    if isinstance(answer, Relation):
        return next(
            (side.term.name for side in answer.sides if isinstance(side, Value) and is_symbol(side)),
            answer.label,
        )
    if isinstance(answer, Many) and not answer.opener:
        return variable_of(answer.items[0])
    return ""


def same_region(left: Region, right: Region, equality: Equality) -> bool:
    """Whether two regions hold the same numbers: they agree on every endpoint and between neighbours."""
    order = _order([*_endpoints(left), *_endpoints(right)], equality)
    # Position 2i+1 is the i-th endpoint, the even ones are the gaps before, between and after.
    count = max(order.values(), default=-1) + 1
    return all(_holds(left, place, order) == _holds(right, place, order) for place in range(2 * count + 1))


def _points(answer: Many) -> Region | None:
    """A finite set of numbers."""
    if any(not isinstance(item, Value) or free_variables(item) for item in answer.items):
        return None
    return Compound("cup", tuple(_point(item.term) for item in answer.items if isinstance(item, Value)))


def _combine(parts: list[Region | None], ops: tuple[str, ...]) -> Region | None:
    result = parts[0]
    for op, part in zip(ops, parts[1:], strict=True):
        if result is None or part is None:
            return None
        result = Compound(op, (result, part))
    return result


def _interval(answer: Many) -> Region | None:
    if answer.opener not in ("(", "[") or len(answer.items) != 2:
        return None
    low, high = answer.items
    if (
        not isinstance(low, Value)
        or not isinstance(high, Value)
        or free_variables(low) | free_variables(high)
    ):
        return None
    return Interval(low.term, answer.opener == "[", high.term, answer.closer == "]")


def _conditions(answer: Many) -> Region | None:
    """x < 1 or x > 2: a union; x > 1 and x < 2: an intersection."""
    if not all(isinstance(item, Relation) and item.ops[0] != "=" for item in answer.items):
        return None
    if len({variable_of(item) for item in answer.items}) != 1:
        return None
    parts = [region_of(item) for item in answer.items]
    if any(part is None for part in parts):
        return None
    return Compound(
        "cup" if answer.joiner == "or" else "cap", tuple(part for part in parts if part is not None)
    )


def _solutions(relation: Relation) -> Region | None:
    """The solutions of a relation that bounds one variable by constants, as x < 2 or 0 < x <= 1."""
    if relation.ops == ("in",):
        return region_of(relation.sides[1])
    if "=" in relation.ops or "~" in relation.ops or "in" in relation.ops:
        return None
    found: list[Region] = []
    for left, op, right in zip(relation.sides, relation.ops, relation.sides[1:], strict=False):
        if not isinstance(left, Value) or not isinstance(right, Value):
            return None
        if is_symbol(left) and not free_variables(right):
            found.append(_bounded(op, right.term))
        elif is_symbol(right) and not free_variables(left):
            found.append(_bounded(_FLIPPED[op], left.term))
        else:
            return None
    return found[0] if len(found) == 1 else Compound("cap", tuple(found))


def _bounded(op: str, bound: Term) -> Region:
    if op == "!=":
        return Compound("setminus", (_EVERYTHING, _point(bound)))
    if op[0] == "<":
        return Interval(_MINUS_INFINITY, False, bound, op == "<=")
    return Interval(bound, op == ">=", _INFINITY, False)


def _point(term: Term) -> Region:
    return Interval(term, True, term, True)


def _endpoints(region: Region) -> list[Term]:
    if isinstance(region, Interval):
        return [region.low, region.high]
    return [term for part in region.parts for term in _endpoints(part)]


def _order(terms: list[Term], equality: Equality) -> dict[int, int]:
    """The rank of each finite endpoint, by identity; equal ones share a rank."""
    sized: list[tuple[float, Term]] = []
    for term in terms:
        if _infinity(term):
            continue
        value = Evaluator(Doubles()).value(term, {})
        if isinstance(value, complex):
            raise Undefined("an endpoint that is not real")
        sized.append((value, term))
    sized.sort(key=lambda pair: pair[0])
    ranks: dict[int, int] = {}
    rank = -1
    for index, (value, term) in enumerate(sized):
        previous = sized[index - 1] if index else None
        near = previous is not None and abs(value - previous[0]) <= 1e-6 * (1 + abs(value))
        if previous is None or not (near and equality.equal(previous[1], term)):
            rank += 1
        ranks[id(term)] = rank
    return ranks


def _holds(region: Region, place: int, order: dict[int, int]) -> bool:
    """Whether a region holds the endpoint or the gap at `place`."""
    if isinstance(region, Compound):
        held = [_holds(part, place, order) for part in region.parts]
        if region.op == "cup":
            return any(held)
        return all(held) if region.op == "cap" else held[0] and not held[1]
    low, high = _place(region.low, order), _place(region.high, order)
    above = place > low or (place == low and region.low_closed)
    below = place < high or (place == high and region.high_closed)
    return above and below


def _place(term: Term, order: dict[int, int]) -> float:
    if sign := _infinity(term):
        return sign * float("inf")
    if id(term) not in order:
        raise Unreadable("an endpoint without an order")
    return 2 * order[id(term)] + 1


def _infinity(term: Term) -> int:
    if term.op == "const" and term.name == "inf":
        return 1
    return -_infinity(term.args[0]) if term.op == "neg" else 0
