"""The verdict on a gold answer and an answer, both as text: at once where it can be, else by what they are read as."""

from __future__ import annotations

import re
from fractions import Fraction

from polyturn.envs.rewards.math.answers import read_answer
from polyturn.envs.rewards.math.compare import Comparison
from polyturn.envs.rewards.math.equality import Equality
from polyturn.envs.rewards.math.kinds import Answer, Many, Ratio, Value, Words
from polyturn.envs.rewards.math.normalise import normalise
from polyturn.envs.rewards.math.verdict import Reason, TooLarge, Undefined, Unreadable

MAX_CHARACTERS = 16_000

_PLAIN_NUMBER = re.compile(
    r"\s*(-?)\+?((?:\d{1,400}|\d{1,3}(?:,\d{3}){1,9})(?:\.\d{1,400})?)\.?\s*", re.ASCII
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
_FOREIGN = re.compile(r"\\(?:int|iint|oint|lim|sum|prod|det|partial)(?![A-Za-z])|\\begin\{[vV]matrix\}")
"""What math-verify may know where this reader does not."""
_DERIVATIVE = re.compile(
    r"\\frac\{(?:d|\\partial)(?:\^\{?\d\}?)?\s*[a-z]?\}\{(?:d|\\partial)\s*[a-z](?:\^\{?\d\}?)?\}(?!\s*=)"
)
_THOUSANDS = re.compile(r"\d,\d{3}(?!\d)")
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
    numbers = _PLAIN_NUMBER.fullmatch(gold), _PLAIN_NUMBER.fullmatch(answer)
    if numbers[0] and numbers[1]:
        left, right = (found[1] + found[2].replace(",", "") for found in numbers if found)
        return left == right or Fraction(left) == Fraction(right), "number"
    gold, answer = normalise(gold), normalise(answer)
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
    if _DERIVATIVE.search(gold) or _DERIVATIVE.search(answer):
        raise Unreadable("a derivative", foreign=True)
    equality = Equality(f"{gold}|{answer}".encode(errors="surrogatepass"), deep=deep)
    compare = Comparison(equality)
    left = read_answer(gold)
    right = read_answer(answer)
    correct = compare.same(left, right)
    if not correct and _is_bare_list(right) and _THOUSANDS.search(gold) and isinstance(left, Value):
        # 100,200 may be two numbers after all, where the other side is a list.
        correct = compare.same(read_answer(gold, thousands=False), right)
    elif not correct and _is_bare_list(left) and _THOUSANDS.search(answer) and isinstance(right, Value):
        correct = compare.same(left, read_answer(answer, thousands=False))
    if (
        not correct
        and isinstance(right, Many)
        and not right.opener
        and isinstance(left, Value | Words | Ratio)
    ):
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
    letter, _ = _choice(gold)
    if not letter:
        return None
    chosen, rest = _choice(answer)
    if not chosen:
        return None
    if rest and _MORE_CHOICES.search(f" {rest}"):
        return False
    return letter.upper() == chosen.upper()


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
