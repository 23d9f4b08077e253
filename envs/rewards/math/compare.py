"""Whether two answers, once read, say the same; sets of real numbers are compared by their endpoints.

The module is long because kinds of answers are compared with one another: intervals with inequalities, lists by parts.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import TypeVar

from polyturn.envs.rewards.math.answers import (
    Answer,
    Based,
    Cases,
    Clock,
    Combined,
    Many,
    Matrix,
    Named,
    Ratio,
    Relation,
    Value,
    Words,
    bare_noun,
    free_variables,
    is_symbol,
    plain_words,
)
from polyturn.envs.rewards.math.equality import Doubles, Equality, Evaluator, difference
from polyturn.envs.rewards.math.terms import Term, make, number, operators, variables
from polyturn.envs.rewards.math.tokens import FILLING_WORDS, NUMBER_PROPERTIES
from polyturn.envs.rewards.math.units import Unit
from polyturn.envs.rewards.math.verdict import TooLarge, Undefined, Unreadable

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
        return _interval(answer) if answer.opener else _bounds(answer)
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


def _bounds(answer: Many) -> Region | None:
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


Case = tuple[Answer, Answer | None]
Item = TypeVar("Item")
MAX_ITEMS = 200
"""Of a list; unordered ones are compared pair by pair."""


class Comparison:
    """Compares answers of any kind; `equality` compares the terms in them."""

    def __init__(self, equality: Equality) -> None:
        self._equality = equality

    def same_answer(self, gold: Answer, answer: Answer) -> bool:
        """Whether `answer` says what `gold` says; a value alone in braces is that value."""
        return self.same(_only_element(gold), _only_element(answer))

    def same(self, gold: Answer, answer: Answer) -> bool:
        """Whether two answers, or parts of answers, are the same; {1} in a set is not 1."""
        gold, answer = _unwrapped(gold), _unwrapped(answer)
        if isinstance(gold, Clock) and isinstance(answer, Clock):
            return gold.same(answer)
        if isinstance(gold, Relation) or isinstance(answer, Relation):
            return self._with_relation(gold, answer)
        if isinstance(gold, Clock) or isinstance(answer, Clock):
            return self._same_clock(gold, answer)
        if isinstance(gold, Cases) or isinstance(answer, Cases):
            return self._same_cases(gold, answer)
        if isinstance(gold, Many) and isinstance(answer, Many):
            return self._same_many(gold, answer)
        if isinstance(gold, Many | Named | Combined) and isinstance(answer, Many | Named | Combined):
            return self._same_region(gold, answer)
        if isinstance(gold, Matrix) or isinstance(answer, Matrix):
            return self._same_matrix(gold, answer)
        if isinstance(gold, Based) or isinstance(answer, Based):
            return self._same_based(gold, answer)
        if isinstance(gold, Ratio) or isinstance(answer, Ratio):
            return self._same_ratio(gold, answer)
        if isinstance(gold, Value) and isinstance(answer, Value):
            return self._same_value(gold, answer)
        if isinstance(gold, Words) and isinstance(answer, Words):
            if gold.text == answer.text or bare_noun(gold.text) == bare_noun(answer.text):
                return True
            properties = _properties(gold.text), _properties(answer.text)
            return properties[0] == properties[1] is not None
        if isinstance(gold, Words) or isinstance(answer, Words):
            return _letters(gold) == _letters(answer) != ""
        return False

    def _same_clock(self, gold: Answer, answer: Answer) -> bool:
        clock, other = (gold, answer) if isinstance(gold, Clock) else (answer, gold)
        assert isinstance(clock, Clock)
        if clock.half or not clock.minute:
            return False
        ratio = Ratio((Value(number(clock.hour)), Value(number(clock.minute))))
        return self._same_ratio(ratio, other)

    def _same_cases(self, gold: Answer, answer: Answer) -> bool:
        """Whether each case of the one is a case of the other."""
        if not isinstance(gold, Cases) or not isinstance(answer, Cases):
            return False

        def same_case(case: Case, other: Case) -> bool:
            if case[1] is None or other[1] is None:
                return case[1] is other[1] and self.same(case[0], other[0])
            return self.same(case[1], other[1]) and self.same(case[0], other[0])

        return _pair_off(gold.rows, answer.rows, same_case)

    def _same_value(self, gold: Value, answer: Value) -> bool:
        equal = self._equality.equal
        one_by_one = _one_by_one(gold), _one_by_one(answer)
        if one_by_one != (gold, answer):
            # 7 dozen are 84, and 7 where a problem asks how many dozen.
            asked = gold.unit is None and one_by_one[1] != answer
            return self._same_value(*one_by_one) or (asked and equal(gold.term, answer.term))
        if gold.unit is not None and answer.unit is not None:
            if not gold.unit.agrees(answer.unit):
                temperatures = _kelvin(gold), _kelvin(answer)
                return None not in temperatures and equal(*map(_present, temperatures))
            return equal(_scaled(gold.term, gold.unit.scale), _scaled(answer.term, answer.unit.scale))
        if gold.percent != answer.percent:
            plain, percent = (answer, gold) if gold.percent else (gold, answer)
            if plain.unit is not None:
                return False
            if equal(plain.term, percent.term):
                return True
            return equal(plain.term, make("div", percent.term, number(100)))
        if equal(gold.term, answer.term):
            return True
        degrees, radians = (gold, answer) if _is_degrees(gold) else (answer, gold)
        if _is_degrees(degrees) and "const" in operators(radians.term):
            return equal(make("deg", degrees.term), radians.term)
        return False

    def _same_many(self, gold: Many, answer: Many) -> bool:
        if len(gold.items) > MAX_ITEMS or len(answer.items) > MAX_ITEMS:
            raise TooLarge("too many items")
        kinds = (_shape(gold), _shape(answer))
        if kinds in (("bare", "bare"), ("bare", "set"), ("set", "bare"), ("set", "set")):
            if "set" in kinds:
                return self._covers(gold.items, answer.items) and self._covers(answer.items, gold.items)
            if (
                gold.joiner == answer.joiner == ","
                and (assignments := self._assignments(gold, answer)) is not None
            ):
                return assignments
            return self._same_unordered(gold.items, answer.items)
        if "set" in kinds or "or" in (gold.joiner, answer.joiner):
            return False
        if kinds[0] != kinds[1] and "bare" not in kinds:
            return False
        if "bare" in kinds and not {"tuple", "angle"} & set(kinds) and len(gold.items) == 2:
            return False
        if "bare" in kinds and (assignments := self._assignments(gold, answer)) is not None:
            return assignments
        return self._same_ordered(gold.items, answer.items)

    def _assignments(self, gold: Many, answer: Many) -> bool | None:
        """x=1, y=2 against 1, 2: in the order of the names; None where neither or both name what they give."""
        named = [
            all(isinstance(item, Relation) and item.label for item in many.items) for many in (gold, answer)
        ]
        if named[0] == named[1]:
            return None
        return self._same_ordered(_assigned(gold), _assigned(answer))

    def _same_ordered(self, gold: Sequence[Answer], answer: Sequence[Answer]) -> bool:
        return len(gold) == len(answer) and all(map(self.same, gold, answer))

    def _same_unordered(self, gold: Sequence[Answer], answer: Sequence[Answer]) -> bool:
        return _pair_off(gold, answer, self.same)

    def _covers(self, some: Sequence[Answer], others: Sequence[Answer]) -> bool:
        return all(any(self.same(item, other) for other in others) for item in some)

    def _same_region(self, gold: Answer, answer: Answer) -> bool:
        if isinstance(gold, Named) and isinstance(answer, Named):
            return gold.name == answer.name
        regions = region_of(gold), region_of(answer)
        if regions[0] is None or regions[1] is None:
            return False
        return same_region(regions[0], regions[1], self._equality)

    def _with_relation(self, gold: Answer, answer: Answer) -> bool:
        if isinstance(gold, Relation) and isinstance(answer, Relation):
            return self._same_relation(gold, answer)
        relation, other = (gold, answer) if isinstance(gold, Relation) else (answer, gold)
        assert isinstance(relation, Relation)
        if (value := self._value_of(relation)) is not None:
            return self.same(value, other) if relation is gold else self.same(other, value)
        if (
            relation is answer
            and (value := _sum_asked_for(relation)) is not None
            and isinstance(other, Value)
        ):
            return self.same(other, value)
        if isinstance(other, Value | Words | Ratio | Based | Matrix):
            return False
        return self._same_region(gold, answer)

    def _value_of(self, relation: Relation) -> Answer | None:
        """What x = 5, f(x) = 5, 5 = x, 7 + 8 = 15 or x in S gives; None for a condition."""
        first, last = relation.sides[0], relation.sides[-1]
        if relation.ops == ("in",):
            return last if relation.label else None
        if any(op not in ("=", "~") for op in relation.ops):
            return None
        if relation.ops[-1] == "~" and (len(relation.sides) > 2 or not relation.label):
            last = relation.sides[-2]
        if relation.label or _is_names(first):
            middle = relation.sides[1:-1] if last is relation.sides[-1] else relation.sides[1:-2]
            if free_variables(last) & {relation.label}:
                return None
            return last if all(self.same(side, last) for side in middle) else None
        if is_symbol(last) and not free_variables(first):
            return first
        constant = all(isinstance(side, Value) and not free_variables(side) for side in relation.sides)
        if constant and all(self.same(side, last) for side in relation.sides[:-1]):
            return last
        return None

    def _same_relation(self, gold: Relation, answer: Relation) -> bool:
        values = self._value_of(gold), self._value_of(answer)
        if values[0] is not None and values[1] is not None:
            labels = gold.label, answer.label
            renamed = all(labels) and labels[0] != labels[1]
            if not renamed and self.same(values[0], values[1]):
                return True
            if not (free_variables(values[0]) and free_variables(values[1])):
                return False
        regions = region_of(gold), region_of(answer)
        if (
            values[0] is not None
            and values[1] is None
            and not free_variables(values[0])
            and (regions[0] is None or gold.ops != ("in",))
        ):
            return False
        if regions[0] is not None and regions[1] is not None:
            names = variable_of(gold), variable_of(answer)
            return (names[0] == names[1] or not all(names)) and same_region(
                regions[0], regions[1], self._equality
            )
        if regions[0] is not None:
            return False
        return self._same_conditions(gold, answer)

    def _same_conditions(self, gold: Relation, answer: Relation) -> bool:
        """Equations and inequalities that follow from each other by a constant factor."""

        def same_condition(one: tuple[str, Term], other: tuple[str, Term]) -> bool:
            sign = self._equality.proportional(one[1], other[1]) if one[0] == other[0] else 0
            return sign > 0 or (sign < 0 and one[0] in ("=", "!="))

        some, others = _conditions(gold), _conditions(answer)
        return bool(some) and _pair_off(some, others, same_condition)

    def _same_matrix(self, gold: Answer, answer: Answer) -> bool:
        if isinstance(gold, Many) != isinstance(answer, Many):
            vectors = _vector(gold), _vector(answer)
            if vectors[0] is not None and vectors[1] is not None:
                return self._same_ordered(vectors[0], vectors[1])
        rows = _rows(gold), _rows(answer)
        if rows[0] is None or rows[1] is None or len(rows[0]) != len(rows[1]):
            return False
        return all(map(self._same_ordered, rows[0], rows[1]))

    def _same_based(self, gold: Answer, answer: Answer) -> bool:
        if isinstance(gold, Based) and isinstance(answer, Based):
            if gold.base == answer.base:
                return gold.digits.lstrip("0") == answer.digits.lstrip("0")
            return _in_base(gold) == _in_base(answer)
        based, other = (gold, answer) if isinstance(gold, Based) else (answer, gold)
        assert isinstance(based, Based)
        if not isinstance(other, Value) or other.term.op != "num" or not based.digits.isdecimal():
            return False
        return other.term.value == int(based.digits)

    def _same_ratio(self, gold: Answer, answer: Answer) -> bool:
        if not isinstance(gold, Ratio) or not isinstance(answer, Ratio):
            ratio, other = (gold, answer) if isinstance(gold, Ratio) else (answer, gold)
            assert isinstance(ratio, Ratio)
            if (
                len(ratio.parts) != 2
                or not isinstance(other, Value)
                or other.unit
                or ratio.unit
                or _is_time(ratio)
            ):
                return False
            if _has_zero(ratio):
                return False
            over, under = ratio.parts
            assert isinstance(over, Value) and isinstance(under, Value)
            return self._equality.equal(make("div", over.term, under.term), other.term)
        if gold.unit is not None and answer.unit is not None and not gold.unit.agrees(answer.unit):
            return False
        if len(gold.parts) != len(answer.parts):
            return False
        if self._same_ordered(gold.parts, answer.parts):
            return True
        if gold.unit or answer.unit or (_is_time(gold) and _is_time(answer)) or _has_zero(gold, answer):
            return False
        terms = [[part.term for part in side.parts if isinstance(part, Value)] for side in (gold, answer)]
        first = [make("div", term, terms[0][0]) for term in terms[0]]
        second = [make("div", term, terms[1][0]) for term in terms[1]]
        return all(map(self._equality.equal, first, second))


def _pair_off(some: Sequence[Item], others: Sequence[Item], same: Callable[[Item, Item], bool]) -> bool:
    """Whether each has one of the others, and no two the same one."""
    if len(some) != len(others):
        return False
    left = list(others)
    for item in some:
        match = next((index for index, other in enumerate(left) if same(item, other)), None)
        if match is None:
            return False
        del left[match]
    return True


def _properties(text: str) -> tuple[str, ...] | None:
    """What is said of numbers: `all odd n`, `n is odd`; None where anything else is said."""
    words = [word.removesuffix("s") for word in text.split() if word not in FILLING_WORDS]
    rest = tuple(sorted(word for word in words if len(word) > 1))
    return rest if rest and set(rest) <= NUMBER_PROPERTIES and len(words) - len(rest) < 2 else None


def _only_element(answer: Answer) -> Answer:
    """The value in {5} or (x, y) in {(x, y)}; a set of a set stays one."""
    answer = _unwrapped(answer)
    if isinstance(answer, Many) and answer.opener == "{" and len(answer.items) == 1:
        item = answer.items[0]
        inner = isinstance(item, Named | Combined) or (isinstance(item, Many) and item.opener == "{")
        return answer if inner else _only_element(item)
    return answer


def _unwrapped(answer: Answer) -> Answer:
    """An answer that is the only one of a list, without it."""
    while isinstance(answer, Many) and len(answer.items) == 1 and not answer.opener:
        answer = answer.items[0]
    if isinstance(answer, Matrix) and len(answer.rows) == 1 and len(answer.rows[0]) == 1:
        return answer.rows[0][0]
    if isinstance(answer, Many) and not answer.opener:
        return _common_variable(answer)
    return answer


def _common_variable(answer: Many) -> Many:
    """x = 1 or x = 2, and x = 1, 2: the values alone."""
    first = answer.items[0]
    if not isinstance(first, Relation) or set(first.ops) != {"="} or not first.label:
        return answer
    rest = [
        _root(item.label) == _root(first.label) if isinstance(item, Relation) else isinstance(item, Value)
        for item in answer.items
    ]
    if not all(rest) or any(isinstance(item, Relation) and set(item.ops) != {"="} for item in answer.items):
        return answer
    items = tuple(item.sides[-1] if isinstance(item, Relation) else item for item in answer.items)
    return Many(items, joiner="or")


def _root(label: str) -> str:
    """The unknown whose solutions x_1 and x_2 are; any other name as it is."""
    return label[0] if label[0] in "xz" and label[1:2] == "_" else label


def _assigned(many: Many) -> list[Answer]:
    """The items, or what they assign, by the names of the variables."""
    if all(isinstance(item, Relation) for item in many.items):
        relations = sorted(
            (item for item in many.items if isinstance(item, Relation)), key=lambda item: item.label
        )
        return [relation.sides[-1] for relation in relations]
    return list(many.items)


def _shape(many: Many) -> str:
    if not many.opener:
        return "tuple" if many.joiner == "assigned" else "bare"
    return {"(": "tuple", "{": "set", "<<": "tuple"}.get(many.opener, many.opener) + (
        "" if many.opener in ("{", "<<") or (many.opener, many.closer) == ("(", ")") else many.closer
    )


def _vector(answer: Answer) -> Sequence[Answer] | None:
    """The components of a row, a column or a tuple; None for anything else."""
    if isinstance(answer, Matrix):
        if len(answer.rows) == 1:
            return answer.rows[0]
        return [row[0] for row in answer.rows] if all(len(row) == 1 for row in answer.rows) else None
    if isinstance(answer, Many) and answer.opener in ("(", "<<", "["):
        return answer.items if not any(isinstance(item, Many) for item in answer.items) else None
    return None


def _rows(answer: Answer) -> Sequence[Sequence[Answer]] | None:
    """The rows of a matrix, or of a list of lists of one length."""
    if isinstance(answer, Matrix):
        return answer.rows
    if (
        isinstance(answer, Many)
        and answer.opener
        and all(isinstance(row, Many) and row.opener for row in answer.items)
    ):
        rows = [row.items for row in answer.items if isinstance(row, Many)]
        return rows if len({len(row) for row in rows}) == 1 else None
    return None


def _conditions(relation: Relation) -> list[tuple[str, Term]]:
    """Each link of the chain as `term op 0` with op one of =, !=, >, >=; empty where a side is no value."""
    found: list[tuple[str, Term]] = []
    for left, op, right in zip(relation.sides, relation.ops, relation.sides[1:], strict=False):
        left = _as_value(left)
        if not isinstance(left, Value) or not isinstance(right, Value) or op not in _TURNED:
            return []
        sides = (right.term, left.term) if op in ("<", "<=") else (left.term, right.term)
        found.append((_TURNED[op], difference(*sides)))
    return found


_TURNED = {"=": "=", "!=": "!=", ">": ">", ">=": ">=", "<": ">", "<=": ">="}


def _as_value(side: Answer) -> Answer:
    """The variable that a one-letter label is."""
    if isinstance(side, Words) and len(side.text) == 1:
        return Value(Term("var", name=side.text))
    return side


def _is_names(answer: Answer) -> bool:
    """(x, y) on the left of an equation."""
    return isinstance(answer, Many) and all(map(is_symbol, answer.items))


def _sum_asked_for(relation: Relation) -> Value | None:
    """The number in m + n = 480, which a problem asks for: a linear form in several letters on the left."""
    first, last = relation.sides[0], relation.sides[-1]
    if set(relation.ops) != {"="} or not isinstance(first, Value) or not isinstance(last, Value):
        return None
    is_form = len(variables(first.term)) > 1 and operators(first.term) <= {"add", "mul", "neg", "num", "var"}
    others = all(isinstance(side, Value) and not free_variables(side) for side in relation.sides[1:])
    return last if is_form and others and not variables(first.term) & {"x", "y"} else None


def _is_degrees(value: Value) -> bool:
    return value.unit == Unit((("degree", 1),))


def _is_time(ratio: Ratio) -> bool:
    """Whether a:b can be a time of day."""
    hours, *rest = (part.term.value if isinstance(part, Value) else None for part in ratio.parts)
    return hours is not None and hours < 25 and all(part is not None and 10 <= part < 60 for part in rest)


def _has_zero(*ratios: Ratio) -> bool:
    """Whether a part is zero: then all ratios would be proportional."""
    parts = [part for ratio in ratios for part in ratio.parts]
    return any(isinstance(part, Value) and part.term.value == 0 for part in parts)


def _in_base(based: Based) -> int | None:
    try:
        return int(based.digits, based.base)
    except ValueError:
        return None


def _one_by_one(value: Value) -> Value:
    """Dozens as what they are dozens of."""
    unit = value.unit
    if unit is None or "dozen" not in unit.words:
        return value
    rest = Unit(unit.powers, unit.scale, unit.words - {"dozen"})
    return Value(make("mul", number(12), value.term), None if rest.empty else rest, value.percent)


def _kelvin(value: Value) -> Term | None:
    """A temperature on the absolute scale; None for anything else."""
    unit = value.unit
    if unit is None or len(unit.powers) != 1 or unit.powers[0][1] != 1:
        return None
    offset, factor = {
        "K": (Fraction(0), unit.scale),
        "celsius": (Fraction(27_315, 100), unit.scale),
        "fahrenheit": (Fraction(45_967, 180), Fraction(5, 9)),
    }.get(unit.powers[0][0], (None, None))
    if offset is None or factor is None:
        return None
    return make("add", make("mul", number(factor), value.term), number(offset))


def _present(term: Term | None) -> Term:
    assert term is not None
    return term


def _scaled(term: Term, scale: Fraction) -> Term:
    return term if scale == 1 else make("mul", number(scale), term)


def _letters(answer: Answer) -> str:
    """Variables side by side as the word that they spell, in order: `on` is not `no`."""
    if isinstance(answer, Words):
        return answer.text
    if isinstance(answer, Value) and answer.unit is None and not answer.percent:
        factors = answer.term.args if answer.term.op == "mul" else (answer.term,)
        if all(factor.op in ("var", "const") and len(factor.name) == 1 for factor in factors):
            return plain_words("".join(factor.name for factor in factors))
    return ""
