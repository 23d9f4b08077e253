"""Finds the code in a model's answer."""

from __future__ import annotations

_PYTHON = frozenset(("", "python", "py", "python3"))
_END_OF_THOUGHT = "</think>"
_FENCE = "```"


def find_code(text: str) -> str | None:
    """The last fenced block of Python after the thinking; None if there is none.

    A model that fences nothing has not answered in the form that it was asked for. Linear in the text's length.
    """
    found: str | None = None
    block: list[str] | None = None
    language = ""
    for line in text.rpartition(_END_OF_THOUGHT)[2].split("\n"):
        mark = line.strip()
        if block is None:
            if mark.startswith(_FENCE):
                block, words = [], mark.removeprefix(_FENCE).split()
                language = words[0].lower() if words else ""
        elif mark == _FENCE:
            if language in _PYTHON:
                found = "\n".join([*block, ""])
            block = None
        else:
            block.append(line)
    return found
