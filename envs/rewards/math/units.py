"""Numbers in words (`twenty-five`, `1.45 million`), and units of measurement in exact factors.

Words that are no known unit count things. The module is long for its table of units.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import NamedTuple

from polyturn.envs.rewards.math.tokens import NO_COUNTED_THINGS, NOT_UNITS, Token


def _indexed(words: str, start: int = 0, step: int = 1) -> dict[str, int]:
    return {word: start + step * index for index, word in enumerate(words.split())}


_ONES = _indexed(
    "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen seventeen"
    " eighteen nineteen"
)
_TENS = _indexed("twenty thirty forty fifty sixty seventy eighty ninety", 20, 10)
MULTIPLIERS = {"hundred": 100, "thousand": 1_000, "million": 10**6, "billion": 10**9, "trillion": 10**12}
MULTIPLIERS |= {"dozen": 12, "lakh": 10**5, "crore": 10**7, "tenthousand": 10**4, "hundredmillion": 10**8}
"""What a number before it is multiplied by."""

_ORDINAL_ONES = _indexed(
    "zeroth first second third fourth fifth sixth seventh eighth ninth tenth eleventh twelfth thirteenth fourteenth"
    " fifteenth sixteenth seventeenth eighteenth nineteenth"
)
_ORDINAL_TENS = _indexed(
    "twentieth thirtieth fortieth fiftieth sixtieth seventieth eightieth ninetieth", 20, 10
)
_ORDINAL_POWERS = {"hundredth": 100, "thousandth": 1_000, "millionth": 10**6}
_PARTS = {
    name: value
    for name, value in (_ORDINAL_ONES | _ORDINAL_TENS | _ORDINAL_POWERS).items()
    if name not in ("zeroth", "first", "second")
}
_PARTS |= {"half": 2, "halve": 2, "quarter": 4}
_ORDINAL = re.compile(r"(\d{1,9})(?:st|nd|rd|th)", re.IGNORECASE)
_WORD = re.compile(r"[A-Za-z]+")
NUMBER_WORDS = {**_ONES, **_TENS, "hundred": 100}
"""Single words."""


def part_named(word: str) -> int | None:
    """How many `tenths` or `thirds` make one; None for other words, quarters among them, which may be coins."""
    singular = _singular_word(word.lower())
    return _PARTS.get(singular) if singular not in ("quarter", "half") else None


def ordinal(text: str) -> int | None:
    """The place that a text names: `5th`, `second`, `twenty-first`; None for anything else."""
    text = text.strip().lower()
    if found := _ORDINAL.fullmatch(text):
        return int(found[1])
    *tens, last = re.split(r"[\s-]+", text)
    if last in _ORDINAL_ONES:
        if not tens:
            return _ORDINAL_ONES[last]
        return _TENS[tens[0]] + _ORDINAL_ONES[last] if len(tens) == 1 and tens[0] in _TENS else None
    return _ORDINAL_TENS.get(last) if not tens else None


def leading_number(text: str) -> tuple[Fraction, str] | None:
    """The number that a text begins with in words, and the rest; None where it begins with none."""
    words: list[str] = []
    ends: list[int] = []
    position = 0
    while found := _WORD.match(text, position):
        words.append(found[0].lower())
        ends.append(found.end())
        position = found.end()
        while position < len(text) and text[position] in " -\t":
            position += 1
        if len(words) == 16:
            break
    taken = _NumberReader(words).read()
    if taken is None:
        return None
    value, count = taken
    rest = text[ends[count - 1] :]
    return None if rest.startswith("-") else (value, rest)


class _NumberReader:
    """Reads as many words as make a number."""

    def __init__(self, words: Sequence[str]) -> None:
        self._words = words
        self._at = 0

    def read(self) -> tuple[Fraction, int] | None:
        negative = self._skip("minus", "negative")
        value = self._part("a", "an")
        if value is None:
            value = self._whole()
            if value is None:
                return None
            value = self._with_part(value)
        return (-value if negative else value), self._at

    def _word(self, ahead: int = 0) -> str:
        index = self._at + ahead
        return self._words[index] if index < len(self._words) else ""

    def _skip(self, *words: str) -> bool:
        if self._word() in words:
            self._at += 1
            return True
        return False

    def _part(self, *articles: str) -> Fraction | None:
        """half, a half, a quarter, a third: one part; `third` alone is a place."""
        if self._word() in ("half", "quarter") and not articles:
            return self._take_part(1)
        if self._word() == "half":
            return self._take_part(1)
        if self._word() in articles and _singular_word(self._word(1)) in _PARTS:
            self._at += 1
            return self._take_part(1)
        if self._word() in articles and self._word(1) in MULTIPLIERS:
            self._at += 1
        return None

    def _take_part(self, count: int) -> Fraction:
        self._at += 1
        part = Fraction(count, _PARTS[_singular_word(self._words[self._at - 1])])
        # half a dozen, half a million
        article = self._word() in ("a", "of") and self._word(1) in MULTIPLIERS
        if article or self._word() in MULTIPLIERS:
            self._at += 1 + article
            part *= MULTIPLIERS[self._words[self._at - 1]]
        return part

    def _whole(self) -> Fraction | None:
        """A whole number, or one with digits after `point`."""
        total, current, found = 0, 0, False
        last = 10**30
        while True:
            word = self._word()
            if word in _TENS and current % 100 == 0:
                current += _TENS[word]
                if self._word(1) in _ONES and 0 < _ONES[self._word(1)] < 10:
                    self._at += 1
                    current += _ONES[self._word()]
            elif word in _ONES and current % 100 == 0 and (current or not found or total):
                current += _ONES[word]
            elif word in ("hundred", "dozen") and current < 100:
                current = max(current, 1) * MULTIPLIERS[word]
            elif word in MULTIPLIERS and MULTIPLIERS[word] < last:
                last = MULTIPLIERS[word]
                total, current = total + max(current, 1) * last, 0
            elif word == "and" and found and self._continues():
                self._at += 1
                continue
            else:
                break
            found = True
            self._at += 1
        if not found:
            return None
        value = Fraction(total + current)
        digits = ""
        if self._word() == "point" and self._word(1) in _ONES:
            self._at += 1
            while self._word() in _ONES and _ONES[self._word()] < 10:
                digits += str(_ONES[self._word()])
                self._at += 1
            value += Fraction(int(digits), 10 ** len(digits)) if digits else 0
        return value

    def _continues(self) -> bool:
        """Whether `and` stands within a number: one hundred and five."""
        before, after = self._words[self._at - 1], self._word(1)
        return before in MULTIPLIERS and (after in _ONES or after in _TENS) and before != "dozen"

    def _with_part(self, value: Fraction) -> Fraction:
        """two and a half, three quarters, two thirds."""
        if self._word() == "and" and self._word(1) in ("a", "an", "one") and self._is_part(2):
            self._at += 2
            return value + self._take_part(1)
        if self._word() == "and" and self._word(1) == "half":
            self._at += 1
            return value + self._take_part(1)
        if self._word() == "and" and self._word(1) in _ONES and self._is_part(2):
            self._at += 2
            return value + self._take_part(_ONES[self._words[self._at - 1]])
        if self._is_part(0) and value.denominator == 1:
            return value * self._take_part(1)
        return value

    def _is_part(self, ahead: int) -> bool:
        return _singular_word(self._word(ahead)) in _PARTS


def _singular_word(word: str) -> str:
    return word[:-1] if word.endswith("s") else word


MAX_POWER = 20
_INCH, _POUND = Fraction(254, 10_000), Fraction(45_359_237, 100_000)


class Known(NamedTuple):
    """Powers of base units and how many of them one unit is."""

    powers: tuple[tuple[str, int], ...]
    scale: Fraction = Fraction(1)


def _known(text: str, scale: Fraction | int = 1) -> Known:
    """`m s^-2` as powers."""
    pairs = (part.partition("^") for part in text.split())
    return Known(tuple(sorted((base, int(power or 1)) for base, _, power in pairs)), Fraction(scale))


_SYMBOLS: dict[str, Known] = {}
"""As they are written: case counts."""
_NAMES: dict[str, Known] = {}
"""In lower case and in the singular."""
_PREFIXED_SYMBOLS: dict[str, Known] = {}
_PREFIXED_NAMES: dict[str, Known] = {}


def _define(
    dimension: str, scale: Fraction | int, symbols: str, names: str, *, prefixed: bool = False
) -> None:
    known = _known(dimension, scale)
    _SYMBOLS.update(dict.fromkeys(symbols.split(), known))
    _NAMES.update(dict.fromkeys(names.split(), known))
    if prefixed:
        _PREFIXED_SYMBOLS.update(dict.fromkeys(symbols.split(), known))
        _PREFIXED_NAMES.update(dict.fromkeys(names.split(), known))


# The International System of Units (BIPM, 9th edition), with the gram in place of the kilogram.
for _symbols, _names, _dimension, _scale in (
    ("m", "meter metre", "m", 1),
    ("g", "gram gramme", "g", 1),
    ("s", "second sec", "s", 1),
    ("A", "ampere amp", "A", 1),
    ("K", "kelvin", "K", 1),
    ("mol", "mole", "mol", 1),
    ("cd", "candela", "cd", 1),
    ("Hz", "hertz", "s^-1", 1),
    ("N", "newton", "g m s^-2", 1000),
    ("Pa", "pascal", "g m^-1 s^-2", 1000),
    ("J", "joule", "g m^2 s^-2", 1000),
    ("W", "watt", "g m^2 s^-3", 1000),
    ("C", "coulomb", "A s", 1),
    ("V", "volt", "A^-1 g m^2 s^-3", 1000),
    ("Ω ohm", "ohm", "A^-2 g m^2 s^-3", 1000),
    ("S", "siemens", "A^2 g^-1 m^-2 s^3", Fraction(1, 1000)),
    ("F", "farad", "A^2 g^-1 m^-2 s^4", Fraction(1, 1000)),
    ("Wb", "weber", "A^-1 g m^2 s^-2", 1000),
    ("T", "tesla", "A^-1 g s^-2", 1000),
    ("H", "henry", "A^-2 g m^2 s^-2", 1000),
    ("lm", "lumen", "cd", 1),
    ("lx", "lux", "cd m^-2", 1),
    ("Bq", "becquerel", "s^-1", 1),
    ("Gy Sv", "gray sievert", "m^2 s^-2", 1),
    ("L l", "liter litre", "m^3", Fraction(1, 1000)),
    ("eV", "electronvolt electron-volt", "g m^2 s^-2", Fraction(1_602_176_634, 10**25)),
    ("bar", "bar", "g m^-1 s^-2", 10**8),
    ("cal", "calorie", "g m^2 s^-2", 4184),
    ("Wh", "watthour", "g m^2 s^-2", 3_600_000),
    ("Ah", "", "A s", 3600),
    ("B", "byte", "byte", 1),
    ("bit", "bit", "bit", 1),
    ("M", "molar", "m^-3 mol", 1000),
    ("", "ton tonne", "g", 10**6),
):
    _define(_dimension, _scale, _symbols, _names, prefixed=True)
_define("g", 10**6, "t", "")
_define("g", 1000, "", "kilo")
_define("s", 60, "min", "minute")
_define("s", 3600, "h hr hrs", "hour")
_define("s", 86_400, "d", "day")
_define("s", 604_800, "wk", "week")
_define("s", 1_209_600, "", "fortnight")
_define("month", 1, "mo", "month")
_define("month", 12, "yr yrs", "year")
_define("month", 120, "", "decade")
_define("month", 1200, "", "century")
_define("m", _INCH, "in", "inch inche")
_define("m", _INCH * 12, "ft", "foot feet")
_define("m", _INCH * 36, "yd", "yard")
_define("m", _INCH * 63_360, "mi", "mile")
_define("m", 1852, "nmi", "")
_define("m", Fraction(1, 10**10), "Å", "angstrom ångström")
_define("m", 149_597_870_700, "AU au", "")
_define("g", _POUND, "lb lbs", "pound")
_define("g", _POUND / 16, "oz", "ounce")
_define("m^3", _INCH**3 * 231, "gal", "gallon")
_define("m^3", _INCH**3 * 231 / 4, "qt", "quart")
_define("m^3", _INCH**3 * 231 / 8, "", "pint")
_define("m^3", _INCH**3 * 231 / 16, "", "cup")
_define("m^3", Fraction(1, 10**6), "cc", "")
_define("m^2", 4046 + Fraction(8_564_224, 10**7), "", "acre")
_define("m^2", 10_000, "ha", "hectare")
_define("g m^-1 s^-2", 101_325_000, "atm", "atmosphere")
_define("g m^-1 s^-2", Fraction(101_325_000, 760), "mmHg Torr", "torr")
_define("m s^-1", _INCH * 63_360 / 3600, "mph", "")
_define("m s^-1", Fraction(1000, 3600), "kph kmh kmph", "")
_define("m s^-1", Fraction(1852, 3600), "kn", "knot")
_define("turn s^-1", Fraction(1, 60), "rpm", "")
_define("turn", 1, "rev", "revolution turn")
_define("degree", 1, "deg", "degree")
_define("degree", Fraction(1, 60), "arcmin", "arcminute")
_define("degree", Fraction(1, 3600), "arcsec", "arcsecond")
_define("dB", 1, "dB", "decibel")
_define("dollar", 1, "$ USD US$", "dollar usd buck")
_define("dollar", Fraction(1, 100), "¢", "cent penny")
_define("euro", 1, "€ EUR", "euro eur")
_define("sterling", 1, "£ GBP", "gbp")
_define("yen", 1, "JPY", "yen jpy")
_define("yuan", 1, "RMB CNY", "yuan rmb cny renminbi")
_define("rupee", 1, "₹ Rs Rs. INR", "rupee inr")
_define("¥", 1, "¥", "")
_define("celsius", 1, "", "celsius centigrade")
_define("fahrenheit", 1, "", "fahrenheit")
_define("am", 1, "am AM", "am")
_define("pm", 1, "PM", "pm")


def _exponents(text: str) -> dict[str, int]:
    return {name: int(exponent) for name, exponent in (pair.split("=") for pair in text.split())}


_PREFIXES = _exponents(
    "Y=24 Z=21 E=18 P=15 T=12 G=9 M=6 k=3 h=2 da=1 d=-1 c=-2 m=-3 µ=-6 u=-6 n=-9 p=-12 f=-15 a=-18"
)
_PREFIX_NAMES = _exponents(
    "yotta=24 zetta=21 exa=18 peta=15 tera=12 giga=9 mega=6 kilo=3 hecto=2 deca=1 deka=1 deci=-1 centi=-2 milli=-3"
    " micro=-6 nano=-9 pico=-12 femto=-15 atto=-18"
)
_ANY_CASE = re.compile(
    r"km|cm|mm|ml|kg|mg|ft|in|lbs?|oz|hr|min|sec|mph|yd|gal|qt|usd|kwh|mol|[kmg]hz",
    re.IGNORECASE,
)
"""Symbols that are read whatever their case, where that case has no meaning of its own."""
_EXPONENT_WORDS = {"square": 2, "sq": 2, "squared": 2, "cubic": 3, "cubed": 3, "cu": 3}
_ALIASES: Mapping[str, tuple[str, ...]] = {
    "kWh": ("kW", "h"),
    "psi": ("lb", "/", "in", "^2"),
    "mpg": ("mi", "/", "gal"),
}


@dataclass(frozen=True, slots=True)
class Unit:
    """Bases with their powers, the factor to them, and the words that are no known unit."""

    powers: tuple[tuple[str, int], ...]
    scale: Fraction = Fraction(1)
    words: frozenset[str] = frozenset()
    multiplier: Fraction = Fraction(1)
    """What the number itself is multiplied by: a million in `3 million dollars`, a tenth in `7 tenths`."""

    @property
    def empty(self) -> bool:
        return not self.powers and not self.words

    def agrees(self, other: Unit) -> bool:
        """Whether the two measure the same thing."""
        if self.powers != other.powers:
            return _is_yen_or_yuan(self, other)
        return self.words <= other.words or other.words <= self.words if self.words and other.words else True


def read_unit(tokens: Sequence[Token]) -> Unit | None:
    """The unit that words, powers and slashes spell; None if they spell none."""
    pieces = _pieces(tokens)
    return None if pieces is None else _unit(pieces)


def is_symbol_of_unit(word: str) -> bool:
    """Whether letters such as `kHz` are the symbol of a unit."""
    return _lookup(word) is not None


def _unit(pieces: Sequence[str]) -> Unit | None:
    powers: dict[str, int] = {}
    scale, multiplier = Fraction(1), Fraction(1)
    words: set[str] = set()
    sign, pending = 1, 1
    last: Known | None = None
    for index, piece in enumerate(pieces):
        if piece.lower() in NO_COUNTED_THINGS:
            return None
        if piece in ("/", "per"):
            sign, last = -1, None
        elif piece in ("*", ".", "-", "(", ")"):
            last = None
        elif piece[0] in "^-0123456789":
            if last is None or not 0 < abs(power := int(piece.lstrip("^"))) <= 9:
                return None
            scale *= _add(powers, last, sign * (power - 1))
            last = None
        elif piece in _EXPONENT_WORDS and index + 1 < len(pieces) and _lookup(pieces[index + 1]):
            pending = _EXPONENT_WORDS[piece]
        elif piece in _EXPONENT_WORDS and last is not None:
            scale *= _add(powers, last, sign * (_EXPONENT_WORDS[piece] - 1))
        elif piece in ("squared", "cubed"):
            return None
        elif piece.lower() in MULTIPLIERS and piece.lower() != "dozen" and not powers and not words:
            multiplier *= MULTIPLIERS[piece.lower()]
        elif not powers and not words and (part := part_named(piece)):
            multiplier /= part
        elif known := _lookup(piece):
            last = known
            scale *= _add(powers, known, sign * pending)
            pending = 1
        elif (word := _singular(piece.lower())) not in NOT_UNITS:
            if not re.fullmatch(r"[^\W\d_][\w'-]++|[\u4e00-\u9fff]", word) or _CHINESE_DENIAL.search(word):
                return None
            words.add(word)
        if max(map(abs, powers.values()), default=0) > MAX_POWER:
            return None
    bases = tuple(sorted((base, power) for base, power in powers.items() if power))
    return Unit(bases, scale, frozenset(words), multiplier)


def _add(powers: dict[str, int], known: Known, times: int) -> Fraction:
    """Multiply by a unit so many times; returns the factor."""
    for base, power in known.powers:
        powers[base] = powers.get(base, 0) + power * times
    return known.scale**times


def _lookup(word: str) -> Known | None:
    if (known := _SYMBOLS.get(word) or _prefixed(word, _PREFIXES, _PREFIXED_SYMBOLS)) is not None:
        return known
    lower = word.lower()
    if lower != word and _ANY_CASE.fullmatch(word):
        return _lookup(lower)
    for name in (lower, _singular(lower)):
        if known := _NAMES.get(name) or _prefixed(name, _PREFIX_NAMES, _PREFIXED_NAMES):
            return known
    return None


def _prefixed(word: str, prefixes: Mapping[str, int], units: Mapping[str, Known]) -> Known | None:
    for prefix, exponent in prefixes.items():
        if word.startswith(prefix) and (known := units.get(word[len(prefix) :])):
            return Known(known.powers, known.scale * Fraction(10) ** exponent)
    return None


def _pieces(tokens: Sequence[Token]) -> list[str] | None:
    """The words, powers and signs that the tokens are made of; None where there is anything else."""
    pieces: list[str] = []
    glued = False
    exponent = ""
    for token in tokens:
        if token.kind == "number" and token.value is not None and token.value.denominator == 1:
            pieces.append(f"^{exponent}{token.value}")
            exponent = ""
        elif token.kind in ("^", "-") and (exponent or token.kind == "^" or not pieces):
            exponent = "-" if token.kind == "-" else ""
            if token.kind == "-" and not pieces:
                return None
        elif token.kind == "-":
            exponent = "-"
        elif token.kind == "command" and token.text == "degree":
            pieces.append("degree")
        elif token.kind == "command" and token.text == "frac":
            return _fraction(tokens)
        elif token.kind == "text":
            words = _words(token.text)
            if pieces and pieces[-1] == "µ" and words:
                pieces[-1:], words = [f"µ{words[0]}"], words[1:]
            pieces += words
        elif token.kind in ("name", "fn", "const"):
            letters = {"mu": "µ", "Omega": "Ω"}.get(token.text, token.text)
            # A space after \\mu only ends the command.
            if glued and (not token.spaced or pieces[-1].endswith("µ")):
                pieces[-1] += letters
            else:
                pieces.append(letters)
            glued = True
            continue
        elif token.kind in ("/", "*", ".", "%"):
            pieces.append(token.text if token.kind == "/" else "*")
        elif token.text not in ("{", "}", "(", ")"):
            return None
        glued = False
    return _joined([piece for piece in pieces if piece])


def _fraction(tokens: Sequence[Token]) -> list[str] | None:
    """The pieces of \\frac{km}{h}, which must be all there is."""
    texts = [token.text for token in tokens]
    if texts[:2] != ["frac", "{"] or texts.count("frac") != 1 or texts[-1] != "}":
        return None
    level = 0
    for index, text in enumerate(texts[1:], start=1):
        level += (text == "{") - (text == "}")
        if level == 0:
            over, under = _pieces(tokens[2:index]), _pieces(tokens[index + 2 : -1])
            return None if over is None or under is None else [*over, "/", *under]
    return None


def _joined(pieces: list[str]) -> list[str]:
    """Temperatures and electron volts are one piece: `degree C`, `degrees Celsius`."""
    joined: list[str] = []
    for piece in pieces:
        before = joined[-1].lower() if joined else ""
        if before in ("degree", "degrees", "deg") and piece.lower() in (
            "c",
            "f",
            "k",
            "celsius",
            "fahrenheit",
        ):
            joined[-1] = {"c": "celsius", "f": "fahrenheit", "k": "K"}[piece.lower()[0]]
        elif before == "electron" and _singular(piece.lower()) == "volt":
            joined[-1] = "electronvolt"
        else:
            joined.append(piece)
    return joined


_CHINESE_DENIAL = re.compile("[\u4e0d\u6ca1\u975e\u6216]")
_TEXT = re.compile(
    r"(?P<exponent>\^?\{?\s{0,4}(?P<number>[-+]?\d{1,4})\s{0,4}\}?)"
    r"|(?P<word>[A-Za-zµΩÅ¢\u4e00-\u9fff](?:[A-Za-z'µΩ\u4e00-\u9fff]|-(?=[A-Za-z]))*+)|(?P<sign>[/*$€£¥₹])"
)


def _words(text: str) -> list[str]:
    r"""The pieces of words: `kg m/s^{2}`, `km\cdot h`, `square-feet`."""
    text = re.sub(r"\b([apAP])\.\s?[mM]\b\.?", r"\1m", text)
    text = re.sub(r"\\(?:cdot|times)(?![A-Za-z])", "*", text)
    text = re.sub(r"\\mu\s*+(?=[A-Za-z])", "µ", text).replace("\\Omega", "Ω")
    text = text.replace("\\degree", " degree ").replace("\\$", "$")
    pieces: list[str] = []
    for found in _TEXT.finditer(text):
        if found["number"]:
            pieces.append("^" + found["number"].lstrip("+"))
        elif found["sign"]:
            pieces.append(found["sign"])
        elif found["word"] in _ALIASES:
            pieces += _ALIASES[found["word"]]
        elif _lookup(found["word"]):
            pieces.append(found["word"])
        else:
            parts = found["word"].split("-")
            pieces += (
                parts if all(part in _EXPONENT_WORDS or _lookup(part) for part in parts) else [found["word"]]
            )
    return pieces


def _singular(word: str) -> str:
    if word.endswith("ies") and len(word) > 4:
        return word[:-3] + "y"
    if word.endswith(("shes", "ches", "xes", "sses")):
        return word[:-2]
    return word[:-1] if word.endswith("s") and not word.endswith("ss") and len(word) > 2 else word


def _is_yen_or_yuan(left: Unit, right: Unit) -> bool:
    """¥ is the sign of both."""
    names = {base for base, _ in (*left.powers, *right.powers)}
    return "¥" in names and bool(names & {"yen", "yuan"}) and len(left.powers) == len(right.powers) == 1
