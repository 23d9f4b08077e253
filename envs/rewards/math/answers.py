"""What an answer can be, and the reader of answers: from tokens to values, words, lists, relations, sets, matrices.

The module is long because it is one grammar, read by recursive descent: each rule calls the others.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction

from polyturn.envs.rewards.math.terms import (
    Term,
    make,
    number,
    operators,
    parse,
    subterms,
    variables,
    with_args,
)
from polyturn.envs.rewards.math.tokens import (
    CONSTANTS,
    FUNCTIONS,
    GENERIC_NOUNS,
    GREEK,
    MONTHS,
    SET_WORDS,
    SHORT_NAMES,
    SYNONYMS,
    TEXT_COMMANDS,
    UNIT_SYMBOLS,
    Token,
    lex,
)
from polyturn.envs.rewards.math.units import (
    NUMBER_WORDS,
    Unit,
    is_symbol_of_unit,
    leading_number,
    ordinal,
    read_unit,
)
from polyturn.envs.rewards.math.verdict import TooLarge, Unreadable


@dataclass(frozen=True, slots=True)
class Words:
    """A text: lower case, without punctuation and articles."""

    text: str


@dataclass(frozen=True, slots=True)
class Value:
    """An expression, what it is a number of, and whether a percent sign follows it."""

    term: Term
    unit: Unit | None = None
    percent: bool = False


@dataclass(frozen=True, slots=True)
class Many:
    """One answer or more: bare, or in brackets. `joiner` is `or` or `and` where words part them, else a comma.

    Raises:
        Unreadable: there is none.
    """

    items: tuple[Answer, ...]
    opener: str = ""
    closer: str = ""
    joiner: str = ","

    def __post_init__(self) -> None:
        if not self.items:
            raise Unreadable("a list of nothing")


@dataclass(frozen=True, slots=True)
class Relation:
    """sides[0] ops[0] sides[1] ops[1] ...; `label` where the first side is a name and no value."""

    sides: tuple[Answer, ...]
    ops: tuple[str, ...]
    label: str = ""


@dataclass(frozen=True, slots=True)
class Combined:
    """Sets joined by `cup`, `cap` or `setminus`, from the left."""

    parts: tuple[Answer, ...]
    ops: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Named:
    """A set with a name: R, Z, Q, N, C, or empty."""

    name: str


@dataclass(frozen=True, slots=True)
class Matrix:
    """Rows of one length, and one at least. Raises `Unreadable` for others."""

    rows: tuple[tuple[Answer, ...], ...]

    def __post_init__(self) -> None:
        if len({len(row) for row in self.rows}) != 1:
            raise Unreadable("rows of different lengths")


@dataclass(frozen=True, slots=True)
class Based:
    """Digits in a base."""

    digits: str
    base: int


@dataclass(frozen=True, slots=True)
class Ratio:
    """a:b, a ratio or a time of day."""

    parts: tuple[Answer, ...]
    unit: Unit | None = None


@dataclass(frozen=True, slots=True)
class Clock:
    """A time of day. `half` is `am` or `pm` where it was given; then the hour is of 24."""

    hour: int
    minute: int
    second: int = 0
    half: str = ""

    def same(self, other: Clock) -> bool:
        """Whether both can be the same time: 5:30 is that of the morning and that of the afternoon."""
        if (self.minute, self.second) != (other.minute, other.second):
            return False
        if bool(self.half) == bool(other.half):
            return self.hour == other.hour
        plain = other if self.half else self
        return self.hour == other.hour if plain.hour > 12 else self.hour % 12 == other.hour % 12


@dataclass(frozen=True, slots=True)
class Cases:
    """A function by cases: each value with the condition under which it holds, None for all others."""

    rows: tuple[tuple[Answer, Answer | None], ...]


Answer = Words | Value | Many | Relation | Combined | Named | Matrix | Based | Ratio | Clock | Cases


def is_symbol(answer: Answer) -> bool:
    """Whether an answer is one variable and nothing else."""
    return (
        isinstance(answer, Value) and answer.term.op == "var" and answer.unit is None and not answer.percent
    )


def free_variables(answer: Answer) -> frozenset[str]:
    """The variables of a value; none for other answers."""
    return variables(answer.term) if isinstance(answer, Value) else frozenset()


MAX_CHARACTERS = 120

_CLOCK = re.compile(
    r"(?:at\s++)?(?P<hour>\d{1,2})(?:\s*+[:h]\s*+(?P<minute>\d{2}))?(?::(?P<second>\d{2}))?(?:\s*+o'?\s*+clock)?"
    r"\s*+(?P<half>[ap]\s*+\.?\s*+m\b\.?|noon|midnight)?(?:\s++(?:in\s++the\s++)?(?P<part>morning|afternoon|evening))?\.?",
    re.IGNORECASE,
)
_MONTH = (
    rf"(?P<month>{'|'.join((*MONTHS, *(name for name in SHORT_NAMES if SHORT_NAMES[name] in MONTHS)))})\.?"
)
_DAY = r"(?P<day>\d{1,2})(?:st|nd|rd|th)?"
_YEAR = r"(?:,?\s++(?P<year>\d{4}))?"
_WEEKDAY = r"(?:(?:mon|tues|wednes|thurs|fri|satur|sun)day,?\s++)?"
_DATES = tuple(
    re.compile(_WEEKDAY + form, re.IGNORECASE)
    for form in (
        rf"{_MONTH}\s++{_DAY}{_YEAR}",
        rf"(?:the\s++)?{_DAY}\s++(?:of\s++)?{_MONTH}{_YEAR}",
        r"(?P<year>\d{4})-(?P<month>\d{2})-(?P<day>\d{2})",
        r"(?P<month>\d{1,2})/(?P<day>\d{1,2})/(?P<year>\d{4})",
    )
)
_QUANTITY = re.compile(r"(?<!\d)(\d++(?:\.\d++)?)\s*+([A-Za-z]++)\.?\s*+(?:,\s*+)?(?:and\s++)?")
_FEET_AND_INCHES = re.compile(r"(?<!\d)(\d++)\s?'\s*+(\d++(?:\.\d++)?)\s?(?:\"|'')")


def read_moment(text: str) -> Clock | Words | Value | None:
    """The time, date or quantity in several units that all of a text is; None where it is none."""
    if len(text) > MAX_CHARACTERS or not any(map(str.isdigit, text)):
        return {"noon": Clock(12, 0, half="pm"), "midnight": Clock(0, 0, half="am")}.get(text.lower())
    return _clock(text) or _date(text) or _quantities(text)


def _clock(text: str) -> Clock | None:
    found = _CLOCK.fullmatch(text)
    if found is None:
        return None
    half = (found["half"] or "").lower()
    part = (found["part"] or "").lower()
    if not (found["minute"] or half or part or "clock" in text.lower()):
        return None
    hour, minute, second = (int(found[name] or 0) for name in ("hour", "minute", "second"))
    if hour > 24 or minute > 59 or second > 59 or (found["second"] and not found["minute"]):
        return None
    if half in ("noon", "midnight"):
        return Clock(12, 0, half="pm") if half == "noon" and hour == 12 else Clock(0, 0, half="am")
    if half:
        half = half[0] + "m"
    elif part:
        half = "am" if part == "morning" else "pm"
    if half and not 1 <= hour <= 12:
        half = ""
    if half:
        hour = hour % 12 + 12 * (half == "pm")
    return Clock(hour, minute, second, half)


def _date(text: str) -> Words | None:
    for form in _DATES:
        if found := form.fullmatch(text):
            month = found["month"].lower()
            if not month.isdigit():
                month = str(MONTHS.index(SHORT_NAMES.get(month, month)) + 1)
            year = found["year"] or ""
            if 1 <= int(month) <= 12 and 1 <= int(found["day"]) <= 31:
                return Words(f"date {year}-{int(month)}-{int(found['day'])}")
    return None


def _quantities(text: str) -> Value | None:
    """`9 hours 20 minutes`, `5 ft 6 in`: amounts of one kind, each of a smaller unit than the one before."""
    if feet := _FEET_AND_INCHES.fullmatch(text):
        text = f"{feet[1]} ft {feet[2]} in"
    total, position, count = Fraction(0), 0, 0
    kind: Unit | None = None
    while position < len(text):
        found = _QUANTITY.match(text, position)
        unit = read_unit([Token("text", found[2])]) if found else None
        if found is None or unit is None or not unit.powers or unit.words:
            return None
        if kind is not None and (unit.powers != kind.powers or unit.scale >= kind.scale):
            return None
        total += Fraction(found[1]) * unit.scale
        kind, position, count = unit, found.end(), count + 1
    return Value(number(total), Unit(kind.powers)) if kind is not None and count > 1 else None


MAX_NESTING = 24
"""Of lists in lists."""
MAX_WORDS = 300
"""Characters of an answer that is looked at as words."""
_TEXT_COMMAND = re.compile(
    r"\\(?:" + "|".join(sorted(TEXT_COMMANDS, key=len, reverse=True)) + r")\s*+\{([^{}]*+)\}"
)
_RELATIONS = frozenset(("=", "<", ">", "<=", ">=", "!=", "in", "~"))
_LINES = frozenset(
    ("aligned", "align", "align*", "gathered", "gather", "equation", "equation*", "split", "alignedat")
)
_MATRICES = frozenset(("matrix", "pmatrix", "bmatrix", "Bmatrix", "array", "smallmatrix"))
_CONGRUENCE = re.compile(
    r"(?:[a-z]\s*+(?:\\equiv|=)\s*+)?(?P<rests>-?\s?\d{1,18}(?:\s?,\s?-?\s?\d{1,18}){0,20}+)\s*+\(?\s*+"
    r"\\?[pb]?mod\s*+\{?\s*+(?P<modulus>\d{1,18})\s*+\}?\s*+\)?"
)
_COUNTED = re.compile(
    r"(?<![\d,./])(?P<number>-?\\?[$€£]?\d[\d,]*+(?:\.\d++)?(?:/\d++)?)\s++"
    r"(?P<words>(?=[A-Za-z '-]{0,20}[A-Za-z]{3})[A-Za-z][A-Za-z '-]*+)"
)
_PER = re.compile(r"(?<![A-Za-z])an?\s(?=[a-z]{3})")
_AFFIRMED = re.compile(r"(yes|no)[,;.]\s++(?!no\b|yes\b|but\b|or\b|not\b)[A-Za-z ']++", re.IGNORECASE)
_LABELLED = re.compile(r"[A-Z][A-Za-z ]{2,30}:\s++(?=[-+\\$\d({\[])")
_CURRENCY_WORDS = frozenset(("USD", "usd", "US", "EUR", "GBP", "RMB", "CNY", "Rs", "INR", "JPY"))
_CONDITION_WORDS = frozenset(("if", "for", "when", "where", "whenever", "as"))


def read_answer(text: str, *, thousands: bool = True, bare_units: bool = True) -> Answer:
    """The answer that a normalised text spells; words where it is no mathematics.

    Args:
        thousands: Whether 1,000 outside of brackets is one number.
        bare_units: Whether letters apart from a number can be its unit: `5 N`.

    Raises:
        Unreadable, TooLarge.
    """
    text = text.strip()
    if len(text) <= MAX_WORDS:
        plain = _TEXT_COMMAND.sub(r" \1 ", text).replace("~", " ").strip(" .")
        if moment := read_moment(" ".join(plain.split())):
            return moment
        if plain.lower() in SHORT_NAMES:
            return Words(SHORT_NAMES[plain.lower()])
        if plain.lower() in SET_WORDS:
            return Named(SET_WORDS[plain.lower()])
        if congruence := _congruence(plain):
            return congruence
        if affirmed := _AFFIRMED.fullmatch(plain):
            return Words(affirmed[1].lower())
        if labelled := _LABELLED.match(plain):
            plain = text = plain[labelled.end() :]
        text = _numbers_for_words(plain) or (_words_after_number(plain) if bare_units else None) or text
    tokens = lex(text, thousands=thousands)
    return _read(tokens if bare_units else [_unspaced(token) for token in tokens], 0)


def _numbers_for_words(plain: str) -> str | None:
    """The text with digits for a number in words at its beginning; None where none is there."""
    if not plain[:1].isalpha() and not plain[:1].isdigit():
        return None
    if (place := ordinal(plain)) is not None:
        return str(place)
    first, space, rest = plain.partition(" ")
    if space and rest[:1].isalpha() and (place := ordinal(first)) is not None and rest.isascii():
        return f"{place} \\text{{{rest}}}" if rest.replace(" ", "").isalpha() else None
    if (found := leading_number(plain)) is None:
        return None
    value, rest = found
    digits = str(value) if value.denominator == 1 else f"\\frac{{{value.numerator}}}{{{value.denominator}}}"
    words = rest.strip()
    if not words or words in ("%", "\\%"):
        return digits + words
    return f"{digits} \\text{{{words}}}" if re.fullmatch(r"[A-Za-z][A-Za-z ,'-]*+", words) else None


def _words_after_number(plain: str) -> str | None:
    """`14 old records` with its words marked as such, `a day` as `per day`; None where there is anything else."""
    found = _COUNTED.fullmatch(plain)
    if found is None or any(
        word in FUNCTIONS or word in CONSTANTS or word in GREEK for word in found["words"].split()
    ):
        return None
    return f"{found['number']} \\text{{{_PER.sub('per ', found['words'])}}}"


def _congruence(plain: str) -> Words | None:
    """`x = 3 (mod 5)` and `3 mod 5` by what remains; None for other texts."""
    found = _CONGRUENCE.fullmatch(plain)
    if found is None or not int(found["modulus"]):
        return None
    modulus = int(found["modulus"])
    rests = sorted({int(rest.replace(" ", "")) % modulus for rest in found["rests"].split(",")})
    return Words(f"{', '.join(map(str, rests))} mod {modulus}")


def _unspaced(token: Token) -> Token:
    return Token(token.kind, token.text, token.value)


def _read(tokens: Sequence[Token], nesting: int) -> Answer:
    if nesting > MAX_NESTING:
        raise TooLarge("lists nested too deeply")
    tokens = _trimmed(tokens)
    if not tokens:
        raise Unreadable("nothing")
    if list_items := _list(tokens, nesting):
        return list_items
    for operators_, build in ((_RELATIONS, _relation), (("cup", "cap", "setminus"), _combined)):
        parts, ops = _split(tokens, operators_)
        if ops:
            return build(parts, ops, nesting)
    wrapped = _closings(tokens).get(0) == len(tokens) - 1
    if wrapped and (bracketed := _bracketed(tokens, nesting)):
        return bracketed
    if len(tokens) == 1 and tokens[0].kind == "set":
        return Named(tokens[0].text)
    if scaled := _scaled_matrix(tokens, nesting):
        return scaled
    if based := _based(tokens):
        return based
    parts, ops = _split(tokens, (":",))
    if ops and len(parts) <= 4:
        return _ratio(parts)
    return _value(tokens)


def _trimmed(tokens: Sequence[Token]) -> Sequence[Token]:
    """Without closing punctuation and without brackets that hold all of it and part nothing."""
    low, high = 0, len(tokens)
    closings = _closings(tokens)
    while low < high:
        first, last = tokens[low], tokens[high - 1]
        if last.kind in (".", ":") or (last.kind == "sep" and last.text in ",;"):
            high -= 1
        elif first.kind == "open" and first.text in "({" and closings.get(low) == high - 1:
            if first.text == "(" and (
                last.text != ")" or _has_separator(tokens, low + 1, high - 1, closings)
            ):
                break
            low, high = low + 1, high - 1
        else:
            break
    return tokens[low:high]


def _has_separator(tokens: Sequence[Token], low: int, high: int, closings: dict[int, int]) -> bool:
    """Whether a comma stands between `low` and `high` outside all brackets there."""
    index = low
    while index < high:
        if tokens[index].kind == "sep":
            return True
        index = closings.get(index, index) + 1
    return False


def _closings(tokens: Sequence[Token]) -> dict[int, int]:
    """Where each bracket closes, whatever the shape of the brackets."""
    closings: dict[int, int] = {}
    opened: list[int] = []
    for index, token in enumerate(tokens):
        if token.kind == "open":
            opened.append(index)
        elif token.kind == "close" and opened:
            closings[opened.pop()] = index
    return closings


def _split(
    tokens: Sequence[Token], kinds: Sequence[str] | frozenset[str]
) -> tuple[list[Sequence[Token]], list[str]]:
    """The parts between tokens of `kinds` that stand outside all brackets, and those tokens' texts or kinds."""
    parts: list[Sequence[Token]] = []
    found: list[str] = []
    level, start = 0, 0
    for index, token in enumerate(tokens):
        if token.kind == "open":
            level += 1
        elif token.kind == "close":
            level -= 1
            if level < 0:
                raise Unreadable("brackets do not match")
        elif level == 0 and token.kind in kinds:
            parts.append(tokens[start:index])
            found.append(token.text if token.kind == "sep" else token.kind)
            start = index + 1
    parts.append(tokens[start:])
    return parts, found


def _list(tokens: Sequence[Token], nesting: int) -> Answer | None:
    parts, separators = _split(tokens, ("sep",))
    if not separators:
        return None
    items = _items(parts, nesting)
    joiner = next((word for word in separators if word in ("or", "and")), ",")
    return items[0] if len(items) == 1 else Many(items, joiner=joiner)


def _items(parts: Sequence[Sequence[Token]], nesting: int) -> tuple[Answer, ...]:
    """What stands between separators."""
    return tuple(_flat(_read(part, nesting + 1) for part in parts if part))


def _flat(items: Iterator[Answer]) -> Iterator[Answer]:
    """The items, those that are several themselves one by one."""
    for item in items:
        if isinstance(item, Many) and not item.opener:
            yield from item.items
        elif isinstance(item, Relation) and isinstance(item.sides[-1], Many) and not item.sides[-1].opener:
            for value in item.sides[-1].items:
                yield Relation((*item.sides[:-1], value), item.ops, item.label)
        else:
            yield item


def _relation(parts: list[Sequence[Token]], ops: list[str], nesting: int) -> Answer:
    if not parts[0] and len(parts) == 2 and ops[0] in ("=", "~"):
        return _read(parts[1], nesting + 1)
    label = _label(parts[0]) if ops[0] in ("=", "~", "in") else ""
    first: Answer = Words(label) if label else _read(parts[0], nesting + 1)
    sides = (first, *(_read(part, nesting + 1) for part in parts[1:]))
    return Relation(sides, tuple(ops), label)


def _label(tokens: Sequence[Token]) -> str:
    """What the left side of an equation names where it is no more than a name: x, f(3), AB, \\angle ABC."""
    if not tokens:
        return ""
    kinds = {token.kind for token in tokens}
    texts = [token.text for token in tokens]
    first = tokens[0]
    if first.kind == "set" and first.text in ("E", "P") and len(tokens) > 1:
        return "".join(texts)
    if not kinds <= _LABEL_KINDS:
        return ""
    if len(tokens) == 1:
        return first.text if first.kind in ("name", "text", "fn") or first.text in ("i", "e") else ""
    if _is_segment(tokens):
        return "".join(texts)
    if len(tokens) >= 4 and first.kind in ("name", "text") and texts[-1] == ")" and "(" in texts[1:3]:
        inside = tokens[texts.index("(") + 1 : -1]
        known = all(token.kind in ("name", "sep") for token in inside)
        given = first.text not in "xyzn" and all(token.kind in _ARGUMENT_KINDS for token in inside)
        return "".join(texts) if known or given else ""
    if "_" in kinds and first.kind in ("name", "text") and texts[1] == "_":
        return "".join(texts)
    if any(token.kind == "text" and len(token.text) > 1 for token in tokens) and not kinds & {
        "number",
        "const",
    }:
        return " ".join(texts)
    if first.kind == "command" and texts[0] in _NAMING_COMMANDS:
        return " ".join(texts)
    return ""


_ARGUMENT_KINDS = frozenset(("name", "sep", "number", "const", "-", "|", "cap", "cup", "text", "'"))
_LABEL_KINDS = frozenset(("fn", "command", "open", "close", "_", "=", "env")) | _ARGUMENT_KINDS - {"-"}
_NAMING_COMMANDS = frozenset(("angle", "triangle", "overline", "measuredangle", "Delta"))


def _is_segment(tokens: Sequence[Token]) -> bool:
    """AB, |AB|, |z|: points side by side, in bars or not."""
    bars = tokens[0].kind == "|" == tokens[-1].kind
    names = tokens[1:-1] if bars else tokens
    if not names or any(token.kind != "name" for token in names):
        return False
    capitals = len(names) < 5 and all(len(token.text) == 1 and token.text.isupper() for token in names)
    return (capitals and len(names) > 1) or (bars and len(names) == 1 and names[0].text not in "xyt")


def _combined(parts: list[Sequence[Token]], ops: list[str], nesting: int) -> Answer:
    return Combined(tuple(_read(part, nesting + 1) for part in parts), tuple(ops))


def _bracketed(tokens: Sequence[Token], nesting: int) -> Answer | None:
    opener, closer, inner = tokens[0].text, tokens[-1].text, tokens[1:-1]
    if opener == "begin":
        return _matrix(inner, nesting)
    if opener == "\\{":
        return _set(inner, nesting)
    parts, separators = _split(inner, ("sep",))
    if opener in ("(", "[", "<<") and separators:
        return Many(tuple(_read(part, nesting + 1) for part in parts if part), opener, closer)
    if opener == "[" and inner:
        return Many((_read(inner, nesting + 1),), opener, closer)
    return None


def _set(inner: Sequence[Token], nesting: int) -> Answer:
    if not inner:
        return Named("empty")
    for bar in ("|", ":"):  # {x | condition}
        parts, found = _split(inner, (bar,))
        if len(found) == 1 and any(token.kind in _RELATIONS for token in parts[1]):
            return _read(parts[1], nesting + 1)
    parts, _ = _split(inner, ("sep",))
    return Many(_items(parts, nesting), "{", "}")


def _matrix(inner: Sequence[Token], nesting: int) -> Answer:
    if not inner or inner[0].kind != "env" or inner[0].text not in _MATRICES | _LINES | {"cases"}:
        raise Unreadable("an environment", foreign=True)
    rows = [row for row in _split(inner[1:], ("row",))[0] if row]
    if inner[0].text in _LINES:
        return _read(_lines(rows), nesting + 1)
    if inner[0].text == "cases":
        return _cases(rows, nesting)
    cells = tuple(tuple(_read(cell, nesting + 1) for cell in _split(row, ("&",))[0]) for row in rows)
    return Matrix(cells)


def _lines(rows: Sequence[Sequence[Token]]) -> list[Token]:
    """The rows of an aligned environment as a list, without what aligns them."""
    tokens: list[Token] = []
    for row in rows:
        tokens += [token for token in row if token.kind != "&"]
        tokens.append(Token("sep", ","))
    return tokens[:-1]


def _cases(rows: Sequence[Sequence[Token]], nesting: int) -> Answer:
    """A function by cases, or a system of equations."""
    read: list[tuple[Answer, Answer | None]] = []
    for row in rows:
        cells = _split(row, ("&",))[0]
        if len(cells) == 1 and len(cells[0]) != len(row):
            raise Unreadable("a case without a condition")
        if len(cells) == 1:
            at = next((index for index, token in enumerate(row) if token.text in _CONDITION_WORDS), None)
            comma = next((index for index, token in enumerate(row) if token.kind == "sep"), None)
            split = at if at is not None else comma
            if split is None or split == 0:
                read.append((_read(row, nesting + 1), None))
                continue
            cells = [row[:split], row[split:]]
        if len(cells) != 2:
            raise Unreadable("a case with several conditions")
        read.append((_read(cells[0], nesting + 1), _condition(cells[1], nesting)))
    if all(condition is None for _, condition in read):
        return Many(tuple(_flat(value for value, _ in read)), joiner="and" if len(read) > 1 else ",")
    return Cases(tuple(read))


def _condition(tokens: Sequence[Token], nesting: int) -> Answer | None:
    tokens = [token for token in tokens if token.text.strip(" ,.") not in _CONDITION_WORDS]
    while tokens and tokens[0].kind == "sep":
        tokens = tokens[1:]
    while tokens and (tokens[-1].kind == "sep" or tokens[-1].kind == "."):
        tokens = tokens[:-1]
    words = plain_words(" ".join(token.text for token in tokens))
    return None if not tokens or words in ("otherwise", "else", "elsewhere") else _read(tokens, nesting + 1)


def _scaled_matrix(tokens: Sequence[Token], nesting: int) -> Answer | None:
    """A matrix with a number before it, or one that is transposed, as a column written in a line is."""
    begin = next(
        (index for index, token in enumerate(tokens) if token.kind == "open" and token.text == "begin"), None
    )
    transposed = _is_transposed(tokens)
    if begin is None and not transposed:
        return None
    end = transposed or len(tokens)
    start = begin if begin is not None else 0
    if _closings(tokens).get(start) != end - 1:
        return None
    inner = _read(tokens[start:end], nesting + 1)
    if transposed and isinstance(inner, Matrix):
        inner = Matrix(tuple(zip(*inner.rows, strict=True)))
    factors = tokens[:start]
    while factors and factors[-1].kind == "*":
        factors = factors[:-1]
    if not factors:
        return inner
    if not isinstance(inner, Matrix):
        return None
    factor = make("neg", number(1)) if [token.kind for token in factors] == ["-"] else parse(factors)
    return Matrix(tuple(tuple(_times(factor, cell) for cell in row) for row in inner.rows))


def _is_transposed(tokens: Sequence[Token]) -> int:
    """Where the exponent T begins that stands at the end, after a bracket; 0 where none does."""
    for size in (2, 4):
        tail = [token.text for token in tokens[-size:]]
        if tail in (["^", "T"], ["^", "top"], ["^", "{", "T", "}"], ["^", "{", "top", "}"]):
            before = len(tokens) - size
            return before if before and tokens[before - 1].kind == "close" else 0
    return 0


def _times(factor: Term, cell: Answer) -> Answer:
    if not isinstance(cell, Value):
        raise Unreadable("a matrix of what cannot be multiplied")
    return Value(make("mul", factor, cell.term), cell.unit, cell.percent)


def _based(tokens: Sequence[Token]) -> Based | None:
    """1011_2, A3_{16}, 1011_{two}."""
    texts = [token.text for token in tokens if token.text not in ("{", "}", "(", ")")]
    if "_" not in texts or texts.count("_") != 1:
        return None
    at = texts.index("_")
    digits, base = "".join(texts[:at]), " ".join(texts[at + 1 :]).lower()
    if not re.fullmatch(r"[0-9][0-9A-F]*|[A-F]+[0-9]+[0-9A-F]*", digits) or len(digits) > 200:
        return None
    value = (
        int(base) if base.isdecimal() and len(base) < 3 else NUMBER_WORDS.get(base.removeprefix("base "), 0)
    )
    return Based(digits, value) if 2 <= value <= 36 else None


def _ratio(parts: list[Sequence[Token]]) -> Answer:
    values = [_value(part) for part in parts if part]
    if len(values) != len(parts) or not all(isinstance(value, Value) for value in values):
        return _as_words([token for part in parts for token in part])
    last = values[-1]
    assert isinstance(last, Value)
    return Ratio((*values[:-1], Value(last.term)), last.unit)


def _value(tokens: Sequence[Token]) -> Answer:
    """A value with its currency, unit or percent sign; words where the tokens spell none."""
    currency: Unit | None = None
    if len(tokens) > 1 and tokens[0].kind == "text" and tokens[0].text.strip(" .") in _CURRENCY_WORDS:
        currency, tokens = read_unit(tokens[:1]), tokens[1:]
    for index in (0, 1):
        if index < len(tokens) and tokens[index].kind == "currency":
            currency = read_unit(
                [Token("text", {"pounds": "£", "euro": "€"}.get(tokens[index].text, tokens[index].text))]
            )
            tokens = [*tokens[:index], *tokens[index + 1 :]]
            break
    core, unit_tokens = _split_unit(tokens)
    words = " ".join(token.text for token in unit_tokens).lower().strip()
    percent = words in ("percent", "per cent", "percentage")
    unit = read_unit(unit_tokens) if unit_tokens and not percent else None
    if core and core[-1].kind == "%":
        core, percent = core[:-1], True
    if (
        not core
        or (unit_tokens and not percent and unit is None)
        or (unit is not None and not _measurable(core, unit))
    ):
        return _as_words(tokens)
    if core[-1].kind == "sep" or core[0].kind == "text":
        return _as_words(tokens)
    term = parse(core)
    if unit is not None and unit.multiplier != 1:
        term = make("mul", term, number(unit.multiplier))
    unit = _priced(currency, unit)
    unit = None if unit is None or unit.empty else unit
    terms = _signs(term)
    values = tuple(Value(each, unit, percent) for each in terms)
    return values[0] if len(values) == 1 else Many(values, joiner="or")


def _priced(currency: Unit | None, unit: Unit | None) -> Unit | None:
    """The currency before a number; what follows must not name another: `$12 per week`, `$3 million`."""
    if currency is None or unit is None or not unit.powers:
        return currency or unit
    return unit if dict(currency.powers).keys() & dict(unit.powers).keys() else currency


def _measurable(core: Sequence[Token], unit: Unit) -> bool:
    """Whether words after these tokens can be their unit: a number, or a letter with a unit that is known."""
    return any(token.kind in ("number", "const") for token in core) or bool(unit.powers)


def _split_unit(tokens: Sequence[Token]) -> tuple[Sequence[Token], Sequence[Token]]:
    """The tokens before the unit and those of the unit: all from the first word outside brackets on."""
    level = 0
    # In \\sin 30° the degrees belong to the argument.
    angle_argument = any(token.kind == "fn" and token.text not in ("min", "sec") for token in tokens)
    for index, token in enumerate(tokens):
        level += (token.kind == "open") - (token.kind == "close")
        if level or index == 0:
            continue
        degree = token.kind == "command" and token.text == "degree" and not angle_argument
        # In 60° + 360°k they are part of an expression.
        degree = degree and not any(before.text == "degree" for before in tokens[:index])
        degree = degree and not any(
            after.kind in ("+", "-", "*", "number", "name") for after in tokens[index + 1 :]
        )
        if token.kind == "text" or degree or _begins_bare_unit(tokens, index):
            start = index - 1 if tokens[index - 1].kind == "/" and index > 1 else index
            return tokens[:start], tokens[start:]
    return tokens, ()


def _begins_bare_unit(tokens: Sequence[Token], index: int) -> bool:
    """Whether letters without \\text from here on are a unit: after a number, apart from it, and all known."""
    token = tokens[index]
    if token.text == "mu" and token.spaced and index + 1 < len(tokens) and tokens[index + 1].kind == "text":
        return tokens[index - 1].kind in ("number", "close")
    is_letters = token.kind == "name" or (token.kind == "fn" and token.text in ("min", "sec"))
    if not is_letters or tokens[index - 1].kind not in ("number", "close", "const"):
        return False
    if any(before.kind in ("name", "fn") for before in tokens[:index]):
        return False
    word = token.text
    for after in tokens[index + 1 :]:
        if (after.spaced and word != "mu") or after.kind not in ("name", "const"):
            break
        word += after.text
    word = word.replace("mu", "µ").replace("Omega", "Ω")
    mixed = len(word) > 1 and word != word.lower() and word != word.upper()
    if not (token.spaced or mixed) or not is_symbol_of_unit(word):
        return False
    if len(word) == 1 and word not in UNIT_SYMBOLS and word != "Ω":
        return False
    unit = read_unit(tokens[index:])
    return unit is not None and bool(unit.powers) and not unit.words


def _as_words(tokens: Sequence[Token]) -> Answer:
    text = plain_words(" ".join(token.text or str(token.value) for token in tokens))
    text = SYNONYMS.get(text, SHORT_NAMES.get(text, text))
    if text == "infinity":
        return Value(Term("const", name="inf"))
    if text in NUMBER_WORDS:
        return Value(number(Fraction(NUMBER_WORDS[text])))
    if text in SET_WORDS:
        return Named(SET_WORDS[text])
    if not text:
        raise Unreadable("nothing")
    if not any(token.kind == "text" for token in tokens):
        parse(tokens)
    return Words(text)


def plain_words(text: str) -> str:
    """Lower case, without the punctuation of sentences, articles and repeated spaces."""
    words = re.sub(r"[.,;!?'\"`()\[\]{}$~*\\]", " ", text).split()
    kept = [
        word.lower()
        for index, word in enumerate(words)
        if word.lower() not in ("an", "the") and not _is_article(word, index, len(words))
    ]
    return " ".join(kept)


def _is_article(word: str, index: int, count: int) -> bool:
    """Whether an A is an article: before another word, and no capital but at the beginning. Plan A has none."""
    return word in ("a", "A") and index + 1 < count and (word == "a" or index == 0)


def bare_noun(text: str) -> str:
    """Words without a last one that adds nothing: `odd function`."""
    first, _, last = text.rpartition(" ")
    return first if first and last in GENERIC_NOUNS else text


def _signs(term: Term) -> tuple[Term, ...]:
    """The terms that ± stands for: with each choice of signs, one choice for all where ∓ occurs too."""
    if "pm" not in operators(term):
        return (term,)
    choices = _choices(term)
    linked = any(each.op == "pm" and each.name == "mp" for each in subterms(term))
    if len(choices) > 8:
        raise TooLarge("signs")
    return tuple(choices) if not linked else (_chosen(term, 1), _chosen(term, -1))


def _choices(term: Term) -> list[Term]:
    if not term.args:
        return [term]
    combined: list[tuple[Term, ...]] = [()]
    for arg in term.args:
        combined = [(*left, right) for left in combined for right in _choices(arg)]
        if len(combined) > 8:
            raise TooLarge("signs")
    if term.op == "pm":
        return [
            each
            for args in combined
            for each in (make("add", *args), make("add", args[0], make("neg", args[1])))
        ]
    return [with_args(term, args) for args in combined]


def _chosen(term: Term, sign: int) -> Term:
    args = tuple(_chosen(arg, sign) for arg in term.args)
    if term.op != "pm":
        return with_args(term, args)
    plus = (sign if term.name == "pm" else -sign) > 0
    return make("add", args[0], args[1] if plus else make("neg", args[1]))
