"""The marks that models put around their thoughts."""

from __future__ import annotations

import re

THOUGHT_MARKS: dict[str, str] = {
    "<think>": "</think>",
    "[THINK]": "[/THINK]",
    "<|START_THINKING|>": "<|END_THINKING|>",
    "<|channel>thought": "<channel|>",
    "<seed:think>": "</seed:think>",
    "◁think▷": "◁/think▷",
}
"""What closes a thought, by what opens it: Qwen, DeepSeek, GLM and others; Magistral; Cohere; Gemma 4; Seed; Kimi-VL."""

ANY_OPENING = re.compile("|".join(map(re.escape, THOUGHT_MARKS)))
ANY_CLOSING = re.compile("|".join(map(re.escape, THOUGHT_MARKS.values())))


def is_open(text: str) -> bool:
    """Whether a text ends within a thought."""
    last = max((found.end() for found in ANY_OPENING.finditer(text)), default=-1)
    return last >= 0 and ANY_CLOSING.search(text, last) is None
