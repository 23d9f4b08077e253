"""What tests found out about a program."""

from __future__ import annotations

from dataclasses import dataclass

LIMIT_S = 3.0
"""Seconds for all tests of one program together, where nothing else is said."""


class BrokenTests(RuntimeError):
    """The tests themselves cannot be run: a fault of the task, not of the program."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TestReport:
    """How many tests a program passed."""

    __test__ = False  # pytest takes the name for a test class

    num_passed: int
    num_tests: int
    """At least 1. With a program that never got to all its assertions, as many as there are in the source."""
    failures: tuple[str, ...] = ()
    """The first few failures in words. They show the tests, so the model sees only those of public tests."""

    @property
    def all_passed(self) -> bool:
        return self.num_passed == self.num_tests

    @property
    def fraction(self) -> float:
        """The part of the tests that were passed, 0 to 1."""
        return self.num_passed / self.num_tests

    def reward(self, *, partial_credit: bool) -> float:
        """All or nothing, or the fraction of tests passed."""
        return self.fraction if partial_credit else float(self.all_passed)

    @classmethod
    def nothing(cls, reason: str, num_tests: int = 1) -> TestReport:
        """No test was passed, for one reason."""
        return cls(num_passed=0, num_tests=max(1, num_tests), failures=(reason,))
