"""Whether a label can be paid at all, asked before anything starts."""

from __future__ import annotations

from typing import Any

from polyturn.envs.rewards.math.decide import decide
from polyturn.envs.rewards.math.extract import gold_answer
from polyturn.envs.rewards.math.labels import gold_texts
from polyturn.envs.rewards.math.verdict import Reason, Undecided, Unreadable
from polyturn.envs.rewards.math.verifier import shared_verifier

_WHY: dict[Reason, str] = {
    "no_answer": "it is empty",
    "unreadable": "it can be read neither as mathematics nor as words",
    "undefined": "it has no value",
    "too_large": "it is beyond the verifier's bounds",
    "too_costly": "comparing it takes too much processor time",
}


def unpayable_reason(label: Any) -> str | None:
    """Why no reply can be paid for a label, such as `((`; None where one can.

    A label is compared with itself in another spelling; of several right answers one that can be paid is enough.
    """
    try:
        golds = gold_texts(label)
    except ValueError as error:
        return str(error)
    reasons = [_unpayable(gold) for gold in golds]
    return None if None in reasons else reasons[0]


def _unpayable(gold: str) -> str | None:
    answer = gold_answer(gold)
    if answer.strip().lower() == "nan":
        return "'nan': a missing value that was made a text"
    correct, reason = _compared(answer, f"{{{answer}}}")
    if correct:
        return None
    return f"{answer!r:.100}: {_WHY.get(reason, 'it does not equal itself in another spelling')}"


def _compared(gold: str, spelled: str) -> tuple[bool, Reason]:
    try:
        return decide(gold, spelled, deep=False)
    except Undecided:  # irrational values: a worker could compare them
        return True, "symbolic"
    except Unreadable:
        verdict = shared_verifier().verify(gold, spelled, mode="boxed")
        return verdict.correct or not verdict.decided, verdict.reason
