"""Grades a program by what it prints for given input. The expected output never enters the sandbox."""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from decimal import Decimal, InvalidOperation
from typing import Any

from polyturn.envs.code.reports import LIMIT_S, TestReport
from polyturn.envs.code.unit_tests import MAX_CODE_CHARS
from polyturn.tools.python import execute, show
from polyturn.tools.sandbox import Limits, Sandbox

MAX_SHOWN = 300
SLACK_BYTES = 4096
FLOAT_PLACES, FLOAT_TOLERANCE = 6, 1e-6
"""A number that is expected with so many decimal places was a float, of which the last digits are anybody's; others, as
2.50, are exact."""


@dataclass(frozen=True, kw_only=True, slots=True)
class StdioCase:
    """What a program is given on stdin, and what it must print."""

    stdin: str
    stdout: str


def as_cases(label: Any) -> tuple[StdioCase, ...]:
    """Cases as they stand, or from mappings `{input, output}`.

    Raises:
        ValueError: there are none, or one is neither.
    """
    cases = []
    for case in label if isinstance(label, Sequence) and not isinstance(label, str) else ():
        if isinstance(case, Mapping) and {"input", "output"} <= case.keys():
            if case.get("testtype", "stdin") != "stdin":
                raise ValueError(f"a test case of type {case['testtype']!r}; only 'stdin' is graded here")
            case = StdioCase(stdin=str(case["input"]), stdout=str(case["output"]))
        if not isinstance(case, StdioCase):
            raise ValueError(f"a test case has an 'input' and an 'output', not {case!r:.100}")
        cases.append(case)
    if not cases:
        raise ValueError(f"test cases must be a list of {{input, output}}, not {label!r:.100}")
    return tuple(cases)


def limits_for(cases: Sequence[StdioCase], limits: Limits) -> Limits:
    """The limits, widened where the right output itself would exceed them, in other white space and spelling, too."""
    needed = 2 * max(len(case.stdout.encode()) for case in cases) + SLACK_BYTES
    return dataclasses.replace(limits, output_bytes=max(limits.output_bytes, needed))


def grade_stdio(
    code: str,
    cases: Sequence[StdioCase],
    sandbox: Sandbox,
    *,
    timeout_s: float = LIMIT_S,
    total_s: float | None = None,
    stop_at_first: bool = True,
) -> TestReport:
    """Run the program on every case, each time in a new interpreter and an empty work folder.

    Args:
        code: The whole program. Anything at all.
        cases: At least one.
        sandbox: One that holds nothing of value, of which the limits leave room for the right output (`limits_for`); it
            may be broken afterwards.
        timeout_s: Seconds for one case.
        total_s: Seconds for all of them; None: no such limit. Cases beyond it are failed.
        stop_at_first: The cases after a failed one count as failed, unseen: for all-or-nothing credit.

    Raises:
        SandboxFailed, SandboxUnavailable: the sandbox, not the code.
    """
    if len(code) > MAX_CODE_CHARS:
        return TestReport.nothing(f"the code is longer than {MAX_CODE_CHARS:,} characters", len(cases))
    started = time.monotonic()
    num_passed = 0
    failures: list[str] = []
    for number, case in enumerate(cases, start=1):
        left = timeout_s if total_s is None else min(timeout_s, total_s - (time.monotonic() - started))
        if left <= 0:
            failures.append(f"test {number}: no time was left")
            break
        result = execute(sandbox, code, stdin=case.stdin, timeout_s=left)
        if result.left_files and number < len(cases):
            sandbox.reset()  # what one case left there must neither help nor trip up the next
        if result.ok and same_output(result.stdout, case.stdout):
            num_passed += 1
            continue
        problem = f"it printed {_clip(result.stdout)}" if result.ok else _clip(show(result)[-MAX_SHOWN:])
        failures.append(
            f"test {number}: for the input {_clip(case.stdin)} it must print {_clip(case.stdout)}, but {problem}"
        )
        if stop_at_first:
            break
    return TestReport(num_passed=num_passed, num_tests=len(cases), failures=tuple(failures[:5]))


def same_output(printed: str, expected: str) -> bool:
    """Line by line without white space at the ends; a line may also have the same numbers, as in 0.50 and 0.5.

    Numbers that are expected with six decimal places or more may differ by a millionth.
    """
    lines, wanted = _lines(printed), _lines(expected)
    return len(lines) == len(wanted) and all(
        line == want or _same_numbers(line, want) for line, want in zip(lines, wanted, strict=True)
    )


def _lines(text: str) -> list[str]:
    return [line.strip() for line in text.strip().splitlines()]


def _same_numbers(line: str, wanted: str) -> bool:
    words, others = line.split(), wanted.split()
    return len(words) == len(others) and all(map(_same_word, words, others))


def _same_word(word: str, other: str) -> bool:
    if word == other:
        return True
    if len(word) > 64 or len(other) > 64:
        return False
    try:
        number, wanted = Decimal(word), Decimal(other)
    except InvalidOperation:
        return False
    if not (number.is_finite() and wanted.is_finite()):
        return False
    if number == wanted:
        return True
    places = other.partition(".")[2]
    rounded = len(places) >= FLOAT_PLACES and places.isdigit() and "." in word
    return rounded and math.isclose(number, wanted, rel_tol=FLOAT_TOLERANCE, abs_tol=FLOAT_TOLERANCE)


def _clip(text: str) -> str:
    text = text.rstrip("\n")
    return repr(text if len(text) <= MAX_SHOWN else f"{text[:MAX_SHOWN]}...")
