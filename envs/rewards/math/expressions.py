"""The parser of expressions: from tokens to terms.

Brackets are reduced when they close, innermost first, so that nesting costs no recursion; within one pair of brackets
the operators are read by precedence. Nothing here evaluates anything.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction

from polyturn.envs.rewards.math.functions import add, apply, multiply, renamed, spelled
from polyturn.envs.rewards.math.lexer import Token
from polyturn.envs.rewards.math.terms import Term, make, number
from polyturn.envs.rewards.math.verdict import TooLarge, Unreadable
from polyturn.envs.rewards.math.vocabulary import OPENERS

_MAX_CHAIN = 60
"""Signs or exponents in a row."""
_FOREIGN = frozenset(("int", "iint", "lim", "det", "partial", "nabla", "prime", "pmod", "oint", "arg", "sup"))
_INVERSES = {"sin": "asin", "cos": "acos", "tan": "atan", "cot": "acot", "sec": "asec", "csc": "acsc"}


@dataclass(frozen=True, slots=True)
class Group:
    """What stood between two brackets: its terms, one unless commas part them; `binding` for `k=1` in braces."""

    opener: str
    terms: tuple[Term, ...]
    binding: str = ""
    spaced: bool = False

    @property
    def kind(self) -> str:
        return "group"

    @property
    def term(self) -> Term:
        if len(self.terms) != 1:
            raise Unreadable("a list where one value belongs")
        return self.terms[0]


Item = Token | Group


def parse(tokens: Sequence[Token]) -> Term:
    """The term that the tokens spell.

    Raises:
        Unreadable: they spell none.
        TooLarge: nested too deeply.
    """
    frames: list[tuple[Token | None, list[Item]]] = [(None, [])]
    for token in tokens:
        opener, items = frames[-1]
        closes_bar = opener is not None and opener.kind == "|" and _ends_operand(items)
        if token.kind == "open" or (token.kind == "|" and not closes_bar):
            frames.append((token, []))
        elif token.kind in ("close", "|"):
            if opener is None or (token.kind == "close" and OPENERS.get(opener.text) != token.text):
                raise Unreadable("brackets do not match")
            frames.pop()
            frames[-1][1].append(_close(opener, items))
        else:
            items.append(token)
    if len(frames) != 1:
        raise Unreadable("brackets do not match")
    return _Reader(frames[0][1]).read()


def _ends_operand(items: list[Item]) -> bool:
    if not items:
        return False
    return items[-1].kind in ("number", "name", "const", "group", "!", "%", "'")


def _close(opener: Token, items: list[Item]) -> Group:
    """The group between brackets that have just been closed."""
    binding = ""
    name = items[0] if items else None
    if opener.text == "{" and len(items) > 2 and items[1].kind == "=" and isinstance(name, Token):
        binding, items = name.text, items[2:]
    terms = tuple(_Reader(part).read() for part in _split(items))
    if opener.kind == "|":
        terms = (make("fn", *terms, name="abs"),)
    elif opener.text in ("lfloor", "lceil"):
        terms = (make("fn", *terms, name=opener.text[1:].replace("ceil", "ceil")),)
    elif opener.text not in ("(", "[", "{"):
        raise Unreadable("a set where a value belongs")
    return Group(opener.text, terms, binding, opener.spaced)


def _split(items: list[Item]) -> list[list[Item]]:
    parts: list[list[Item]] = [[]]
    for item in items:
        if isinstance(item, Token) and item.kind == "sep":
            parts.append([])
        else:
            parts[-1].append(item)
    return parts


class _Reader:
    """Reads one flat list of tokens and reduced groups by precedence."""

    def __init__(self, items: Sequence[Item]) -> None:
        self._items = items
        self._at = 0

    def read(self) -> Term:
        if not self._items:
            raise Unreadable("nothing where a value belongs")
        term = self._sum()
        if self._at != len(self._items):
            raise Unreadable(f"{self._kind()} out of place")
        return term

    def _kind(self, ahead: int = 0) -> str:
        index = self._at + ahead
        return self._items[index].kind if index < len(self._items) else ""

    def _take(self) -> Item:
        if self._at >= len(self._items):
            raise Unreadable("an operand is missing")
        self._at += 1
        return self._items[self._at - 1]

    def _token(self) -> Token | None:
        item = self._items[self._at] if self._at < len(self._items) else None
        return item if isinstance(item, Token) else None

    def _sum(self) -> Term:
        terms: list[Term] = []
        while True:
            if self._kind() in ("pm", "mp"):
                sign = "mp" if self._take().kind == "mp" else "pm"
                left = add(terms) if terms else number(0)
                terms = [make("pm", left, self._product(), name=sign)]
            elif self._kind() == "+" and terms:
                self._at += 1
                terms.append(self._product())
            elif self._kind() == "-" and terms:
                self._at += 1
                terms.append(make("neg", self._product()))
            elif not terms:
                terms.append(self._product())
            else:
                return add(terms)

    def _product(self) -> Term:
        negative = self._sign()
        result = self._mixed_number() or self._power()
        factors = [result]
        while True:
            kind = self._kind()
            if kind == "*":
                self._at += 1
                negative ^= self._sign()
                factors.append(self._mixed_number() or self._power())
            elif kind == "/":
                self._at += 1
                negative ^= self._sign()
                factors = [make("div", multiply(factors), self._power())]
            elif kind == "mod":
                self._at += 1
                factors = [make("fn", multiply(factors), self._power(), name="mod")]
            elif self._starts_operand():
                if kind == "number" and self._items[self._at - 1].kind == "number":
                    raise Unreadable("two numbers side by side")
                factors.append(self._power())
            else:
                break
        term = multiply(factors)
        return make("neg", term) if negative else term

    def _sign(self) -> bool:
        """Whether the signs that stand here make a minus."""
        negative, count = False, 0
        while self._kind() in ("+", "-"):
            negative ^= self._take().kind == "-"
            count += 1
        if count > _MAX_CHAIN:
            raise TooLarge("signs")
        return negative

    def _starts_operand(self) -> bool:
        if self._kind() in ("number", "name", "const", "fn", "group"):
            return True
        token = self._token()
        return token is not None and token.kind == "command" and token.text in _READERS

    def _mixed_number(self) -> Term | None:
        """2 1/3 or 2\\frac{1}{3}, with a proper fraction of whole numbers: a sum, not a product."""
        whole = self._token()
        if whole is None or whole.kind != "number" or not whole.text.isdigit() or not whole.value:
            return None
        parts: list[Item]
        following = self._items[self._at + 1] if self._at + 1 < len(self._items) else None
        if not isinstance(following, Token):
            return None
        if following.kind == "number" and following.spaced:
            parts = [following, *self._items[self._at + 3 : self._at + 4]]
            if self._kind(2) != "/":
                return None
        elif following.kind == "command" and following.text == "frac":
            parts = list(self._items[self._at + 2 : self._at + 4])
        else:
            return None
        if len(parts) != 2:
            return None
        over, under, after = _whole(parts[0]), _whole(parts[1]), self._kind(4)
        if over is None or under is None or not 0 < over < under or after in ("^", "!", "."):
            return None
        self._at += 4
        return number(whole.value + Fraction(over, under))

    def _power(self) -> Term:
        """An operand with its exponents and postfix operators; exponents bind to the right."""
        chain = [self._postfix()]
        negatives = [False]
        while self._kind() == "^":
            self._at += 1
            negatives.append(self._sign())
            chain.append(self._postfix())
            if len(chain) > _MAX_CHAIN:
                raise TooLarge("exponents")
        term = chain.pop()
        while chain:
            term = make("pow", chain.pop(), make("neg", term) if negatives.pop() else term)
        return term

    def _postfix(self) -> Term:
        term = self._atom()
        while True:
            kind = self._kind()
            if kind == "!" and self._kind(1) != "=":
                self._at += 1
                if self._kind() == "!":
                    raise Unreadable("a double factorial")
                term = make("fact", term)
            elif kind == "%":
                self._at += 1
                term = make("pct", term)
            elif self._is_command("degree"):
                self._at += 1
                term = make("deg", term)
            else:
                return term

    def _is_command(self, name: str) -> bool:
        token = self._token()
        return token is not None and token.kind == "command" and token.text == name

    def _atom(self) -> Term:
        item = self._take()
        if isinstance(item, Group):
            return item.term
        if item.kind == "number":
            assert item.value is not None
            return number(item.value)
        if item.kind == "const":
            return Term("const", name=item.text)
        if item.kind == "name":
            return self._name(item)
        if item.kind == "fn":
            return self._function(item.text)
        if item.kind == "command" and item.text in _READERS:
            return _READERS[item.text](self)
        raise Unreadable(f"{item.text!r} is no value", foreign=item.text in _FOREIGN)

    def _name(self, token: Token) -> Term:
        name = token.text
        if self._kind() == "_":
            self._at += 1
            index = self._take()
            name += "_" + (index.text if isinstance(index, Token) else spelled(index.term))
        elif name in ("i", "e"):
            return Term("const", name=name)
        while self._kind() == "'":
            self._at += 1
            name += "'"
        return Term("var", name=name)

    def _function(self, name: str) -> Term:
        """A function with its base, its exponent and its argument: a bracket, or what is multiplied without a sign."""
        base: Term | None = None
        exponent: Term | None = None
        while self._kind() in ("_", "^"):
            if self._take().kind == "_":
                base = self._script()
            else:
                negative = self._sign()
                exponent = self._script()
                exponent = make("neg", exponent) if negative else exponent
        arguments = self._arguments()
        if exponent is not None and name in _INVERSES and exponent == make("neg", number(1)):
            name, exponent = _INVERSES[name], None
        term = apply(name, arguments, base)
        return term if exponent is None else make("pow", term, exponent)

    def _script(self) -> Term:
        return self._atom()

    def _arguments(self) -> tuple[Term, ...]:
        item = self._items[self._at] if self._at < len(self._items) else None
        if isinstance(item, Group):
            self._at += 1
            if self._kind() == "^" and item.opener == "{":
                self._at -= 1
                return (self._power(),)
            return item.terms
        negative = self._sign()
        factors = [self._power()]
        while self._starts_operand() and self._kind() != "fn" and not self._is_paren():
            factors.append(self._power())
        if self._kind() == "/" and self._kind(1) == "number" and len(factors) == 1:  # \sin \pi/6
            self._at += 1
            factors = [make("div", factors[0], self._power())]
        term = multiply(factors)
        return (make("neg", term) if negative else term,)

    def _is_paren(self) -> bool:
        item = self._items[self._at]
        return isinstance(item, Group) and item.opener != "{"

    def fraction(self) -> Term:
        over = self._atom()
        under = self._atom()
        return make("div", over, under)

    def binomial(self) -> Term:
        return make("binom", self._atom(), self._atom())

    def root(self) -> Term:
        item = self._items[self._at] if self._at < len(self._items) else None
        index = number(2)
        if isinstance(item, Group) and item.opener == "[":
            self._at += 1
            index = item.term
        return make("root", self._atom(), index)

    def iteration(self, op: str) -> Term:
        bounds: dict[str, Group | Term] = {}
        name = ""
        for _ in range(2):
            mark = self._kind()
            if mark not in ("_", "^"):
                raise Unreadable("a sum without bounds", foreign=True)
            self._at += 1
            group = self._items[self._at] if self._at < len(self._items) else None
            if mark == "_" and isinstance(group, Group):
                name = group.binding
            bounds[mark] = self._atom()
        if not name or len(bounds) != 2:
            raise Unreadable("a sum without an index", foreign=True)
        first, last = bounds["_"], bounds["^"]
        assert isinstance(first, Term) and isinstance(last, Term)
        return make(op, first, last, renamed(self._product(), name), name=name)


_READERS = {
    "frac": _Reader.fraction,
    "binom": _Reader.binomial,
    "sqrt": _Reader.root,
    "sum": lambda reader: reader.iteration("sum"),
    "prod": lambda reader: reader.iteration("prod"),
}


def _whole(item: Item) -> int | None:
    """The whole number that an item is, or None."""
    if isinstance(item, Group):
        if len(item.terms) != 1 or item.terms[0].op != "num":
            return None
        value = item.terms[0].value
    else:
        value = item.value if item.kind == "number" else None
    return int(value) if value is not None and value.denominator == 1 else None
