"""Units of measurement: what a number is a number of. Units that convert have a scale, others are words."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction

from polyturn.envs.rewards.math.lexer import Token
from polyturn.envs.rewards.math.vocabulary import NOT_UNITS

_INCH, _POUND = Fraction(254, 10_000), Fraction(45_359_237, 100_000)
_KNOWN: dict[str, tuple[str, int, Fraction]] = {}
"""Unit -> base, power of the base, how many of it."""


def _define(base: str, power: int, scale: Fraction | int, names: str) -> None:
    for name in names.split():
        _KNOWN[name] = (base, power, Fraction(scale))


_define("m", 1, 1, "m meter metre")
_define("m", 1, Fraction(1, 1000), "mm millimeter millimetre")
_define("m", 1, Fraction(1, 100), "cm centimeter centimetre")
_define("m", 1, 1000, "km kilometer kilometre")
_define("m", 1, _INCH, "in inch inche")
_define("m", 1, _INCH * 12, "ft foot feet")
_define("m", 1, _INCH * 36, "yd yard")
_define("m", 1, _INCH * 63_360, "mi mile")
_define("g", 1, 1, "g gram gramme")
_define("g", 1, Fraction(1, 1000), "mg milligram")
_define("g", 1, 1000, "kg kilogram kilo")
_define("g", 1, _POUND, "lb pound")
_define("g", 1, _POUND / 16, "oz ounce")
_define("s", 1, 1, "s sec second")
_define("s", 1, 60, "min minute")
_define("s", 1, 3600, "h hr hour")
_define("s", 1, 86_400, "day")
_define("s", 1, 604_800, "week wk")
_define("month", 1, 1, "month")
_define("month", 1, 12, "year yr")
_define("m", 3, Fraction(1, 1000), "l liter litre")
_define("m", 3, Fraction(1, 1_000_000), "ml milliliter millilitre cc")
_define("dollar", 1, 1, "dollar usd $ buck")
_define("dollar", 1, Fraction(1, 100), "cent ¢")
_define("euro", 1, 1, "euro eur €")
_define("pound sterling", 1, 1, "gbp £ pounds")
_define("yen", 1, 1, "yen ¥")
_define("degree", 1, 1, "degree deg")
_define("celsius", 1, 1, "celsius")
_define("fahrenheit", 1, 1, "fahrenheit")
_define("am", 1, 1, "am")
_define("pm", 1, 1, "pm")
_define("dozen", 1, 1, "dozen")

_SPEEDS = {"mph": "mile / hour", "kph": "km / hour", "kmh": "km / hour", "mpg": "mile / gal"}
_EXPONENT_WORDS = {"square": 2, "sq": 2, "squared": 2, "cubic": 3, "cubed": 3}


@dataclass(frozen=True, slots=True)
class Unit:
    """Bases with their powers, the factor to them, and the words that are no known unit."""

    powers: tuple[tuple[str, int], ...]
    scale: Fraction = Fraction(1)
    words: frozenset[str] = frozenset()

    @property
    def empty(self) -> bool:
        return not self.powers and not self.words

    def agrees(self, other: Unit) -> bool:
        """Whether the two measure the same thing."""
        if self.powers != other.powers:
            return False
        return self.words <= other.words or other.words <= self.words if self.words and other.words else True


def read_unit(tokens: Sequence[Token]) -> Unit | None:
    """The unit that words, powers and slashes spell; None if they spell none."""
    powers: dict[str, int] = {}
    scale, words = Fraction(1), set()
    sign, pending = 1, 1
    last: tuple[str, int, Fraction] | None = None
    pieces = _pieces(tokens)
    for index, piece in enumerate(pieces):
        if piece in ("/", "per"):
            sign, last = -1, None
        elif piece in ("*", ".", "-"):
            last = None
        elif piece.startswith("^"):
            if last is None or not piece[1:].lstrip("-").isdigit() or abs(int(piece[1:])) > 9:
                return None
            extra = int(piece[1:]) - 1
            powers[last[0]] = powers.get(last[0], 0) + sign * last[1] * extra
            scale *= last[2] ** (sign * extra)
        elif piece in _EXPONENT_WORDS and index + 1 < len(pieces) and _known(pieces[index + 1]):
            pending = _EXPONENT_WORDS[piece]
        elif known := _known(piece):
            last = known
            powers[known[0]] = powers.get(known[0], 0) + sign * known[1] * pending
            scale *= known[2] ** (sign * pending)
            pending = 1
        elif _singular(piece) not in NOT_UNITS:
            if not re.fullmatch(r"[a-z][a-z'-]*", piece):
                return None
            words.add(_singular(piece))
    return Unit(
        tuple(sorted((base, power) for base, power in powers.items() if power)), scale, frozenset(words)
    )


def _pieces(tokens: Sequence[Token]) -> list[str]:
    pieces: list[str] = []
    exponent = False
    for token in tokens:
        if token.kind == "number" and exponent:
            pieces.append(f"^{token.value}")
            exponent = False
        elif token.kind == "^":
            exponent = True
        elif token.kind == "command" and token.text == "degree":
            pieces.append("degree")
        elif token.kind in ("text", "name", "fn", "/", "*", ".", "-"):
            pieces += _words(token.text)
        elif token.text in ("{", "}", "(", ")"):
            continue
        else:
            pieces.append("?")
    if pieces[:1] == ["degree"] and pieces[1:] in (["c"], ["f"], ["celsius"], ["fahrenheit"]):
        return ["celsius" if pieces[1].startswith("c") else "fahrenheit"]
    return [piece for piece in pieces if piece]


def _words(text: str) -> list[str]:
    text = re.sub(r"\b([ap])\.\s?m\b\.?", r"\1m", text.lower())
    words: list[str] = []
    for word in re.findall(r"[a-z][a-z'-]*|\^-?\d+|[/*$€£¢¥]|\d+", text):
        words += _SPEEDS[word].split() if word in _SPEEDS else [word]
    return words


def _known(word: str) -> tuple[str, int, Fraction] | None:
    return _KNOWN.get(word) or _KNOWN.get(_singular(word))


def _singular(word: str) -> str:
    if word.endswith("ies") and len(word) > 4:
        return word[:-3] + "y"
    if word.endswith(("shes", "ches", "xes", "sses")):
        return word[:-2]
    return word[:-1] if word.endswith("s") and not word.endswith("ss") and len(word) > 2 else word
