"""What an answer can be: a value, words, several answers, a relation, sets, a matrix, digits in a base, a ratio."""

from __future__ import annotations

from dataclasses import dataclass

from polyturn.envs.rewards.math.terms import Term, variables
from polyturn.envs.rewards.math.units import Unit
from polyturn.envs.rewards.math.verdict import Unreadable


@dataclass(frozen=True, slots=True)
class Words:
    """A text: lower case, without punctuation and articles."""

    text: str


@dataclass(frozen=True, slots=True)
class Value:
    """An expression, what it is a number of, and whether a percent sign follows it."""

    term: Term
    unit: Unit | None = None
    percent: bool = False


@dataclass(frozen=True, slots=True)
class Many:
    """One answer or more: bare, or in brackets. `joiner` is `or` or `and` where words part them, else a comma.

    Raises:
        Unreadable: there is none.
    """

    items: tuple[Answer, ...]
    opener: str = ""
    closer: str = ""
    joiner: str = ","

    def __post_init__(self) -> None:
        if not self.items:
            raise Unreadable("a list of nothing")


@dataclass(frozen=True, slots=True)
class Relation:
    """sides[0] ops[0] sides[1] ops[1] ...; `label` where the first side is a name and no value."""

    sides: tuple[Answer, ...]
    ops: tuple[str, ...]
    label: str = ""


@dataclass(frozen=True, slots=True)
class Combined:
    """Sets joined by `cup`, `cap` or `setminus`, from the left."""

    parts: tuple[Answer, ...]
    ops: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Named:
    """A set with a name: R, Z, Q, N, C, or empty."""

    name: str


@dataclass(frozen=True, slots=True)
class Matrix:
    """Rows of one length, and one at least. Raises `Unreadable` for others."""

    rows: tuple[tuple[Answer, ...], ...]

    def __post_init__(self) -> None:
        if len({len(row) for row in self.rows}) != 1:
            raise Unreadable("rows of different lengths")


@dataclass(frozen=True, slots=True)
class Based:
    """Digits in a base."""

    digits: str
    base: int


@dataclass(frozen=True, slots=True)
class Ratio:
    """a:b, a ratio or a time of day."""

    parts: tuple[Answer, ...]
    unit: Unit | None = None


@dataclass(frozen=True, slots=True)
class Clock:
    """A time of day. `half` is `am` or `pm` where it was given; then the hour is of 24."""

    hour: int
    minute: int
    second: int = 0
    half: str = ""

    def same(self, other: Clock) -> bool:
        """Whether both can be the same time: 5:30 is that of the morning and that of the afternoon."""
        if (self.minute, self.second) != (other.minute, other.second):
            return False
        if bool(self.half) == bool(other.half):
            return self.hour == other.hour
        plain = other if self.half else self
        return self.hour == other.hour if plain.hour > 12 else self.hour % 12 == other.hour % 12


@dataclass(frozen=True, slots=True)
class Cases:
    """A function by cases: each value with the condition under which it holds, None for all others."""

    rows: tuple[tuple[Answer, Answer | None], ...]


Answer = Words | Value | Many | Relation | Combined | Named | Matrix | Based | Ratio | Clock | Cases


def is_symbol(answer: Answer) -> bool:
    """Whether an answer is one variable and nothing else."""
    return (
        isinstance(answer, Value) and answer.term.op == "var" and answer.unit is None and not answer.percent
    )


def free_variables(answer: Answer) -> frozenset[str]:
    """The variables of a value; none for other answers."""
    return variables(answer.term) if isinstance(answer, Value) else frozenset()
