"""Grades programs: by unit tests, or by what they print for given input.

The tests and the function run in one sandbox, in processes that share nothing; expected output never enters it. The
module is long because both ways read their tests, check that these can tell right from wrong, and give one report.
"""

from __future__ import annotations

import ast
import dataclasses
import functools
import json
import math
import re
import secrets
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from decimal import Decimal, InvalidOperation
from typing import Any

from polyturn.envs.code.harness import harness
from polyturn.tools.python import SandboxFailed, execute, show
from polyturn.tools.sandbox import ExecResult, Limits, Sandbox

_PYTHON = frozenset(("", "python", "py", "python3"))
_END_OF_THOUGHT = "</think>"
_FENCE = "```"


def find_code(text: str) -> str | None:
    """The last fenced block of Python after the thinking; None if there is none.

    A model that fences nothing has not answered in the form that it was asked for. Linear in the text's length.
    """
    found: str | None = None
    block: list[str] | None = None
    language = ""
    for line in text.rpartition(_END_OF_THOUGHT)[2].split("\n"):
        mark = line.strip()
        if block is None:
            if mark.startswith(_FENCE):
                block, words = [], mark.removeprefix(_FENCE).split()
                language = words[0].lower() if words else ""
        elif mark == _FENCE:
            if language in _PYTHON:
                found = "\n".join([*block, ""])
            block = None
        else:
            block.append(line)
    return found


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


_FUNCTION = (ast.FunctionDef, ast.AsyncFunctionDef)
_RUN_BY_THEMSELVES = ("check", "test")


@functools.lru_cache(maxsize=4096)
def check_tests(source: str, name: str) -> None:
    """Raise `ValueError` for tests that no program can fail: they assert nothing, or never call what they test.

    Args:
        source: Python.
        name: What the tests call the function, beside `candidate`.
    """
    try:
        tree = ast.parse(source)
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        raise ValueError(f"the test is no Python: {error}") from None
    if not any(map(_proves, _walk(tree))):
        raise ValueError(
            "the test asserts nothing, so any program would pass: it needs an `assert`, a method `assert...` of "
            "unittest, or a `check` that returns a truth value"
        )
    if not any(_may_run(statement) for statement in tree.body):
        raise ValueError(
            "nothing of the test is run: it has neither a `check`, nor a `test...`, nor a statement of its own"
        )
    known = {name, "candidate", "solution", "Solution", *_parameters(tree)}
    if not any(
        isinstance(node, (ast.Name, ast.ImportFrom, ast.Import)) and _mentions(node, known)
        for node in ast.walk(tree)
    ):
        raise ValueError(f"the test never calls `candidate` or `{name}`")


def _walk(tree: ast.AST) -> Iterator[ast.AST]:
    """All nodes, without assertions whose failure is thrown away."""
    yield tree
    for child in ast.iter_child_nodes(tree):
        if isinstance(tree, ast.Try) and child in tree.body and _throws_away(tree):
            continue
        yield from _walk(child)


def _throws_away(node: ast.Try) -> bool:
    """Whether a failed assertion in a `try` is caught by name, and nothing is done about it."""
    for handler in node.handlers:
        names = (
            {one.id for one in ast.walk(handler.type) if isinstance(one, ast.Name)} if handler.type else set()
        )
        if "AssertionError" in names and all(map(_does_nothing, handler.body)):
            return True
    return False


def _does_nothing(statement: ast.stmt) -> bool:
    if isinstance(statement, ast.Expr):
        call = statement.value
        named = isinstance(call, ast.Call) and isinstance(call.func, ast.Name)
        return isinstance(call, ast.Constant) or (named and call.func.id == "print")  # type: ignore[attr-defined]
    return isinstance(statement, ast.Pass)


def _proves(node: ast.AST) -> bool:
    if isinstance(node, ast.Assert):
        return not _always_holds(node.test)
    if isinstance(node, ast.Raise):
        return True
    if isinstance(node, ast.Call):
        named = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
        return named.startswith(("assert", "fail", "raises"))
    if isinstance(node, _FUNCTION) and node.name == "check":
        return any(
            isinstance(one, ast.Return) and not isinstance(one.value, ast.Constant | None)
            for one in ast.walk(node)
        )
    return False


def _always_holds(test: ast.expr) -> bool:
    """`assert True`, `assert (a, "why")`, `assert a or True`: whatever a is."""
    if isinstance(test, ast.BoolOp) and isinstance(test.op, ast.Or):
        return any(map(_always_holds, test.values))
    return (
        bool(test.elts)
        if isinstance(test, ast.Tuple)
        else isinstance(test, ast.Constant) and bool(test.value)
    )


def _may_run(statement: ast.stmt) -> bool:
    if isinstance(statement, _FUNCTION):
        return statement.name.startswith(_RUN_BY_THEMSELVES)
    if isinstance(statement, ast.ClassDef):
        return bool(statement.bases) or statement.name.startswith("Test")
    if isinstance(statement, ast.Expr):
        return not isinstance(statement.value, ast.Constant)
    return not isinstance(statement, (ast.Import, ast.ImportFrom, ast.Assign, ast.AnnAssign, ast.Pass))


def _parameters(tree: ast.Module) -> set[str]:
    return {
        argument.arg
        for statement in tree.body
        if isinstance(statement, _FUNCTION) and statement.name.startswith(_RUN_BY_THEMSELVES)
        for argument in statement.args.args
    }


def _mentions(node: ast.AST, names: set[str]) -> bool:
    if isinstance(node, ast.Name):
        return node.id in names
    if isinstance(node, ast.ImportFrom):
        return node.module in names or any(alias.name in names for alias in node.names)
    return isinstance(node, ast.Import) and any(alias.name in names for alias in node.names)


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
