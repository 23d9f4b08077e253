"""What an answer is worth."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence

from polyturn.envs.rewards import exact_match, normalise_answer
from polyturn.envs.search.styles import AnswerForm, RewardName, SearchStyle
from polyturn.envs.search.tags import last_block

ANSWER = ("<answer>", "</answer>")
EXACT, FORMAT, ATTEMPT = 0.8, 0.2, 0.1
"""Search-R1's rewards with format: 1.0 right and well formed, 0.8 right, 0.2 well formed, 0.1 an answer, else 0."""


def find_answer(style: SearchStyle, text: str) -> str | None:
    """The answer that stands in a policy's message; None without one in the style's form."""
    form: AnswerForm = style.answer
    if form == "text":
        return text.strip()
    if form == "boxed":
        block = last_block(text, style.tags.answer) if style.tags else text
        return None if block is None else _last_box(block)
    inside = last_block(text, style.tags.answer if style.tags else ANSWER)
    return None if inside is None else inside.strip()


def reward_parts(
    reward: RewardName, answer: str | None, golds: Sequence[str], *, well_formed: bool, missing: float = 0.0
) -> Mapping[str, float]:
    """The parts of a reward; their sum is its value.

    Args:
        answer: None where the episode ended without one.
        golds: Any of them is right.
        well_formed: Whether every turn has its one thought and its one action.
        missing: The reward without an answer.
    """
    if reward == "f1":
        return {"f1": missing if answer is None else max(token_f1(answer, gold) for gold in golds)}
    exact = 0.0 if answer is None else exact_match(answer, golds)
    if reward == "exact_match":
        return {"exact_match": missing if answer is None else exact}
    attempted = answer is not None and not exact and not well_formed
    return {"exact_match": EXACT * exact, "format": FORMAT * well_formed, "attempt": ATTEMPT * attempted}


def token_f1(answer: str, gold: str) -> float:
    """Harmonic mean of precision and recall of the words, with their counts, after normalisation (SQuAD, 1606.05250).

    Yes and no are right or wrong as a whole, and so is a gold answer without words.
    """
    found, wanted = normalise_answer(answer).split(), normalise_answer(gold).split()
    if found == wanted:
        return 1.0
    if not found or not wanted or {" ".join(found), " ".join(wanted)} & {"yes", "no", "noanswer"}:
        return 0.0
    shared = (Counter(found) & Counter(wanted)).total()
    return 2 * shared / (len(found) + len(wanted))


def _last_box(text: str) -> str | None:
    """What stands in the last `\\boxed{...}` whose braces are balanced."""
    start = text.rfind("\\boxed{")
    if start < 0:
        return None
    depth = 0
    for index in range(start + len("\\boxed"), len(text)):
        depth += {"{": 1, "}": -1}.get(text[index], 0)
        if depth == 0:
            return text[start + len("\\boxed{") : index].strip()
    return None
