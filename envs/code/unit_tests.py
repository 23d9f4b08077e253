"""Grades a function by unit tests. The tests and the function run in one sandbox, in processes that share nothing.

`harness.py` says how; the verdict comes back after a nonce of this call. What the solution's process says are values,
never verdicts. A sandbox that fails is an exception, never a failed test.
"""

from __future__ import annotations

import functools
import json
import re
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from polyturn.envs.code.reports import LIMIT_S, BrokenTests, TestReport
from polyturn.tools.sandbox import ExecResult, Sandbox
from polyturn.tools.shared_sandboxes import SandboxFailed, execute

MAX_CODE_CHARS = 200_000
GRACE_S = 2.0
"""What the sandbox waits for the verdict beyond the tests' own deadline."""


@dataclass(frozen=True, kw_only=True, slots=True)
class UnitTests:
    """Tests of one function, in the form of HumanEval (arXiv 2107.03374)."""

    test: str
    """Python source with a function `check(candidate)`, or with assertions that call `candidate` or `entry_point`."""
    entry_point: str
    """The name of the function."""
    prompt: str = ""
    """Source that ends in the function's head; what stands before the head is there for tests and solution alike."""

    @property
    def preamble(self) -> str:
        """The prompt's source before the function's head: imports and helpers."""
        head = _head(self.entry_point).search(self.prompt)
        return self.prompt[: head.start()] if head else ""

    def program(self, code: str) -> str:
        """The whole program for an answer that is either the function or only its body."""
        if self.prompt and not _head(self.entry_point).search(code):
            first_line = next((line for line in code.splitlines() if line.strip()), "")
            body = code if first_line[:1].isspace() else re.sub(r"(?m)^(?=.)", "    ", code)
            return f"{self.prompt.rstrip()}\n{body}\n"
        return f"{self.preamble}\n{code}\n"


def as_unit_tests(label: Any) -> UnitTests:
    """Tests as they stand, or from a mapping `{entry_point, test or cases, prompt?}`.

    Raises:
        ValueError: it is neither.
    """
    if isinstance(label, UnitTests):
        return label
    if not isinstance(label, Mapping) or not isinstance(label.get("entry_point"), str):
        raise ValueError(f"unit tests need an 'entry_point' and a 'test' or 'cases', not {label!r:.100}")
    entry_point = label["entry_point"]
    test = label.get("test") or (
        cases_as_test(label["cases"], name=entry_point) if label.get("cases") else None
    )
    if not isinstance(test, str):
        raise ValueError("unit tests need a 'test' or 'cases'")
    return UnitTests(test=test, entry_point=entry_point, prompt=label.get("prompt") or "")


def cases_as_test(cases: Sequence[Mapping[str, Any]], *, name: str = "candidate") -> str:
    """Tests from rows `{"args": [...], "kwargs"?: {...}, "expected": value}` of plain JSON values.

    Args:
        cases: The rows.
        name: What the function is called in them, as the model reads it of those that fail: `candidate`, or its own.
    """
    lines = []
    for case in cases:
        named = [f"{key}={value!r}" for key, value in case.get("kwargs", {}).items()]
        arguments = ", ".join([*map(repr, case.get("args", ())), *named])
        lines.append(f"    assert {name}({arguments}) == {case['expected']!r}")
    return "\n".join(["def check(candidate):", *lines, ""])


def grade_unit_tests(
    code: str, tests: UnitTests, sandbox: Sandbox, *, timeout_s: float = LIMIT_S
) -> TestReport:
    """Run the tests on what a model wrote.

    Args:
        code: The function, or its body. Anything at all.
        tests: From the task.
        sandbox: One that holds nothing of value; it may be broken afterwards.
        timeout_s: Seconds for all tests together.

    Raises:
        SandboxFailed, SandboxUnavailable: the sandbox, not the code.
        BrokenTests: the tests, not the code.
    """
    if len(code) > MAX_CODE_CHARS:
        return TestReport.nothing(f"the code is longer than {MAX_CODE_CHARS:,} characters")
    nonce = secrets.token_hex(16)
    job = {
        "nonce": nonce,
        "code": tests.program(code),
        "test": tests.test,
        "entry_point": tests.entry_point,
        "preamble": tests.preamble,
    }
    result = execute(
        sandbox, harness(), stdin=json.dumps(job), arguments=[str(timeout_s)], timeout_s=timeout_s + GRACE_S
    )
    verdict = _verdict(result, nonce)
    if verdict is None:
        reason = "the solution ended the tests" if result.status == "ok" else result.detail or result.status
        return TestReport.nothing(reason)
    if verdict.get("broken"):
        raise BrokenTests(verdict["broken"])
    return TestReport(
        num_passed=verdict["passed"], num_tests=verdict["total"], failures=tuple(verdict["failures"])
    )


@functools.cache
def harness() -> str:
    """The source of the program that runs in the sandbox."""
    return Path(__file__).with_name("harness.py").read_text(encoding="utf-8")


def _verdict(result: ExecResult, nonce: str) -> dict[str, Any] | None:
    """What the tests' process said; None where it was ended before it could."""
    said = [line.removeprefix(f"{nonce} ") for line in result.stdout.splitlines() if line.startswith(nonce)]
    if not said:
        # Nothing of the solution ran yet.
        reason = result.stderr.strip()[-500:] or result.detail or f"exit status {result.exit_code}"
        raise SandboxFailed(f"the tests did not start ({result.status}): {reason}")
    return json.loads(said[-1]) if said[-1] != "started" else None


@functools.lru_cache(maxsize=1024)
def _head(entry_point: str) -> re.Pattern[str]:
    return re.compile(rf"^[ \t]*(?:async[ \t]+)?def[ \t]+{re.escape(entry_point)}\b", re.MULTILINE)
