"""Rewards by name: rules that compare an answer with the task's label.

A label that a rule cannot use is an error, at start where it can be seen and a fault where not; it never makes a 0.
"""

from __future__ import annotations

import difflib
import importlib
import re
from collections.abc import Awaitable, Mapping
from dataclasses import dataclass, field
from fractions import Fraction
from typing import Any, ClassVar

from polyturn.envs.messages import AssistantMessage, EpisodeView, Reward, Task, as_score
from polyturn.envs.plugins import make_with_options
from polyturn.envs.rewards.answers import (
    LETTERS,
    MAX_CHARS,
    Where,
    contains,
    exact_match,
    f1,
    find_answer,
    place_answer,
    read_number,
    stated_choice,
    stated_number,
)

RULES: Mapping[str, str] = {
    "exact_match": "polyturn.envs.rewards.rules:ExactMatch",
    "f1": "polyturn.envs.rewards.rules:F1",
    "contains": "polyturn.envs.rewards.rules:Contains",
    "multiple_choice": "polyturn.envs.rewards.rules:MultipleChoice",
    "numeric": "polyturn.envs.rewards.rules:Numeric",
    "regex": "polyturn.envs.rewards.rules:Regex",
    "format": "polyturn.envs.rewards.rules:Format",
    "math": "polyturn.envs.rewards.verified:MathRule",
    "unit_tests": "polyturn.envs.rewards.verified:UnitTestsRule",
}
"""`module:name` of what makes each rule; imported when it is asked for."""


_SOLUTION_END = "\n####"
"""Begins the last line of a solution as GSM8K has them; the answer follows."""


def make_rule(name: str, options: Mapping[str, Any] | None = None) -> Reward:
    """The rule of that name.

    Raises:
        ValueError: there is none, or it does not take these options or values.
    """
    if name not in RULES:
        near = difflib.get_close_matches(name, RULES, n=1, cutoff=0.5)
        hint = f"did you mean {near[0]!r}?" if near else f"there are {', '.join(RULES)}"
        raise ValueError(f"there is no reward rule {name!r}; {hint}")
    module, _, attribute = RULES[name].partition(":")
    make = getattr(importlib.import_module(module), attribute)
    return make_with_options(make, options or {}, what=f"reward rule {name!r}")


def check_label(reward: Any, label: Any) -> None:
    """Raise `ValueError` for a label that a reward cannot grade against, or for which it pays no answer.

    A reward says the first by a method `check_label(label)`. One with a method `right_answer(label)`, the text of a
    right answer, is asked to grade that; a reward without either takes any label.
    """
    check = getattr(reward, "check_label", None)
    if check is not None:
        check(label)
    right_answer = getattr(reward, "right_answer", None)
    if right_answer is None or (answer := right_answer(label)) is None:
        return
    message = AssistantMessage(content=answer)
    task = Task.from_prompt("label", "", label=label)
    value = reward(EpisodeView(task=task, message=message, messages=(message.to_message(),)))
    assert not isinstance(value, Awaitable), "a reward that says what is right is not asynchronous"
    name = getattr(reward, "name", "reward")
    if not as_score(value, name=name).value > 0:
        raise ValueError(
            f"{name}: no answer can be paid for the label {label!r:.100}: the answer {answer!r:.100} is not"
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class _AnswerRule:
    """A rule about the answer in a message."""

    name: ClassVar[str]

    answer: Where = "all"
    """Where the answer stands in the message."""

    def __post_init__(self) -> None:
        if self.answer not in Where.__args__:  # type: ignore[attr-defined]
            raise ValueError(f"{self.name}: answer must be all, last_line, boxed or tag, not {self.answer!r}")

    def __call__(self, episode: EpisodeView) -> float:
        self.check_label(episode.label)
        answer = find_answer(episode.answer, self.answer)
        return 0.0 if answer is None else self.grade(answer, episode.label)

    def check_label(self, label: Any) -> None:
        """Raise `ValueError` for a label that cannot be graded against."""
        golds = label if isinstance(label, list | tuple) else [label]
        if not golds or not all(isinstance(gold, str | int | float) and str(gold).strip() for gold in golds):
            raise ValueError(
                f"{self.name}: the label must be a text that is not empty, or a list of such, not {label!r}"
            )
        for gold in golds:
            if _SOLUTION_END in str(gold).strip():
                answer = str(gold).rpartition(_SOLUTION_END)[2].strip()
                raise ValueError(
                    f"{self.name}: the label is a whole solution, which ends in '#### {answer:.40}'; the rules numeric "
                    "and math read what stands behind '####'"
                )

    def right_answer(self, label: Any) -> str | None:
        """A message with a right answer in its place; None where the label does not say what is right."""
        gold = self.right_text(label)
        return None if gold is None else place_answer(gold, self.answer)

    def right_text(self, label: Any) -> str | None:
        """The right answer that a label names, the first of several."""
        return _texts(label)[0]

    def grade(self, answer: str, label: Any) -> float:
        raise NotImplementedError


def _texts(label: Any) -> tuple[str, ...]:
    return tuple(str(gold) for gold in (label if isinstance(label, list | tuple) else [label]))


@dataclass(frozen=True, kw_only=True, slots=True)
class ExactMatch(_AnswerRule):
    """1 for an answer that equals a gold answer after SQuAD's normalisation."""

    name: ClassVar[str] = "exact_match"

    def grade(self, answer: str, label: Any) -> float:
        return exact_match(answer, _texts(label))


@dataclass(frozen=True, kw_only=True, slots=True)
class F1(_AnswerRule):
    """The F1 of the words that answer and label have in common."""

    name: ClassVar[str] = "f1"

    def grade(self, answer: str, label: Any) -> float:
        return f1(answer, _texts(label))


@dataclass(frozen=True, kw_only=True, slots=True)
class Contains(_AnswerRule):
    """1 for an answer of few words that holds a gold answer."""

    name: ClassVar[str] = "contains"

    max_words: int = 64
    """Longer answers are worth 0: they could hold every guess."""

    def grade(self, answer: str, label: Any) -> float:
        return contains(answer, _texts(label), max_words=self.max_words)


@dataclass(frozen=True, kw_only=True, slots=True)
class MultipleChoice(_AnswerRule):
    """1 for an answer that names the right letter and no other. The label is a letter, or a number from 0."""

    name: ClassVar[str] = "multiple_choice"

    def check_label(self, label: Any) -> None:
        self._letter(label)

    def right_text(self, label: Any) -> str | None:
        return self._letter(label)

    def grade(self, answer: str, label: Any) -> float:
        return float(stated_choice(answer) == self._letter(label))

    def _letter(self, label: Any) -> str:
        if isinstance(label, int) and not isinstance(label, bool) and 0 <= label < len(LETTERS):
            return LETTERS[label]
        letter = label.strip().strip("()").upper() if isinstance(label, str) else ""
        if len(letter) == 1 and letter in LETTERS:
            return letter
        raise ValueError(
            f"multiple_choice: the label must be a letter from A to {LETTERS[-1]} or a number from 0, not {label!r}"
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class Numeric(_AnswerRule):
    """1 for an answer that states one number, and one close enough to the label; exact arithmetic, no infinities."""

    name: ClassVar[str] = "numeric"

    absolute: float = 0.0
    """Largest difference that is right."""
    relative: float = 0.0
    """The same as a share of the label's size; a value in either is right."""

    def __post_init__(self) -> None:
        _AnswerRule.__post_init__(self)
        for option in ("absolute", "relative"):
            # Not `value < 0`: that would let NaN pass.
            if not 0 <= getattr(self, option) < float("inf"):
                raise ValueError(f"numeric: {option} must be a finite number of at least 0")

    def check_label(self, label: Any) -> None:
        self._number(label)

    def right_text(self, label: Any) -> str | None:
        return str(label).rpartition(_SOLUTION_END)[2].strip()

    def grade(self, answer: str, label: Any) -> float:
        gold, given = self._number(label), stated_number(answer)
        if given is None:
            return 0.0
        return float(abs(given - gold) <= max(Fraction(self.absolute), Fraction(self.relative) * abs(gold)))

    def _number(self, label: Any) -> Fraction:
        # Via text: the label 0.1 means a tenth, not the nearest float.
        number = None if isinstance(label, bool) else read_number(str(label).rpartition(_SOLUTION_END)[2])
        if number is None:
            raise ValueError(f"numeric: the label must be a number, not {label!r}")
        return number


@dataclass(frozen=True, kw_only=True, slots=True)
class Regex(_AnswerRule):
    """1 for an answer in which the pattern is found; with a group in the pattern, if what it holds is the label."""

    name: ClassVar[str] = "regex"

    pattern: str
    """A regular expression of Python, `.` matches newlines too. Nested repeats can take very long."""
    whole: bool = False
    """The pattern must match the whole answer."""
    _compiled: re.Pattern[str] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        _AnswerRule.__post_init__(self)
        try:
            object.__setattr__(self, "_compiled", re.compile(self.pattern, re.DOTALL))
        except re.error as error:
            raise ValueError(f"regex: the pattern {self.pattern!r} cannot be read: {error}") from error
        if self._compiled.groups > 1:
            raise ValueError(
                f"regex: the pattern {self.pattern!r} has more than one group; write others as (?:...)"
            )
        if self._compiled.fullmatch(""):
            raise ValueError(
                f"regex: the pattern {self.pattern!r} matches an empty answer, which must not be paid"
            )

    def check_label(self, label: Any) -> None:
        if self._compiled.groups:
            _AnswerRule.check_label(self, label)

    def right_text(self, label: Any) -> str | None:
        del label  # what else the pattern wants around it is not known
        return None

    def grade(self, answer: str, label: Any) -> float:
        found = self._compiled.fullmatch(answer) if self.whole else self._compiled.search(answer)
        if found is None or not self._compiled.groups:
            return float(found is not None)
        return exact_match(found[1] or "", _texts(label))


@dataclass(frozen=True, kw_only=True, slots=True)
class Format:
    """1 for a message that is made of these tags, each once, in this order, none empty, and nothing beside them.

    Reasoning that was told apart from the content counts as `<think>...</think>` before it.
    """

    name: ClassVar[str] = "format"

    tags: list[str] | tuple[str, ...] = ("think", "answer")

    def __post_init__(self) -> None:
        if not self.tags or not all(
            isinstance(t, str) and re.fullmatch(r"[A-Za-z_][\w-]*", t) for t in self.tags
        ):
            raise ValueError(
                f"format: tags must be a list of names, such as [think, answer], not {self.tags!r}"
            )
        if len(set(self.tags)) != len(self.tags):
            raise ValueError(f"format: a tag stands twice in {list(self.tags)}")

    def __call__(self, episode: EpisodeView) -> float:
        rest = episode.message.text.strip()
        if len(rest) > 10 * MAX_CHARS:
            return 0.0
        for tag in self.tags:
            opening, closing = f"<{tag}>", f"</{tag}>"
            inside, closed, after = rest.removeprefix(opening).partition(closing)
            if not rest.startswith(opening) or not closed or not inside.strip():
                return 0.0
            if any(f"<{t}>" in inside or f"</{t}>" in inside for t in self.tags):
                return 0.0
            rest = after.lstrip()
        return float(not rest)
