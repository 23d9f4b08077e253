"""Rewards that compare texts."""

from __future__ import annotations

import re
import string
from collections.abc import Iterable

_ARTICLES = re.compile(r"\b(a|an|the)\b")
_PUNCTUATION = str.maketrans("", "", string.punctuation)


def normalise_answer(text: str) -> str:
    """Lower case, without ASCII punctuation and English articles, white space squeezed (SQuAD, arXiv 1606.05250)."""
    return " ".join(_ARTICLES.sub(" ", text.lower().translate(_PUNCTUATION)).split())


def exact_match(answer: str, gold: str | Iterable[str]) -> float:
    """1.0 if the normalised answer equals any gold answer, else 0.0."""
    golds = (gold,) if isinstance(gold, str) else gold
    normalised = normalise_answer(answer)
    return float(any(normalised == normalise_answer(text) for text in golds))
