"""Tokens of normalised mathematics: numbers, names, words, commands, brackets."""

from __future__ import annotations

import re
from dataclasses import dataclass
from fractions import Fraction

from polyturn.envs.rewards.math.verdict import TooLarge, Unreadable
from polyturn.envs.rewards.math.vocabulary import (
    BRACKETS,
    CLOSERS,
    CONSTANTS,
    FONTS,
    FUNCTIONS,
    GREEK,
    OPERATORS,
    SEPARATOR_WORDS,
    SHORT_WORDS,
    TEXT_COMMANDS,
    UNIT_SYMBOLS,
)

MAX_TOKENS = 8_000
MAX_EXPONENT = 400
"""Of a number written with an exponent: 1e999 is refused."""

_TOKEN = re.compile(
    r"""(?P<space>\s+)
    |(?P<number>(?:\d+(?:\.\d*)?|\.\d+)(?:[eE][+-]?\d+(?![\d.]))?)
    |\\(?P<command>[A-Za-z]+|.)
    |(?P<word>[^\W\d_]++)
    |(?P<two><=|>=|!=|==|->)
    |(?P<one>.)""",
    re.VERBOSE | re.DOTALL,
)
_THOUSANDS = re.compile(r"\d{1,3}(?:,\d{3})+(?:\.\d+)?(?!\d|,\d)")
_ARGUMENT = re.compile(r"(?<!\s)\s*+\{([^{}]*(?:\{[^{}]*\}[^{}]*)*)\}")
_ENVIRONMENT = re.compile(r"(?<!\s)\s*+\{([a-zA-Z]+\*?)\}(?:\{[lcr| ]*\})?")
_REPEATING = re.compile(
    r"(?<!\d)(\d*+)\.(\d*+)(?:\\overline\s*\{(\d+)\}|\\overline\s*(\d)|\\dot\s*\{?(\d)\}?|\((\d+)\))"
)
_JOINED = re.compile(r"(?<!\S)(or|and)(?!\S)", re.IGNORECASE)
_DOTTED = re.compile(r"(?<!\d)(\d*+)\.(\d{2,40})(?:\\ldots|\.\.\.++)")


@dataclass(frozen=True, slots=True)
class Token:
    """`kind`: number, name, const, fn, text, command, open, close, sep, or the operator itself."""

    kind: str
    text: str
    value: Fraction | None = None
    spaced: bool = False
    """Whether white space stands before it."""


def lex(text: str, *, thousands: bool = True) -> list[Token]:
    """The tokens of a normalised text.

    Args:
        thousands: Whether 1,000 outside of brackets is one number.

    Raises:
        Unreadable: a character that no answer has.
        TooLarge: too many tokens, or a number beyond the caps.
    """
    tokens: list[Token] = []
    position, spaced, level = 0, False, 0
    while position < len(text):
        if len(tokens) > MAX_TOKENS:
            raise TooLarge("too many tokens")
        if special := _special_number(text, position, thousands and level == 0, tokens):
            value, position = special
            tokens.append(Token("number", "", value, spaced))
            spaced = False
            continue
        found = _TOKEN.match(text, position)
        assert found is not None
        position = found.end()
        kind = found.lastgroup
        if kind == "space":
            spaced = True
            continue
        if kind == "number":
            tokens.append(Token("number", found[0], _decimal(found[0]), spaced))
        elif kind == "word":
            tokens.extend(_word(found[0], spaced))
        elif kind == "command":
            position = _command(text, position, found["command"], spaced, tokens)
        else:
            tokens.append(_symbol(found[0], spaced))
        if tokens and kind in ("one", "command"):
            last = tokens[-1]
            level += (last.kind == "open" and last.text != "{") - (last.kind == "close" and last.text != "}")
        spaced = False
    return tokens


def _special_number(
    text: str, position: int, thousands: bool, tokens: list[Token]
) -> tuple[Fraction, int] | None:
    """Numbers with thousands separators, and repeating decimals."""
    if not (text[position].isdigit() or text[position] == "."):
        return None
    if tokens and tokens[-1].kind in ("_", "command"):
        return None
    if (
        thousands
        and (found := _THOUSANDS.match(text, position))
        and not (position and text[position - 1] == ",")
    ):
        return Fraction(found[0].replace(",", "")), found.end()
    if found := _REPEATING.match(text, position):
        whole, fixed = found[1] or "0", found[2]
        period = found[3] or found[4] or found[5] or found[6]
        if len(fixed) + len(period) > MAX_EXPONENT:
            raise TooLarge("digits")
        return _repeating(whole, fixed, period), found.end()
    if found := _DOTTED.match(text, position):
        for size in range(1, len(found[2]) // 2 + 1):
            period = found[2][-size:]
            repeats = 3 if size == 1 else 2
            if found[2].endswith(period * repeats):
                return _repeating(found[1] or "0", found[2], period), found.end()
    return None


def _repeating(whole: str, fixed: str, period: str) -> Fraction:
    shift = 10 ** len(fixed)
    return Fraction(int(whole + fixed), shift) + Fraction(int(period), shift * (10 ** len(period) - 1))


def _decimal(text: str) -> Fraction:
    mantissa, _, exponent = text.lower().partition("e")
    if len(mantissa) > 4_000 or (exponent and (len(exponent) > 5 or abs(int(exponent)) > MAX_EXPONENT)):
        raise TooLarge("digits")
    whole, _, part = mantissa.partition(".")
    value = Fraction(int(whole + part or "0"), 10 ** len(part))
    return value * Fraction(10) ** int(exponent) if exponent else value


def _word(word: str, spaced: bool) -> list[Token]:
    """A run of letters: a function, a constant, a separator, a word, or variables side by side."""
    if not word.isascii():
        return [Token("text", word, None, spaced)]
    if len(word) == 1:
        return [Token("name", word, None, spaced)]
    if word in FUNCTIONS:
        return [Token("fn", FUNCTIONS[word], None, spaced)]
    if word in CONSTANTS:
        return [Token("const", CONSTANTS[word], None, spaced)]
    if word in GREEK:
        return [Token("name", word, None, spaced)]
    if word in SEPARATOR_WORDS:
        return [Token("sep", word, None, spaced)]
    if len(word) > 3 or word.lower() in SHORT_WORDS:
        return [Token("text", word, None, spaced)]
    for name in ("pi", "ln"):  # as in 2xpi
        if word.endswith(name) and len(word) == 3:
            kind = "const" if name == "pi" else "fn"
            return [Token("name", word[0], None, spaced), Token(kind, name)]
    return [Token("name", letter, None, spaced and index == 0) for index, letter in enumerate(word)]


def _command(text: str, position: int, command: str, spaced: bool, tokens: list[Token]) -> int:
    """Append what a LaTeX command stands for; returns the position after it."""
    if command in TEXT_COMMANDS:
        found = _ARGUMENT.match(text, position)
        if found is None:
            return position
        tokens.extend(_text(found[1], spaced))
        return found.end()
    if command in ("begin", "end"):
        found = _ENVIRONMENT.match(text, position)
        if found is None:
            raise Unreadable("an environment without a name")
        tokens.append(Token("open" if command == "begin" else "close", command, None, spaced))
        tokens.append(Token("env", found[1])) if command == "begin" else None
        return found.end()
    if command == "mathbb":
        found = _ARGUMENT.match(text, position)
        letter = found[1].strip() if found else text[position : position + 1]
        tokens.append(Token("set", letter, None, spaced))
        return found.end() if found else position + 1
    if command in FONTS:
        return position
    tokens.append(_simple_command(command, spaced))
    return position


def _simple_command(command: str, spaced: bool) -> Token:
    if command in BRACKETS:
        bracket = BRACKETS[command]
        return Token("close" if bracket in CLOSERS else "open", bracket, None, spaced)
    if command in OPERATORS:
        return Token(OPERATORS[command], command, None, spaced)
    if command in FUNCTIONS and command not in ("sqrt", "binom"):
        return Token("fn", FUNCTIONS[command], None, spaced)
    if command in CONSTANTS:
        return Token("const", CONSTANTS[command], None, spaced)
    if command in GREEK:
        return Token("name", command, None, spaced)
    if command == "\\":
        return Token("row", command, None, spaced)
    if command in ("$", "pounds", "euro"):
        return Token("currency", command, None, spaced)
    if command == "emptyset":
        return Token("set", "empty", None, spaced)
    return Token("command", command, None, spaced)


def _text(content: str, spaced: bool) -> list[Token]:
    """The tokens of the argument of \\text: separators, a variable or number, or words."""
    stripped = content.strip(" .")
    if stripped in SEPARATOR_WORDS or stripped in (",", ";"):
        return [Token("sep", stripped, None, spaced)]
    if stripped == "":
        return []
    if stripped[0].isdecimal() or (
        len(re.findall("[A-Za-z]", stripped)) < 2 and stripped not in UNIT_SYMBOLS and "\\" not in stripped
    ):
        return lex(stripped)
    parts = _JOINED.split(stripped)
    tokens: list[Token] = []
    for index, part in enumerate(parts):
        if index % 2:
            tokens.append(Token("sep", part.lower(), None, True))
        elif part:
            tokens += _text(part, True) if len(parts) > 1 else [Token("text", part, None, True)]
    return tokens


def _symbol(symbol: str, spaced: bool) -> Token:
    if symbol in "()[]{}":
        return Token("open" if symbol in "([{" else "close", symbol, None, spaced)
    if symbol in ",;":
        return Token("sep", symbol, None, spaced)
    if symbol in "+-*/^_=<>!|:%&'.":
        return Token(symbol, symbol, None, spaced)
    if symbol in ("<=", ">=", "!="):
        return Token(symbol, symbol, None, spaced)
    if symbol in "$€£¥₹":
        return Token("currency", symbol, None, spaced)
    raise Unreadable(symbol)
