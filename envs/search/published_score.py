"""How Search-R1 scores an answer (arXiv 2503.09516, `verl/utils/reward_score/qa_em.py`), so that figures compare.

It looks at all that follows the prompt: the last `<answer>` block of that, wherever it began, and any gold answer that
is equal after normalisation, also where normalisation leaves nothing. One thing is not as published: there the prompt
is looked at, too, so that an episode without an answer has the prompt's example, "Beijing", for its answer; here it
has none.
"""

from __future__ import annotations

from collections.abc import Iterable

from polyturn.envs.rewards import normalise_answer
from polyturn.envs.search.styles import last_block

ANSWER = ("<answer>", "</answer>")
_ACTIONS = ("</search>", "</answer>")


def published_answer(response: str) -> str | None:
    """The answer in all that follows the prompt; None where there is none."""
    inside = last_block(response, ANSWER)
    return None if inside is None else inside.strip()


def published_match(answer: str, golds: Iterable[str]) -> float:
    """1.0 if the normalised answer is any of the normalised gold answers, else 0.0."""
    given = normalise_answer(answer)
    return float(any(normalise_answer(gold) == given for gold in golds))


def cut_behind_action(turn: str) -> str:
    """A turn up to its first search, or where it has none to its first answer, as Search-R1 keeps it."""
    for closing in _ACTIONS:
        head, found, _ = turn.partition(closing)
        if found:
            return head + found
    return turn
