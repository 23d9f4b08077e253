"""JSON that is broken in a way that leaves one meaning, as JSON. docs/dialects.md has the rules."""

from __future__ import annotations

import re

_TOKEN = re.compile(
    r"""\s*(?:
        (?P<double>"[^"\\]*(?:\\.[^"\\]*)*")
      | (?P<single>'[^'\\]*(?:\\.[^'\\]*)*')
      | (?P<word>[A-Za-z]+)
      | (?P<number>-?[0-9][0-9.eE+-]*)
      | (?P<mark>[{}\[\],:])
      | (?P<end>\Z)
    )""",
    re.DOTALL | re.VERBOSE,
)
_FENCE = "```"
_WORDS = {"True": "true", "False": "false", "None": "null", "true": "true", "false": "false", "null": "null"}
_CLOSING = {"{": "}", "[": "]"}
_ESCAPE = re.compile(r'\\(.)|"', re.DOTALL)
_SHARED_ESCAPES = '"\\bfnrtu'
"""Characters that mean the same behind a backslash in JSON and in Python."""


def without_fence(text: str) -> str:
    """What stands in a code fence that is all of a text; any other text as it is."""
    fenced = text.strip()
    language, line_feed, inside = fenced.removeprefix(_FENCE).partition("\n")
    is_fence = fenced.startswith(_FENCE) and line_feed and inside.endswith(_FENCE)
    return (
        inside.removesuffix(_FENCE)
        if is_fence and not language.strip(" abcdefghijklmnopqrstuvwxyz_")
        else text
    )


def repaired(text: str, *, may_close: bool) -> list[str] | None:
    """The JSON texts of the objects and lists that a text is; None where it is none, or could mean several things.

    Mended are commas before a closing bracket, texts in single quotes, Python's True, False and None, brackets that are
    missing at the end or too many there, a doubled first brace, and several values in a row. Inside of double quotes
    nothing changes but `\\'`. Takes time linear in the text. What comes out need not be valid JSON: a decoder says.

    Args:
        may_close: Whether brackets may be missing at the end; not where the text was cut off.
    """
    values: list[str] = []
    tokens: list[str] = []
    open_brackets: list[str] = []
    is_surplus = False
    position = 0
    if (doubled := re.match(r"\s*\{\s*(?=\{)", text)) is not None:
        position = doubled.end()
    while True:
        found = _TOKEN.match(text, position)
        if found is None:
            return None
        position = found.end()
        if found.lastgroup == "end":
            break
        token = _as_json(found)
        if token is None:
            return None
        if not open_brackets:
            # Between values. Behind a bracket too many nothing may come but further ones.
            if token in _CLOSING and not is_surplus:
                tokens = [token]
                open_brackets.append(token)
            elif values and token in ("}", "]"):
                is_surplus = True
            elif not (values and token == "," and not is_surplus):
                return None
            continue
        if token in _CLOSING:
            open_brackets.append(token)
        elif token in ("}", "]"):
            if _CLOSING[open_brackets.pop()] != token:
                return None
            if tokens[-1] == "," and tokens[-2] not in _CLOSING:
                tokens.pop()
        tokens.append(token)
        if not open_brackets:
            values.append(" ".join(tokens))
    if open_brackets:
        # Cut behind a comma, a colon or a bracket: something is missing that nobody can know.
        if not may_close or tokens[-1] in (",", ":") or tokens[-1] in _CLOSING:
            return None
        tokens += [_CLOSING[bracket] for bracket in reversed(open_brackets)]
        values.append(" ".join(tokens))
    return values or None


def _as_json(found: re.Match[str]) -> str | None:
    """One token as JSON writes it; None where JSON has nothing like it."""
    kind = found.lastgroup
    assert kind is not None
    written = found[kind]
    if kind == "word":
        return _WORDS.get(written)
    if kind == "double" and "\\'" in written:
        return _requoted(written[1:-1])
    return _requoted(written[1:-1]) if kind == "single" else written


def _requoted(inside: str) -> str | None:
    """A text in double quotes; None where a backslash in it means one thing in JSON and another in Python."""
    unshared = False

    def escaped(found: re.Match[str]) -> str:
        nonlocal unshared
        if found[1] is None:
            return '\\"'
        if found[1] == "'":
            return "'"
        unshared = unshared or found[1] not in _SHARED_ESCAPES
        return found[0]

    mended = _ESCAPE.sub(escaped, inside)
    return None if unshared else f'"{mended}"'
