"""The reader of answers: from tokens to values, words, lists, relations, sets, matrices."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from fractions import Fraction

from polyturn.envs.rewards.math import expressions
from polyturn.envs.rewards.math.kinds import (
    Answer,
    Based,
    Combined,
    Many,
    Matrix,
    Named,
    Ratio,
    Relation,
    Value,
    Words,
)
from polyturn.envs.rewards.math.lexer import Token, lex
from polyturn.envs.rewards.math.terms import Term, make, number, operators
from polyturn.envs.rewards.math.units import Unit, read_unit
from polyturn.envs.rewards.math.verdict import TooLarge, Unreadable
from polyturn.envs.rewards.math.vocabulary import NUMBER_WORDS, SET_WORDS, SYNONYMS, UNIT_SYMBOLS

MAX_NESTING = 24
"""Of lists in lists."""
_RELATIONS = frozenset(("=", "<", ">", "<=", ">=", "!=", "in", "~"))
_MATRICES = frozenset(("matrix", "pmatrix", "bmatrix", "Bmatrix", "array", "smallmatrix"))


def read_answer(text: str, *, thousands: bool = True) -> Answer:
    """The answer that a normalised text spells; words where it is no mathematics.

    Raises:
        Unreadable, TooLarge.
    """
    return _read(lex(text.rstrip(), thousands=thousands), 0)


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
    wrapped = tokens[0].kind == "open" and _closing(tokens, 0) == len(tokens) - 1
    if wrapped and (bracketed := _bracketed(tokens, nesting)):
        return bracketed
    if len(tokens) == 1 and tokens[0].kind == "set":
        return Named(tokens[0].text)
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


def _closing(tokens: Sequence[Token], start: int) -> int:
    """Where the bracket that opens at `start` closes, whatever the shape of the brackets; -1 if nowhere."""
    level = 0
    for index in range(start, len(tokens)):
        level += (tokens[index].kind == "open") - (tokens[index].kind == "close")
        if level == 0:
            return index
    return -1


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
    """What stands between separators, of which there must be something."""
    items = tuple(_flat(_read(part, nesting + 1) for part in parts if part))
    if not items:
        raise Unreadable("a list of nothing")
    return items


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
    """What the left side of an equation names where it is no more than a name: x, f(x), \\text{Area}, \\angle ABC."""
    kinds = {token.kind for token in tokens}
    if not tokens or not kinds <= {
        "name",
        "text",
        "command",
        "open",
        "close",
        "_",
        "|",
        "'",
        "fn",
        "const",
        "number",
    }:
        return ""
    if len(tokens) == 1 and tokens[0].kind in ("name", "text"):
        return tokens[0].text
    if len(tokens) == 1 and tokens[0].text in ("i", "e"):
        return tokens[0].text
    texts = [token.text for token in tokens]
    if len(tokens) >= 4 and tokens[0].kind in ("name", "text") and texts[-1] == ")" and "(" in texts[1:3]:
        inside = tokens[texts.index("(") + 1 : -1]
        return "".join(texts) if all(token.kind in ("name", "sep") for token in inside) else ""
    if "_" in kinds and tokens[0].kind in ("name", "text") and texts[1] == "_":
        return "".join(texts)
    if any(token.kind == "text" and len(token.text) > 1 for token in tokens) and not kinds & {
        "number",
        "const",
    }:
        return " ".join(texts)
    if tokens[0].kind == "command" and texts[0] in (
        "angle",
        "triangle",
        "overline",
        "measuredangle",
        "Delta",
    ):
        return " ".join(texts)
    return ""


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
        items = tuple(_read(part, nesting + 1) for part in parts if part)
        if not items:
            raise Unreadable("a list of nothing")
        return Many(items, opener, closer)
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
    if not inner or inner[0].kind != "env" or inner[0].text not in _MATRICES:
        raise Unreadable("an environment", foreign=True)
    rows = [row for row in _split(inner[1:], ("row",))[0] if row]
    cells = tuple(tuple(_read(cell, nesting + 1) for cell in _split(row, ("&",))[0]) for row in rows)
    if len({len(row) for row in cells}) != 1:
        raise Unreadable("rows of different lengths")
    return Matrix(cells)


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
    term = expressions.parse(core)
    unit = currency or unit
    unit = None if unit is None or unit.empty else unit
    terms = _signs(term)
    values = tuple(Value(each, unit, percent) for each in terms)
    return values[0] if len(values) == 1 else Many(values, joiner="or")


def _measurable(core: Sequence[Token], unit: Unit) -> bool:
    """Whether words after these tokens can be their unit: a number, or a letter with a unit that is known."""
    return any(token.kind in ("number", "const") for token in core) or bool(unit.powers)


def _split_unit(tokens: Sequence[Token]) -> tuple[Sequence[Token], Sequence[Token]]:
    """The tokens before the unit and those of the unit: all from the first word outside brackets on."""
    level = 0
    angle_argument = any(
        token.kind == "fn" for token in tokens
    )  # \sin 30°: the degrees belong to the argument
    has_names = any(token.kind == "name" and token.text not in UNIT_SYMBOLS for token in tokens)
    for index, token in enumerate(tokens):
        level += (token.kind == "open") - (token.kind == "close")
        if level or index == 0:
            continue
        single = token.kind == "name" and token.text in UNIT_SYMBOLS and token.spaced and not has_names
        clock = token.kind == "fn" and token.text in ("min", "sec") and token.spaced
        if clock and index + 1 < len(tokens) and tokens[index + 1].kind not in ("/", ".", "*"):
            clock = False
        if single and tokens[index - 1].kind not in ("number", "close", "const"):
            single = False
        degree = token.kind == "command" and token.text == "degree" and not angle_argument
        if token.kind == "text" or single or clock or degree:
            return tokens[:index], tokens[index:]
    return tokens, ()


def _as_words(tokens: Sequence[Token]) -> Answer:
    text = plain_words(" ".join(token.text or str(token.value) for token in tokens))
    if text == "infinity":
        return Value(Term("const", name="inf"))
    if text in NUMBER_WORDS:
        return Value(number(Fraction(NUMBER_WORDS[text])))
    if text in SET_WORDS:
        return Named(SET_WORDS[text])
    if not text:
        raise Unreadable("nothing")
    if not any(token.kind == "text" for token in tokens):
        expressions.parse(tokens)
    return Words(SYNONYMS.get(text, text))


def plain_words(text: str) -> str:
    """Lower case, without punctuation, articles and repeated spaces."""
    text = re.sub(r"[^\w\s:+-]", " ", text.lower())
    return " ".join(word for word in text.split() if word not in ("a", "an", "the"))


def _signs(term: Term) -> tuple[Term, ...]:
    """The terms that ± stands for: with each choice of signs, one choice for all where ∓ occurs too."""
    if "pm" not in operators(term):
        return (term,)
    choices = _choices(term)
    linked = "mp" in _sign_names(term)
    if len(choices) > 8:
        raise TooLarge("signs")
    return tuple(choices) if not linked else (_chosen(term, 1), _chosen(term, -1))


def _sign_names(term: Term) -> frozenset[str]:
    found = frozenset((term.name,)) if term.op == "pm" else frozenset()
    for arg in term.args:
        found |= _sign_names(arg)
    return found


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
    return [Term(term.op, args, term.value, term.name, term.depth) for args in combined]


def _chosen(term: Term, sign: int) -> Term:
    args = tuple(_chosen(arg, sign) for arg in term.args)
    if term.op != "pm":
        return Term(term.op, args, term.value, term.name, term.depth)
    plus = (sign if term.name == "pm" else -sign) > 0
    return make("add", args[0], args[1] if plus else make("neg", args[1]))
