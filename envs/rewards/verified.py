"""Rules that run something: the verifier of mathematical answers, and unit tests in a sandbox."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, get_args

from polyturn.envs.code.grading import LIMIT_S, UnitTests, as_unit_tests, find_code, grade_unit_tests
from polyturn.envs.messages import EpisodeView, Score
from polyturn.envs.rewards.math import Mode, gold_texts, shared_verifier, unpayable_reason
from polyturn.tools.python import SharedSandboxes
from polyturn.tools.sandbox import BackendName

_KEYS = ("entry_point", "test", "cases", "prompt", "fn_name", "inputs", "outputs")


@dataclass(frozen=True, kw_only=True, slots=True)
class MathRule:
    """1 for an answer that is the label's equal as mathematics (docs/math.md)."""

    name: ClassVar[str] = "math"

    mode: Mode = "text"
    """`text`: a whole reply; `box_only`: only its box counts; `boxed`: the answer as it stands in a box."""

    def __post_init__(self) -> None:
        if self.mode not in get_args(Mode):
            raise ValueError(f"math: mode must be one of {', '.join(get_args(Mode))}, not {self.mode!r}")

    def __call__(self, episode: EpisodeView) -> Score:
        verdict = shared_verifier().verify(gold_texts(episode.label), episode.answer, mode=self.mode)
        value = verdict.score()
        # An answer that costs the verifier too much is not right, and is told apart from one that is wrong.
        costly = {"too_costly": 1.0} if verdict.reason == "too_costly" else {}
        return Score(value=value, parts={self.name: value, **costly})

    def check_label(self, label: Any) -> None:
        """Raise `ValueError` for a label that cannot be graded against."""
        if reason := unpayable_reason(label):
            raise ValueError(f"math: no answer can be paid for the label {label!r:.100}: {reason}")


@dataclass(frozen=True, kw_only=True, slots=True)
class UnitTestsRule:
    """1 for a reply whose last block of Python passes the label's tests, in a sandbox.

    The label is `{"entry_point": "f", "test": "def check(candidate): ..."}`, with `cases` (`[{"args": [...],
    "expected": ...}]`) in place of `test` for plain values, and `prompt` for the source that the solution goes on from;
    or in the form of APPS `{"fn_name": "f", "inputs": [...], "outputs": [...]}`.
    """

    name: ClassVar[str] = "unit_tests"

    partial_credit: bool = False
    """The share of tests that pass, in place of all or nothing."""
    timeout_s: float = LIMIT_S
    """Seconds for all tests together."""
    backend: BackendName = "auto"
    """The sandbox (docs/sandbox.md)."""
    _sandboxes: SharedSandboxes = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        if self.backend not in get_args(BackendName):
            known = ", ".join(get_args(BackendName))
            raise ValueError(f"unit_tests: backend must be one of {known}, not {self.backend!r}")
        if not 0 < self.timeout_s < float("inf"):
            raise ValueError(f"unit_tests: timeout_s must be a positive number, not {self.timeout_s}")
        object.__setattr__(self, "_sandboxes", SharedSandboxes(self.backend))

    def __call__(self, episode: EpisodeView) -> float:
        tests = self._tests(episode.label)
        code = find_code(episode.answer)
        if code is None:
            return 0.0
        with self._sandboxes.create() as sandbox:
            report = grade_unit_tests(code, tests, sandbox, timeout_s=self.timeout_s)
        return report.reward(partial_credit=self.partial_credit)

    def check_label(self, label: Any) -> None:
        """Raise `ValueError` for a label that cannot be graded against."""
        self._tests(label)

    def _tests(self, label: Any) -> UnitTests:
        if isinstance(label, Mapping) and (unknown := sorted(set(label) - set(_KEYS))):
            raise ValueError(
                f"unit_tests: the label has an unknown key {unknown[0]!r}; it has {', '.join(_KEYS)}"
            )
        try:
            return as_unit_tests(label)
        except ValueError as error:
            raise ValueError(f"unit_tests: the label: {error}") from None
