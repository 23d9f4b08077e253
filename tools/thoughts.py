"""The marks that models put around their thoughts, and how a text is told from the thought before it."""

from __future__ import annotations

import re

THOUGHT_MARKS: dict[str, str] = {
    "<think>": "</think>",
    "[THINK]": "[/THINK]",
    "<|START_THINKING|>": "<|END_THINKING|>",
    "<|channel>thought": "<channel|>",
    "<seed:think>": "</seed:think>",
    "◁think▷": "◁/think▷",
    "<thinking>": "</thinking>",
    "<thought>": "</thought>",
    "<longcat_think>": "</longcat_think>",
    "<|inner_prefix|>": "<|inner_suffix|>",
}
"""What closes a thought, by what opens it: of most, of Magistral, Cohere, Gemma 4, Seed-OSS and Kimi-VL; of models that
are told to think in prose, of EXAONE Deep, LongCat and Apertus.
"""

ANY_OPENING = re.compile("|".join(map(re.escape, THOUGHT_MARKS)))
ANY_CLOSING = re.compile("|".join(map(re.escape, THOUGHT_MARKS.values())))


def is_open(text: str) -> bool:
    """Whether a text ends within a thought."""
    last = max((found.end() for found in ANY_OPENING.finditer(text)), default=-1)
    return last >= 0 and ANY_CLOSING.search(text, last) is None


def split_thought(text: str) -> tuple[str | None, str]:
    """The thought that a text begins with, and the text behind it; None where it does not think.

    A thought that is never closed is all of the text. A mark that closes what nothing opened ends a thought that began
    before the text, in the prompt.
    """
    opening = ANY_OPENING.match(text.lstrip())
    if opening is not None:
        inside = text.lstrip()[opening.end() :]
        thought, _, rest = inside.partition(THOUGHT_MARKS[opening[0]])
        return thought.strip(), rest.strip()
    closing = ANY_CLOSING.search(text)
    if closing is None or ANY_OPENING.search(text) is not None:
        return None, text
    return text[: closing.start()].strip(), text[closing.end() :].strip()
