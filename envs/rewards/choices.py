"""Which of several choices an answer names."""

from __future__ import annotations

import re

LETTERS = "ABCDEFGHIJ"

_LETTER = r"[*_(\[\"'`]{0,3}([A-J])[*_)\]\"'`]{0,3}"
# Spaces are few, so that no run of them is read again and again.
_S = r"\s{0,8}"
_ALSO = rf"(?:{_S}(?:,|/|\||&|\+|\bor\b|\band\b|(?=[(\[])){_S}(?:or\s{{1,8}}|and\s{{1,8}})?{_LETTER}(?![A-Za-z0-9]))*"
_DECLARED = re.compile(
    rf"(?:\banswer|\bchoice|\boption){_S}(?:is|:|=)?{_S}(?:\boption\s{{1,8}}|\bchoice\s{{1,8}})?{_LETTER}"
    rf"(?![A-Za-z0-9'])({_ALSO})",
    re.IGNORECASE,
)
_ALONE = re.compile(rf"{_LETTER}{_S}[.):]?({_ALSO}){_S}\.?")
_BEGINS = re.compile(r"[*_(\[]{0,3}([A-J])[*_]{0,2}[.):][*_]{0,2}\s++(\S.*)")
_FIRST = re.compile(rf"{_LETTER}(?![A-Za-z0-9'])")
_WRAPPED = re.compile(r"\\(?:boxed|fbox|text|textbf|mathrm)\s*+\{([^{}]*+)\}")
_SINGLE = re.compile(r"(?<![A-Za-z0-9])([A-J])(?![A-Za-z0-9'])")


def stated_choice(text: str) -> str | None:
    """The one letter that an answer names: `B`, `(B)`, `B. Paris`, "The answer is B"; None for none or several."""
    text = _WRAPPED.sub(r"\1", _WRAPPED.sub(r"\1", text))
    declared = [
        letter
        for match in _DECLARED.finditer(text)
        # The words are found in any case; the letter must be a capital, or "the answer is a" would be a choice.
        for letter in (match[1], *_SINGLE.findall(match[2] or ""))
        if letter.isupper()
    ]
    if not declared:
        lines = [line.strip() for line in text.strip().splitlines() if line.strip()]
        for line in lines[-1:] + lines[:1]:
            if alone := _ALONE.fullmatch(line):
                declared += [alone[1], *_SINGLE.findall(alone[2] or "")]
            elif begins := _BEGINS.fullmatch(line):
                rest = _FIRST.match(begins[2])
                declared += [begins[1], *([rest[1]] if rest and rest[1] != "I" else ())]
    return declared[0] if len(set(declared)) == 1 else None
