"""Expressions as trees, their exact values, and the parser that makes them of tokens.

Values are rational, with caps on their size, and no floating point. The module is long because the parser, a reader by
precedence, and the trees that it makes are one vocabulary of operators.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

from polyturn.envs.rewards.math.tokens import OPENERS, Token
from polyturn.envs.rewards.math.verdict import NotRational, TooLarge, Undefined, Unreadable

MAX_DEPTH = 150
MAX_BITS = 20_000
"""Of numerators and denominators."""
MAX_ITERATIONS = 1_000
"""Of sums, products and factorials."""
MAX_STEPS = 50_000
"""Terms evaluated for one value."""


@dataclass(frozen=True, slots=True)
class Term:
    """An operator with its operands, a number, a variable or a constant.

    Operators: `num` (value), `var` and `const` (name: pi, e, i, inf), `add`, `mul`, `neg`, `div`, `pow`, `root`
    (radicand, index), `log` (argument, base), `fn` (name; arguments), `fact`, `binom`, `deg` (degrees to radians),
    `pct`, `pm` (choice of signs: a, b for a ± b), `sum` and `prod` (name of the index; first, last, body).
    """

    op: str
    args: tuple[Term, ...] = ()
    value: Fraction | None = None
    name: str = ""
    depth: int = 0


def make(op: str, *args: Term, name: str = "") -> Term:
    """A term over others.

    Raises:
        TooLarge: it is nested too deeply.
    """
    depth = 1 + max((arg.depth for arg in args), default=0)
    if depth > MAX_DEPTH:
        raise TooLarge("nested too deeply")
    return Term(op, args, None, name, depth)


def number(value: Fraction | int) -> Term:
    """A rational constant."""
    return Term("num", (), Fraction(value))


def variables(term: Term) -> frozenset[str]:
    """The names of the free variables."""
    if term.op == "var":
        return frozenset((term.name,))
    found: frozenset[str] = frozenset()
    for arg in term.args:
        found |= variables(arg)
    return found - {term.name} if term.op in ("sum", "prod") else found


def subterms(term: Term) -> Iterator[Term]:
    """A term and all that it is made of."""
    stack = [term]
    while stack:
        yield (each := stack.pop())
        stack.extend(each.args)


def operators(term: Term) -> frozenset[str]:
    """All operators and function names in a term."""
    terms = list(subterms(term))
    return frozenset({each.op for each in terms} | {each.name for each in terms if each.op == "fn"})


def with_args(term: Term, args: Iterable[Term]) -> Term:
    """The same operator over other operands."""
    return Term(term.op, tuple(args), term.value, term.name, term.depth)


class Steps:
    """How many terms may still be evaluated: sums in sums take as many steps as all their rounds together.

    Args:
        left: So many terms.
        error: What is raised when they are used up.
    """

    def __init__(self, left: int = MAX_STEPS, error: Exception | None = None) -> None:
        self.left = left
        self._error = error or TooLarge("steps")

    def take(self) -> None:
        self.left -= 1
        if self.left < 0:
            raise self._error


def exact(term: Term, env: Mapping[str, Fraction], steps: Steps | None = None) -> Fraction:
    """The rational value of a term where its variables have the values of `env`.

    Raises:
        NotRational: it has none, or none that rational arithmetic finds.
        Undefined: it divides by zero, for example.
        TooLarge: a number on the way exceeds the caps, or there are too many `steps`.
    """
    op = term.op
    steps = steps or Steps()
    steps.take()
    if op == "num":
        assert term.value is not None
        return term.value
    if op == "var":
        if term.name not in env:
            raise NotRational(term.name)
        return env[term.name]
    if op in ("sum", "prod"):
        return _iterate(term, env, steps)
    if op in ("const", "deg", "pm"):
        raise NotRational(op)
    values = [exact(arg, env, steps) for arg in term.args]
    if op == "add":
        return _capped(_sum(values))
    if op == "mul":
        total = Fraction(1)
        for value in values:
            total = _capped(total * value)
        return total
    if op == "neg":
        return -values[0]
    if op == "pct":
        return values[0] / 100
    if op == "div":
        if values[1] == 0:
            raise Undefined("division by zero")
        return _capped(values[0] / values[1])
    return _function(term, values)


def _function(term: Term, values: list[Fraction]) -> Fraction:
    op = term.op
    if op == "pow":
        return power(values[0], values[1])
    if op == "root":
        return _root(values[0], values[1])
    if op == "log":
        return _log(values)
    if op == "fact":
        return Fraction(math.factorial(_count(values[0])))
    if op == "binom":
        chosen = _count(values[1])
        if values[0].denominator == 1 and values[0] >= 0:
            whole = int(values[0])
            smaller = min(chosen, whole - chosen) if chosen <= whole else 0
            if smaller > MAX_ITERATIONS or smaller * whole.bit_length() > MAX_BITS:
                raise TooLarge("binomial")
            return Fraction(math.comb(whole, chosen))
        raise NotRational(op)
    simple = _SIMPLE.get(term.name)
    if simple is None:
        raise NotRational(term.name)
    if term.name in ("gcd", "lcm") and any(value.denominator != 1 for value in values):
        raise Undefined(term.name)
    return _capped(Fraction(simple(values)))


_SIMPLE: Mapping[str, Callable[[list[Fraction]], Any]] = {
    "abs": lambda values: abs(values[0]),
    "floor": lambda values: math.floor(values[0]),
    "ceil": lambda values: math.ceil(values[0]),
    "max": max,
    "min": min,
    "gcd": lambda values: math.gcd(*map(int, values)),
    "lcm": lambda values: math.lcm(*map(int, values)),
    "mod": lambda values: values[0] % values[1] if values[1] else _undefined(),
}


def _undefined() -> Fraction:
    raise Undefined("modulo zero")


def power(base: Fraction, exponent: Fraction) -> Fraction:
    """`base ** exponent` where that is rational. Raises as `exact`."""
    if exponent.denominator != 1:
        if base < 0 or abs(exponent.numerator) > MAX_BITS:
            raise NotRational("power")
        return power(_root(base, Fraction(exponent.denominator)), Fraction(exponent.numerator))
    if base == 0 and exponent < 0:
        raise Undefined("division by zero")
    if base in (0, 1):
        return base if exponent != 0 else Fraction(1)
    if base == -1:
        return Fraction(-1 if exponent.numerator % 2 else 1)
    bits = max(base.numerator.bit_length(), base.denominator.bit_length())
    if abs(exponent.numerator) > MAX_BITS or bits * abs(exponent.numerator) > MAX_BITS:
        raise TooLarge("power")
    return base**exponent.numerator


def _root(radicand: Fraction, index: Fraction) -> Fraction:
    """The real root where it is rational; of a negative number where the index is odd."""
    if index.denominator != 1 or not 1 <= index.numerator <= 64:
        raise NotRational("root")
    degree = index.numerator
    if radicand < 0:
        if degree % 2 == 0:
            raise NotRational("root")
        return -_root(-radicand, index)
    numerator = _integer_root(radicand.numerator, degree)
    denominator = _integer_root(radicand.denominator, degree)
    if numerator**degree != radicand.numerator or denominator**degree != radicand.denominator:
        raise NotRational("root")
    return Fraction(numerator, denominator)


def _integer_root(value: int, degree: int) -> int:
    """The largest integer whose power does not exceed `value`."""
    if degree == 2:
        return math.isqrt(value)
    low, high = 0, 1 << (value.bit_length() // degree + 1)
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if middle**degree <= value else (low, middle - 1)
    return low


def _log(values: list[Fraction]) -> Fraction:
    """The logarithm to a given rational base where it is an integer, or a half, third or fourth of one."""
    argument, base = values[0], values[1] if len(values) > 1 else None
    if argument <= 0 or (base is not None and (base <= 0 or base == 1)):
        raise Undefined("logarithm")
    if argument == 1:
        return Fraction(0)
    if base is None:
        raise NotRational("log")
    guess = _log2(argument) / _log2(base) if abs(_log2(base)) > 1e-12 else math.inf
    if not math.isfinite(guess) or abs(guess) > MAX_BITS:
        raise NotRational("log")
    for parts in (1, 2, 3, 4):
        exponent = round(guess * parts)
        if abs(guess * parts - exponent) < 1e-9 and power(base, Fraction(exponent)) == argument**parts:
            return Fraction(exponent, parts)
    raise NotRational("log")


def _log2(value: Fraction) -> float:
    return math.log2(value.numerator) - math.log2(value.denominator)


def _iterate(term: Term, env: Mapping[str, Fraction], steps: Steps) -> Fraction:
    first, last = (exact(bound, env, steps) for bound in term.args[:2])
    if first.denominator != 1 or last.denominator != 1:
        raise NotRational(term.op)
    if last - first > MAX_ITERATIONS:
        raise TooLarge(term.op)
    total = Fraction(0 if term.op == "sum" else 1)
    for index in range(int(first), int(last) + 1):
        value = exact(term.args[2], {**env, term.name: Fraction(index)}, steps)
        total = _capped(total + value if term.op == "sum" else total * value)
    return total


def _sum(values: list[Fraction]) -> Fraction:
    """The sum, fast where all are integers."""
    if all(value.denominator == 1 for value in values):
        return Fraction(sum(value.numerator for value in values))
    return sum(values, Fraction(0))


def _count(value: Fraction) -> int:
    if value.denominator != 1 or value < 0:
        raise NotRational("not a count")
    if value > MAX_ITERATIONS:
        raise TooLarge("count")
    return int(value)


def _capped(value: Fraction) -> Fraction:
    if value.numerator.bit_length() > MAX_BITS or value.denominator.bit_length() > MAX_BITS:
        raise TooLarge("number")
    return value


_VARIADIC = frozenset(("gcd", "lcm", "max", "min"))


def apply(name: str, arguments: tuple[Term, ...], base: Term | None) -> Term:
    """A function of its arguments; `base` is what stood as its subscript. Raises `Unreadable`."""
    if name in _VARIADIC:
        return make("fn", *arguments, name=name)
    if name == "binom" and len(arguments) == 2:
        return make("binom", *arguments)
    if name == "log" and len(arguments) == 2 and base is None:
        return make("log", *arguments)
    if len(arguments) != 1:
        raise Unreadable(f"{name} takes one argument")
    argument = arguments[0]
    if name == "sqrt":
        return make("root", argument, number(2))
    if name == "cbrt":
        return make("root", argument, number(3))
    if name == "factorial":
        return make("fact", argument)
    if name == "exp":
        return make("pow", Term("const", name="e"), argument)
    if name == "lg":
        return make("log", argument, number(10))
    if name == "ln":
        return make("log", argument, Term("const", name="e"))
    if name == "log":
        return make("log", argument, *(() if base is None else (base,)))
    return make("fn", argument, name=name)


def renamed(body: Term, name: str) -> Term:
    """The body of a sum, where an index called i or e is no constant."""
    if name not in ("i", "e"):
        return body
    if body.op == "const" and body.name == name:
        return Term("var", name=name)
    return with_args(body, (renamed(arg, name) for arg in body.args))


def spelled(term: Term) -> str:
    """An index as part of a name."""
    if term.op == "num":
        return str(term.value)
    return term.name or f"{term.op}({','.join(map(spelled, term.args))})"


def add(terms: list[Term]) -> Term:
    """The sum of terms; of one, itself."""
    return terms[0] if len(terms) == 1 else make("add", *terms)


def multiply(factors: list[Term]) -> Term:
    """The product of factors; of one, itself."""
    return factors[0] if len(factors) == 1 else make("mul", *factors)


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
