"""Grades a function by unit tests. The tests and the function run in one sandbox, in processes that share nothing.

`harness/` says how; the verdict comes back after a nonce of this call. What the solution's process says are values,
never verdicts. A sandbox that fails is an exception, never a failed test.
"""

from __future__ import annotations

import functools
import json
import re
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from polyturn.envs.code.harness.program import harness
from polyturn.envs.code.proofs import check_tests
from polyturn.envs.code.reports import LIMIT_S, BrokenTests, TestReport
from polyturn.tools.python import SandboxFailed, execute
from polyturn.tools.sandbox import ExecResult, Sandbox

MAX_CODE_CHARS = 200_000
GRACE_S = 2.0
"""What the sandbox waits for the verdict beyond the tests' own deadline."""
COMMON_IMPORTS = """
import bisect, collections, copy, functools, heapq, itertools, math, operator, random, re, string, sys
from bisect import *
from collections import *
from functools import *
from heapq import *
from itertools import *
from math import *
from typing import *
"""
"""What LeetCode has imported before a solution, which its solutions take for granted."""
_METHOD = re.compile(r"Solution(?:\(\))?\.(\w+)")


@dataclass(frozen=True, kw_only=True, slots=True)
class UnitTests:
    """Tests of one function, in the form of HumanEval (arXiv 2107.03374), or cases of arguments and values."""

    test: str = ""
    """Python source with a function `check(candidate)`, functions `test...`, classes of `unittest`, or assertions that
    call `candidate` or `entry_point`."""
    entry_point: str
    """The name of the function; `Solution.name` for a method of a class `Solution`, a new instance for each call."""
    prompt: str = ""
    """Source that ends in the function's head; what stands before the head is there for tests and solution alike."""
    cases: str = ""
    """JSON: a list of `{"args": [...], "kwargs"?: {...}, "expected": value, "or"?: [values that are right, too]}`."""
    imports: str = ""
    """Source that runs before the solution."""

    @property
    def preamble(self) -> str:
        """The prompt's source before the function's head: imports and helpers."""
        head = _head(self.name).search(self.prompt)
        if head is None:
            return ""
        before = self.prompt[: head.start()]
        owner = re.search(r"^class Solution\b", before, re.MULTILINE)
        return before[: owner.start()] if owner else before

    @property
    def name(self) -> str:
        """The function's name, without its class."""
        return self.entry_point.rpartition(".")[2]

    def program(self, code: str) -> str:
        """The program for an answer that is either the function or only its body."""
        head = _head(self.name).search(self.prompt)
        if head is None or _definition(self.name).search(code):
            return code
        indent = head.group(1) + "    "
        first_line = next((line for line in code.splitlines() if line.strip()), "")
        body = code if first_line[:1].isspace() else re.sub(r"(?m)^(?=.)", indent, code)
        return f"{self.prompt.rstrip()}\n{body}\n"


def as_unit_tests(label: Any) -> UnitTests:
    """Tests as they stand, or from a mapping or its JSON text.

    `{entry_point, test or cases, prompt?}`, or in the form of APPS and TACO `{fn_name, inputs, outputs}`.

    Raises:
        ValueError: it is neither, or its tests can tell nothing.
    """
    if isinstance(label, UnitTests):
        return label
    if isinstance(label, str) and label.lstrip().startswith("{"):
        try:
            label = json.loads(label)
        except ValueError as error:
            raise ValueError(f"unit tests that are no JSON: {error}") from None
    if isinstance(label, Mapping) and "fn_name" in label:
        return _of_apps(label)
    if not isinstance(label, Mapping) or not isinstance(label.get("entry_point"), str):
        raise ValueError(f"unit tests need an 'entry_point' and a 'test' or 'cases', not {label!r:.100}")
    method = _METHOD.fullmatch(label["entry_point"])
    entry_point = f"Solution.{method.group(1)}" if method else label["entry_point"]
    prompt, test = label.get("prompt") or "", label.get("test") or ""
    if label.get("cases"):
        imports = COMMON_IMPORTS if method else ""
        return UnitTests(
            cases=_as_cases(label["cases"]), entry_point=entry_point, prompt=prompt, imports=imports
        )
    if not isinstance(test, str) or not test:
        raise ValueError("unit tests need a 'test' or 'cases'")
    tests = UnitTests(
        test=test, entry_point=entry_point, prompt=prompt, imports=COMMON_IMPORTS if method else ""
    )
    check_tests(test, tests.name)
    return tests


def functional_tests(name: str, rows: Sequence[Mapping[str, Any]]) -> UnitTests:
    """Tests from LiveCodeBench's functional cases `{input, output}`: JSON, with a line for each argument.

    Raises:
        ValueError: something is no JSON.
    """
    cases = [
        {
            "args": [json.loads(line) for line in str(row["input"]).splitlines() if line.strip()],
            "expected": json.loads(row["output"]),
        }
        for row in rows
    ]
    return UnitTests(cases=_as_cases(cases), entry_point=f"Solution.{name}", imports=COMMON_IMPORTS)


def _of_apps(label: Mapping[str, Any]) -> UnitTests:
    """`fn_name` may be a function or a method of `Solution`; a list of one value may stand for the value."""
    name, inputs, outputs = label["fn_name"], label.get("inputs"), label.get("outputs")
    fits = isinstance(inputs, Sequence) and isinstance(outputs, Sequence) and len(inputs) == len(outputs)
    if not isinstance(name, str) or not name.isidentifier() or not fits:
        raise ValueError(f"'fn_name' needs as many 'inputs' as 'outputs', not {dict(label)!r:.100}")
    assert isinstance(inputs, Sequence)
    assert isinstance(outputs, Sequence)
    wrapped = all(isinstance(output, list) and len(output) == 1 for output in outputs)
    cases = []
    for given, output in zip(inputs, outputs, strict=True):
        arguments = [_with_whole_keys(one) for one in (given if isinstance(given, list) else [given])]
        cases.append({"args": arguments, "expected": output, "or": [output[0]] if wrapped else []})
    return UnitTests(cases=_as_cases(cases), entry_point=name, imports=COMMON_IMPORTS)


def _with_whole_keys(value: Any) -> Any:
    """JSON made texts of the keys of a dictionary; those that are all whole numbers were numbers."""
    if isinstance(value, dict) and value and all(re.fullmatch(r"-?\d{1,18}", key) for key in value):
        return {"\0keys": [[int(key), one] for key, one in value.items()]}
    return value


def _as_cases(cases: Any) -> str:
    """The JSON of the cases. Raises ValueError."""
    if not isinstance(cases, Sequence) or isinstance(cases, str) or not cases:
        raise ValueError(f"'cases' must be a list of {{args, expected}}, not {cases!r:.100}")
    for case in cases:
        fits = isinstance(case, Mapping) and "expected" in case
        if (
            not fits
            or not isinstance(case.get("args", []), list)
            or not isinstance(case.get("kwargs", {}), Mapping)
        ):
            raise ValueError(f"a case has 'args', a list, and 'expected', not {case!r:.100}")
    try:
        return json.dumps(list(cases))
    except (TypeError, ValueError) as error:
        raise ValueError(f"'cases' must be plain JSON values: {error}") from None


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
        "cases": json.loads(tests.cases) if tests.cases else [],
        "entry_point": tests.entry_point,
        "preamble": tests.preamble,
        "imports": tests.imports,
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


def _verdict(result: ExecResult, nonce: str) -> dict[str, Any] | None:
    """What the tests' process said; None where it was ended before it could."""
    said = [line.removeprefix(f"{nonce} ") for line in result.stdout.splitlines() if line.startswith(nonce)]
    if not said:
        # Nothing of the solution ran yet.
        reason = result.stderr.strip()[-500:] or result.detail or f"exit status {result.exit_code}"
        raise SandboxFailed(f"the tests did not start ({result.status}): {reason}")
    return json.loads(said[-1]) if said[-1] != "started" else None


@functools.lru_cache(maxsize=1024)
def _head(name: str) -> re.Pattern[str]:
    return re.compile(rf"^([ \t]*)(?:async[ \t]+)?def[ \t]+{re.escape(name)}\b", re.MULTILINE)


@functools.lru_cache(maxsize=1024)
def _definition(name: str) -> re.Pattern[str]:
    """The function's head, or another way to give its name to something."""
    word = re.escape(name)
    return re.compile(
        rf"^[ \t]*(?:async[ \t]+)?def[ \t]+{word}\b|^{word}[ \t]*(?::[^=\n]+)?=[^=]|^class[ \t]+{word}\b"
        rf"|^(?:from|import)[ \t].*\b{word}\b",
        re.MULTILINE,
    )
