"""What a label may be, what the verifier says about one answer, and the ways in which it can fail to read one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

Label = str | float | Sequence[str | float]


def gold_texts(label: Any) -> tuple[str, ...]:
    """The right answers that a label names: a text, a number, or a list of such, of which each is right.

    Raises:
        ValueError: it names none.
    """
    golds = label if isinstance(label, list | tuple) else (label,)
    if not golds or not all(_is_answer(gold) for gold in golds):
        raise ValueError(
            "math: the label must be a number or a text with the answer, or a list of right answers, not"
            f" {label!r:.200}"
        )
    return tuple(str(gold) for gold in golds)


def _is_answer(gold: Any) -> bool:
    if isinstance(gold, float):
        return abs(gold) < float("inf")  # false for NaN too
    return isinstance(gold, str | int) and not isinstance(gold, bool) and bool(str(gold).strip())


Reason = Literal[
    "exact",
    "number",
    "words",
    "choice",
    "structure",
    "symbolic",
    "no_answer",
    "hedge",
    "unreadable",
    "undefined",
    "too_large",
    "too_costly",
    "timeout",
    "worker_died",
    "failed",
]
"""How a verdict came about.

`exact`: the same text; `number`: exact rational arithmetic; `words`, `choice`: texts and option letters; `structure`:
the answers are of different kinds or sizes, or sets, intervals and relations of equal parts; `symbolic`: decided by
high-precision evaluation or by math-verify in a worker. The others say why there is no answer to compare:
`no_answer`: none was given; `hedge`: several at once; `unreadable`: the text is no mathematics that can be read;
`undefined`: it has no value, as 1/0; `too_large`: it exceeds the caps; `too_costly`: comparing it takes more processor
time or memory than any answer may. The last three say nothing about the answer: `timeout`: the worker had no processor
for so long that it was given up; `worker_died`: somebody ended it; `failed`: a fault in the verifier.
"""
UNDECIDED: frozenset[Reason] = frozenset(("timeout", "worker_died", "failed"))


class Unverified(RuntimeError):
    """Nothing could be found out about an answer: a failure of the grader, which is never worth 0."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Verdict:
    """Whether an answer is right, and how that was found."""

    correct: bool
    reason: Reason
    extracted: str | None = None
    """The answer as it was taken from the text; None where there was none."""
    seconds: float = 0.0

    @property
    def decided(self) -> bool:
        """False where the verdict says nothing about the answer."""
        return self.reason not in UNDECIDED

    def score(self) -> float:
        """1.0 for a right answer, 0.0 for a wrong one.

        Raises:
            Unverified: the verdict says nothing about the answer.
        """
        if not self.decided:
            raise Unverified(f"the answer could not be compared with the label: {self.reason}")
        return float(self.correct)


class Unreadable(ValueError):
    """The text is no mathematics that this reader knows; `foreign` names a construct that math-verify may know."""

    def __init__(self, text: str, *, foreign: bool = False) -> None:
        super().__init__(text)
        self.foreign = foreign


class TooLarge(ValueError):
    """A text or a value exceeds the caps."""


class Undefined(ArithmeticError):
    """An expression has no value, as 1/0."""


class NotRational(ValueError):
    """The value of an expression is not known to be a rational number."""


class Undecided(Exception):
    """The comparison needs more than exact arithmetic: a worker has to make it."""
