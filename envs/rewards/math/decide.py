"""The verdict on a gold answer and an answer, both as text: at once where it can be, else by what they are read as.

Answers with a free parameter (`x = k\\pi, k \\in \\mathbb{Z}`) are compared as families.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from fractions import Fraction

from polyturn.envs.rewards.math.answers import Answer, Clock, Many, Ratio, Relation, Value, Words, read_answer
from polyturn.envs.rewards.math.compare import Comparison
from polyturn.envs.rewards.math.equality import Equality
from polyturn.envs.rewards.math.terms import Term, make, number, variables
from polyturn.envs.rewards.math.tokens import normalise
from polyturn.envs.rewards.math.verdict import Reason, TooLarge, Undecided, Undefined, Unreadable

MAX_TAIL = 120
"""Characters at the end of an answer where a qualifier is looked for."""
_SHIFTS = (0, 1, -1, 2, -2)
_TEXTS = re.compile(r"\\(?:text|mathrm|mbox|textrm)\s*+\{([^{}]*+)\}")
_SETS = re.compile(r"\\math(?:bb|bf|rm)\s*+\{?\s*+([ZNRQC])\s*+\}?")
_SET = r"(?P<set>[ZNRQC])(?:\s*+\^\s*+(?P<sign>[+*])|\s*+_\s*+\{?\s*+(?P<floor>\+|>\s*0|\\ge\s*0)\s*+\}?)?"
_KIND = (
    r"(?:an?\s++|any\s++|some\s++|all\s++|the\s++){0,4}+(?P<kind>(?:arbitrary\s++|positive\s++|non-?negative\s++){0,3}+"
    r"(?:integers?|real\s++numbers?|reals?|real\s++constants?|constants?|natural\s++numbers?|whole\s++numbers?))"
)
_LEAD = r"(?:where|for|with|and|when)?\s*+(?:all|any|every|each|some)?\s*+"
_QUALIFIERS = tuple(
    re.compile(rf"(?:(?<!\s)\s|[,;(\[])\s*+{form}\s*+[)\]]?\s*+$")
    for form in (
        rf"{_LEAD}(?P<name>[a-zA-Z])\s*+\\in\s*+{_SET}",
        rf"{_LEAD}(?P<name>[a-zA-Z])\s++(?:is|are|being|=)?\s*+{_KIND}",
        rf"(?:where|for|with)\s++{_KIND}\s*+(?P<name>[a-zA-Z])?",
        r"(?:for|where)\s++(?:all|any|every|each)\s++(?:real\s++)?(?P<name>[a-zA-Z])",
    )
)
_BUILDER = re.compile(
    r"\\\{(?P<left>[^{}|:]*+(?:\{[^{}]*+\}[^{}|:]*+)*+)(?:\\mid|[|:])(?P<right>.*)\\\}$", re.DOTALL
)


@dataclass(frozen=True, slots=True)
class Qualified:
    """An answer's text without its qualifier, the parameter that this names, and what the parameter runs over."""

    text: str
    parameter: str = ""
    domain: str = ""


def without_qualifier(text: str) -> Qualified:
    """Take `, k \\in \\mathbb{Z}`, `where k is an integer` or `for any real c` off the end of a normalised answer."""
    if len(text) > 10 * MAX_TAIL or not any(
        mark in text for mark in ("\\in", "integer", "real", "constant", "for ", "number")
    ):
        return Qualified(text)
    if found := _BUILDER.fullmatch(text.strip()):
        left, right = found["left"].strip(), found["right"].strip()
        inner = without_qualifier(f"{left}, {right}")
        if inner.parameter and inner.text.rstrip(" ,") == left:
            return Qualified(left, inner.parameter, inner.domain)
        inner = without_qualifier(right)
        if inner.parameter and re.match(r"[a-z]\s*+=", right):
            return inner
        return Qualified(text)
    head, tail = text[:-MAX_TAIL], text[-MAX_TAIL:]
    flat = _SETS.sub(r"\1", _TEXTS.sub(r" \1 ", tail))
    for pattern in _QUALIFIERS:
        if (found := pattern.search(flat)) and (head + flat[: found.start()]).strip():
            rest = (head + flat[: found.start()]).rstrip(" ,;(\\") if flat[: found.start()].strip() else head
            return Qualified(rest.rstrip(" ,;"), found["name"] or "", _domain(found.groupdict()))
    return Qualified(text)


Branch = tuple[str, tuple[Term, ...]]
"""A value, or an interval with its brackets and its ends."""


def same_family(gold: Answer, answer: Answer, names: tuple[Qualified, Qualified], equality: Equality) -> bool:
    """Whether two families have the same members, where each branch is one of the other's, run through otherwise.

    Raises as `Equality.equal`.
    """
    if names[1].domain and names[1].domain != names[0].domain:
        return False
    parameter = names[0].parameter
    branches = _branches(gold), _branches(answer)
    if not branches[1] or parameter not in _names(branches[0]):
        return Comparison(equality).same_answer(gold, answer)
    # Else the one variable that the gold answer does not have.
    new = _names(branches[1]) - _names(branches[0])
    own = names[1].parameter or (next(iter(new)) if len(new) == 1 else parameter)
    theirs = [
        (kind, tuple(_renamed(term, own, Term("var", name=parameter)) for term in terms))
        for kind, terms in branches[1]
    ]
    through_all = names[0].domain == "integers"

    def member(branch: Branch, others: list[Branch]) -> bool:
        return any(
            branch[0] == other[0] and all(map(equality.equal, branch[1], run))
            for other in others
            for run in _runs(other[1], parameter, through_all)
        )

    return all(member(each, theirs) for each in branches[0]) and all(
        member(each, branches[0]) for each in theirs
    )


def _domain(found: dict[str, str | None]) -> str:
    if found.get("set"):
        if found["set"] == "Z":
            return "positive" if found.get("sign") or found.get("floor") == "+" else "integers"
        return "naturals" if found["set"] == "N" else "any"
    kind = " ".join((found.get("kind") or "").split())
    if "integer" in kind or "whole" in kind:
        return "positive" if "positive" in kind else "integers" if "negative" not in kind else "naturals"
    return "naturals" if "natural" in kind else "any"


def _branches(answer: Answer) -> list[Branch]:
    """The branches of a family; none where it is made of anything but values and intervals."""
    if (
        isinstance(answer, Relation)
        and set(answer.ops) <= {"=", "in"}
        and len(answer.ops) == 1
        and answer.label
    ):
        return _branches(answer.sides[-1])
    if isinstance(answer, Many) and answer.opener in ("", "{"):
        found = [_branches(item) for item in answer.items]
        return [branch for branches in found for branch in branches] if all(found) else []
    if isinstance(answer, Many) and answer.opener in ("(", "[") and len(answer.items) == 2:
        ends = [_branches(item) for item in answer.items]
        if any(len(end) != 1 or end[0][0] for end in ends):
            return []
        return [(answer.opener + answer.closer, (ends[0][0][1][0], ends[1][0][1][0]))]
    if (
        isinstance(answer, Value)
        and (answer.unit is None or answer.unit.powers == (("degree", 1),))
        and not answer.percent
    ):
        return [("", (answer.term if answer.unit is None else make("deg", answer.term),))]
    return []


def _names(branches: list[Branch]) -> frozenset[str]:
    return frozenset().union(*(variables(term) for _, terms in branches for term in terms))


def _runs(terms: tuple[Term, ...], name: str, through_all: bool) -> list[tuple[Term, ...]]:
    """The terms with their parameter run through from another start, and backwards."""
    if not through_all:
        return [terms]
    variable = Term("var", name=name)
    starts = [make("add", variable, number(shift)) for shift in _SHIFTS[1:]]
    starts += [make("add", make("neg", variable), number(shift)) for shift in _SHIFTS]
    return [terms, *(tuple(_renamed(term, name, start) for term in terms) for start in starts)]


def _renamed(term: Term, name: str, replacement: Term) -> Term:
    if term.op == "var":
        return replacement if term.name == name else term
    if not term.args:
        return term
    args = tuple(_renamed(arg, name, replacement) for arg in term.args)
    return Term(term.op, args, term.value, term.name, term.depth + 2)


MAX_CHARACTERS = 16_000
MAX_QUICK = 600
"""Characters of a normalised answer that is read where nothing bounds the time but this."""

_PLAIN_NUMBER = re.compile(
    r"(?<!\d)(-?)\+?((?:\d{1,400}|\d{1,3}(?:,\d{3}){1,9})(?:\.\d{1,400})?)\.?", re.ASCII
)
_CHOICE_TEXT = re.compile(r"\\(?:text(?:bf|rm|it|sf)?|mathrm|mathbf|mbox|bf)\s*\{?")
_CHOICE = re.compile(
    r"(?:(?:the\s+)?(?:correct\s+)?(?:option|choice|answer)(?:\s+is)?[:\s]*)?(?:\(([A-Ja-j])\)|([A-Ja-j]))[.):]?",
    re.IGNORECASE,
)
_CHOICE_WITH_VALUE = re.compile(
    r"(?:(?:[Oo]ption|[Cc]hoice|[Aa]nswer)[:\s]*)?(?:\(([A-J])\)\s*|([A-J])[.):]\s+|([A-J])\)\s*)[:.]?\s*([^\s+*/^=<>].*)",
    re.DOTALL,
)
_MORE_CHOICES = re.compile(r"[(\s,;]([A-J])(?:\)|\s*[,;]|\s*$|[.:]\s)")
_CHOICES = re.compile(r"\(?[A-H]\)?(?:\s*+(?:[,;&]|and\b)?\s*+\(?[A-H](?![A-Za-z]{2})\)?)++")
_CHOSEN_VALUE = re.compile(
    r"\\(?:text(?:bf|rm|it|sf)?|mathrm|mathbf|mbox)\s*+\{\s*+\([A-J]\)[\s~]*+\}\s*+(?P<value>[^\s+*/^=<>].*+)",
    re.DOTALL,
)
"""`\\textbf{(C) }12`, as AMC prints its answers."""
_STATEMENTS = re.compile(r"(?:\\text\s*+\{|[{}\s$.,;\u3001\uff0c\uff1b\u548c\u4e0e]|[\u2460-\u2473])++")
_NUMBERED = re.compile(
    r"\(\d{1,2}\)(?:[\s,;]*+(?:and\b\s*+)?\(\d{1,2}\))++|\d{1,2}(?:[\s,;\u3001\uff0c]++(?:and\b\s*+)?\d{1,2})++",
    re.ASCII,
)
_FOREIGN = re.compile(r"\\(?:int|iint|oint|lim|sum|prod|det|partial)(?![A-Za-z])|\\begin\{[vV]matrix\}")
"""What math-verify may know where this reader does not."""
_DERIVATIVE = re.compile(
    r"\\frac\{(?:d|\\partial)(?:\^\{?\d\}?)?\s*[a-z]?\}\{(?:d|\\partial)\s*[a-z](?:\^\{?\d\}?)?\}(?!\s*=)"
)
_THOUSANDS = re.compile(r"\d,\d{3}(?!\d)")
_COMMA = re.compile(r"-?(\d{1,9}),(\d{1,12})", re.ASCII)
_MIDDLE_DOT = re.compile(r"(-?\d{1,9})\u00b7(\d{1,12})", re.ASCII)
_POINT = re.compile(r"-?\d{0,9}\.\d{1,12}", re.ASCII)
_INDIAN = re.compile(r"-?\d{1,2}(?:,\d{2}(?!\d))++,\d{3}(?:\.\d++)?", re.ASCII)
_SPACED_LETTER = re.compile(r"[\d)}]\s++(?:\\[a-zA-Z]++|[a-zA-Z])")
_INDEX = r"(?:\{[^{}]{1,12}\}|[0-9a-zA-Z])"
_COMBINATIONS = re.compile(
    rf"(?<![A-Za-z\\])(?P<letter>[CAP])\s*+(?:_\s*+(?P<of>{_INDEX})\s*+\^\s*+(?P<chosen>{_INDEX})"
    rf"|\^\s*+(?P<chosen2>{_INDEX})\s*+_\s*+(?P<of2>{_INDEX}))"
)
_SPACE = re.compile(r"\s+")
_IDLE_SPACE = re.compile(r"(?<![0-9A-Za-z])\s+|\s+(?![0-9A-Za-z])")


def decide(gold: str, answer: str, *, deep: bool) -> tuple[bool, Reason]:
    """Whether `answer` equals `gold`, and how that was found.

    Raises:
        Undecided: it takes more than exact arithmetic and `deep` is False.
        Unreadable: math-verify may know how to read it: `foreign` is True.
    """
    if not gold.strip() or not answer.strip():
        return False, "no_answer"
    if len(gold) > MAX_CHARACTERS or len(answer) > MAX_CHARACTERS:
        return False, "too_large"
    if len(statements := _statements(gold)) > 1:
        return statements == (_statements(answer) or _numbered(answer)), "choice"
    numbers = _PLAIN_NUMBER.fullmatch(gold.strip()), _PLAIN_NUMBER.fullmatch(answer.strip())
    if numbers[0] and numbers[1]:
        left, right = (found[1] + found[2].replace(",", "") for found in numbers if found)
        return left == right or Fraction(left) == Fraction(right), "number"
    if (dotted := _MIDDLE_DOT.fullmatch(answer.strip())) and _POINT.fullmatch(gold.strip()):
        answer = f"{dotted[1]}.{dotted[2]}"
    gold, answer = normalise(gold), normalise(answer)
    if not deep and max(len(gold), len(answer)) > MAX_QUICK:
        raise Undecided
    if _squeezed(gold) == _squeezed(answer) and answer:
        return True, "exact"
    if (choice := _same_choice(gold, answer)) is not None:
        return choice, "choice"
    try:
        return _decide(gold, answer, deep)
    except Unreadable as error:
        if error.foreign or _FOREIGN.search(gold) or _FOREIGN.search(answer):
            raise Unreadable(str(error), foreign=True) from error
        return False, "unreadable"
    except (Undefined, OverflowError, ZeroDivisionError):
        return False, "undefined"
    except TooLarge:
        return False, "too_large"


def _decide(gold: str, answer: str, deep: bool) -> tuple[bool, Reason]:
    """The verdict on the first reading of the two under which they are equal, else on the plain one."""
    first: tuple[bool, Reason] | None = None
    failed: Exception | None = None
    for reading in _readings(gold, answer):
        try:
            result = _compared(*reading, deep=deep)
        except (Unreadable, Undefined, OverflowError, ZeroDivisionError, TooLarge) as error:
            if isinstance(error, Unreadable) and error.foreign:
                raise
            failed = failed or error
            continue
        if result[0]:
            return result
        first = first or result
    if first is None:
        assert failed is not None
        raise failed
    return first


def _readings(gold: str, answer: str) -> Iterator[tuple[str, str, Mapping[str, bool]]]:
    """The ways in which the two can be read: 100,200 as two numbers, 3,14 with a decimal comma, letters as factors."""
    yield gold, answer, {}
    if _THOUSANDS.search(gold) or _THOUSANDS.search(answer):
        yield gold, answer, {"thousands": False}
    if (decimal := _decimal_comma(gold, answer)) is not None:
        yield *decimal, {}
    if _INDIAN.fullmatch(answer) or _INDIAN.fullmatch(gold):
        yield _without_commas(gold), _without_commas(answer), {}
    if _SPACED_LETTER.search(gold) or _SPACED_LETTER.search(answer):
        yield gold, answer, {"bare_units": False}
    if (chosen := _CHOSEN_VALUE.fullmatch(answer)) and not _CHOSEN_VALUE.fullmatch(gold):
        yield gold, chosen["value"], {}
    if _COMBINATIONS.search(gold) or _COMBINATIONS.search(answer):
        yield _COMBINATIONS.sub(_binomial, gold), _COMBINATIONS.sub(_binomial, answer), {}


def _decimal_comma(gold: str, answer: str) -> tuple[str, str] | None:
    """The two with a point for a decimal comma, where the other is one decimal number.

    A gold answer such as 2,3 is more likely a list; 0,75 and 12,25 are not.
    """
    if _COMMA.fullmatch(answer) and _POINT.fullmatch(gold):
        return gold, answer.replace(",", ".")
    if (
        (found := _COMMA.fullmatch(gold))
        and _POINT.fullmatch(answer)
        and (found[1] == "0" or len(found[2]) > 1)
    ):
        return gold.replace(",", "."), answer
    return None


def _without_commas(text: str) -> str:
    return text.replace(",", "") if _INDIAN.fullmatch(text) else text


def _binomial(found: re.Match[str]) -> str:
    """C_n^k as Chinese texts write it, and A_n^k for the number of arrangements."""
    of, chosen = (found["of"] or found["of2"]).strip("{}"), (found["chosen"] or found["chosen2"]).strip("{}")
    return rf"\binom{{{of}}}{{{chosen}}}" + (rf"\cdot ({chosen})!" if found["letter"] in "AP" else "")


def _compared(gold: str, answer: str, options: Mapping[str, bool], *, deep: bool) -> tuple[bool, Reason]:
    if _DERIVATIVE.search(gold) or _DERIVATIVE.search(answer):
        raise Unreadable("a derivative", foreign=True)
    equality = Equality(f"{gold}|{answer}".encode(errors="surrogatepass"), deep=deep)
    qualified = without_qualifier(gold), without_qualifier(answer)
    left, right = (read_answer(each.text, **options) for each in qualified)
    if not options.get("thousands", True) and not (_is_bare_list(left) and _is_bare_list(right)):
        return False, "structure"
    if qualified[0].parameter:  # of which the gold answer says what it runs over
        correct = same_family(left, right, qualified, equality)
    else:
        correct = Comparison(equality).same_answer(left, right)
    if not correct and _is_bare_list(right) and isinstance(left, Value | Words | Ratio | Clock):
        return False, "hedge"
    if equality.symbolic:
        return correct, "symbolic"
    if isinstance(left, Words) and isinstance(right, Words):
        return correct, "words"
    return correct, "number" if isinstance(left, Value) and isinstance(right, Value) else "structure"


def _is_bare_list(answer: Answer) -> bool:
    return isinstance(answer, Many) and not answer.opener


def _same_choice(gold: str, answer: str) -> bool | None:
    """Whether two option letters are the same; None where the gold answer is none, or the answer none either."""
    several = _choices(gold)
    if several and several == _choices(answer):
        return True
    letter, value = _choice(gold)
    if not letter:
        return None
    if several and value.startswith("("):  # (A)(C) is no choice of A
        return False
    chosen, rest = _choice(answer)
    if not chosen:
        return None
    if rest and _MORE_CHOICES.search(f" {rest}"):
        return False
    return letter.upper() == chosen.upper()


def _statements(text: str) -> frozenset[str]:
    """The circled numbers of `\u2460\u2462` and `\u2460\u3001\u2462`, where a text is nothing else."""
    return frozenset(re.findall("[\u2460-\u2473]", text)) if _STATEMENTS.fullmatch(text) else frozenset()


def _numbered(text: str) -> frozenset[str]:
    """The circled numbers for `1, 3` and `(1)(3)`; none where anything else is written."""
    numbers = re.findall(r"\d+", text) if _NUMBERED.fullmatch(text.strip(" $.")) else []
    return frozenset(chr(0x245F + int(each)) for each in numbers if 0 < int(each) <= 20)


def _choices(text: str) -> frozenset[str]:
    """The option letters of `A, C, D`, `ACD` or `(A) and (C)`; none where the text is anything else."""
    text = _CHOICE_TEXT.sub("", text).replace("}", "").replace("{", "").strip(" .")
    if not _CHOICES.fullmatch(text):
        return frozenset()
    letters = re.findall("[A-H]", text)
    return frozenset(letters) if len(set(letters)) == len(letters) else frozenset()


def _choice(text: str) -> tuple[str, str]:
    """The option letter that a text is, or begins with, and what follows it."""
    text = _SPACE.sub(" ", _CHOICE_TEXT.sub("", text).replace("}", "").replace("{", "")).strip()
    if found := _CHOICE.fullmatch(text):
        return found[1] or found[2], ""
    if found := _CHOICE_WITH_VALUE.fullmatch(text):
        return found[1] or found[2] or found[3], found[4]
    return "", ""


def _squeezed(text: str) -> str:
    """The text without spaces that part nothing and without a final dot."""
    text = text.rstrip(" .") if not text.endswith("..") else text
    return _IDLE_SPACE.sub("", text)
