"""What a label may be: a text, a number, or several right answers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

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
