"""How alike two texts are."""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Iterable

from polyturn.envs.rewards.answers import is_refusal

_ARTICLES = re.compile(r"\b(a|an|the)\b")
_PUNCTUATION = str.maketrans("", "", string.punctuation)
_YES_NO = frozenset(("yes", "no", "noanswer"))


def normalise_answer(text: str) -> str:
    """Lower case, without ASCII punctuation and English articles, white space squeezed (SQuAD, arXiv 1606.05250)."""
    return " ".join(_ARTICLES.sub(" ", text.lower().translate(_PUNCTUATION)).split())


def exact_match(answer: str, gold: str | Iterable[str]) -> float:
    """1.0 if the normalised answer equals any gold answer, else 0.0.

    A gold answer of which nothing is left, such as "A" or "+", is compared as it stands. An empty answer never matches.
    """
    return float(any(_same(answer, text) for text in _golds(gold)))


def f1(answer: str, gold: str | Iterable[str]) -> float:
    """The best F1 over gold answers between the bags of normalised words (SQuAD, arXiv 1606.05250), from 0 to 1.

    As in HotpotQA (arXiv 1809.09600), yes and no must match exactly. A refusal has no words in common with an answer.
    """
    return max((_f1(answer, text) for text in _golds(gold)), default=0.0)


def contains(answer: str, gold: str | Iterable[str], *, max_words: int = 64) -> float:
    """1.0 if any gold answer stands in the answer as whole words, both normalised.

    0.0 for a refusal, and for an answer of more than `max_words` words: it could hold every guess there is.
    """
    words = f" {normalise_answer(answer)} "
    if is_refusal(answer) or len(words.split()) > max_words:
        return 0.0
    golds = (normalise_answer(text) for text in _golds(gold))
    return float(any(text and f" {text} " in words for text in golds))


def _golds(gold: str | Iterable[str]) -> tuple[str, ...]:
    return (gold,) if isinstance(gold, str) else tuple(gold)


def _same(answer: str, gold: str) -> bool:
    wanted = normalise_answer(gold)
    if wanted:
        return normalise_answer(answer) == wanted
    return bool(gold.strip()) and answer.strip().lower() == gold.strip().lower()


def _f1(answer: str, gold: str) -> float:
    if _same(answer, gold):
        return 1.0
    given, wanted = normalise_answer(answer), normalise_answer(gold)
    if is_refusal(answer) or given in _YES_NO or wanted in _YES_NO:
        return 0.0
    given_words, wanted_words = given.split(), wanted.split()
    common = sum((Counter(given_words) & Counter(wanted_words)).values())
    return 2 * common / (len(given_words) + len(wanted_words)) if common else 0.0
