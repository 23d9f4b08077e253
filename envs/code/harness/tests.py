"""The tests are run, whatever their form, and what they found out is the verdict.

A source has assertions at its top level, or in a function `check`, or in functions `test...`, or in classes of
`unittest`; or there is no source, but cases of arguments and values. Calls of the function under test are questions to
the other process, and every assertion is noticed, however it ends. The module is long because it stands in for all
that tests are written for: the function, the runner of each form, and the few names that they take from pytest.
"""

from __future__ import annotations

import ast
import builtins
import contextlib
import functools
import json
import math
import os
import re
import select
import signal
import sys
import time
import types
from collections.abc import Callable
from typing import Any

from polyturn.envs.code.harness.values import (
    CLASS,
    DoesNotCross,
    Packer,
    reply,
    same,
    take_over,
    unpack,
    with_keys,
)

MAX_LINE_BYTES = 64 << 20
FRAMEWORKS = ("unittest", "polyturn", "__main__")
"""What runs tests steers itself with exceptions, too, which are not the solution's to raise: one skips a test."""


class SolutionEnded(BaseException):
    """The solution's process ended, was too slow, or talked nonsense; every later call raises it too.

    Not an `Exception`: a test that expects one must not take this for it. Nor is it enough that nothing catches it: see
    `Solution.ended`, which a verdict reads.
    """


class TestsBroken(BaseException):
    """The tests cannot be run, whatever the solution does."""


class SolutionError(Exception):
    """An exception of the solution's whose class the tests do not know."""


class SolutionStopped(BaseException):
    """The same where it is no `Exception`."""


class StoppedIteration(RuntimeError):
    """The solution raised what ends loops. As it is, it would end a test's own: `all(map(f, values))` would be true."""


class Solution:
    """Calls a function of the other process."""

    def __init__(self, pid: int, questions: int, answers: int, deadline: float) -> None:
        self.pid, self.questions, self.answers, self.deadline = pid, questions, answers, deadline
        self.buffer = bytearray()
        self.ended = ""
        """Why there is no solution any more; a verdict with this is a failure, whatever the tests made of it."""
        self.broken = ""
        """What makes the tests impossible."""
        self.num_calls = 0
        self.num_values = 0
        """Calls that gave something back: from then on, what a test does may be the solution's doing."""
        self.exceptions: dict[str, Any] = {}
        """Names of the tests, among them those of exception classes that tests and solution both know."""
        self.__name__ = "candidate"

    def define(self, job: Any) -> None:
        """Raises what the code raises at its top level."""
        self.__name__ = job["entry_point"].rpartition(".")[2]
        self.ask({key: job[key] for key in ("imports", "preamble", "code", "entry_point")})

    def __call__(self, *arguments: Any, **names: Any) -> Any:
        self.num_calls += 1
        call, named = self.pack([list(arguments), names])
        answer = self.ask({"call": call, "names": named})
        self.num_values += 1
        try:
            value = unpack(answer["value"])
            if answer["arguments"] is not None:
                after, names_after = unpack(answer["arguments"])
                for given, changed in zip(arguments, after, strict=True):
                    take_over(given, changed)
                for name, changed in names_after.items():
                    take_over(names[name], changed)
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError, ArithmeticError):
            raise self.end("it gave a value that could not be read") from None
        return value

    def pack(self, given: list[Any]) -> Any:
        """As JSON. What does not cross is the tests' fault, until the solution has given them something to hand on."""
        try:
            return Packer(lenient=False).pack(given)
        except DoesNotCross as error:
            if self.num_values == 0 and not self.ended:
                self.broken = f"the test gives the solution {error}"
                raise TestsBroken(self.broken) from None
            raise self.end(f"it would be given {error}") from None

    def ask(self, question: Any) -> Any:
        if self.ended:
            raise SolutionEnded(self.ended)
        try:
            reply(self.questions, question)
            answer = json.loads(self.read_line())
            error = answer.get("error")
        except TimeoutError:
            raise self.end("it took too long") from None
        except (OSError, EOFError):
            raise self.end("it ended its process") from None
        except (ValueError, AttributeError, RecursionError, MemoryError):
            raise self.end("it gave an answer that could not be read") from None
        if error is not None:
            self.num_values += 1
            raise self.as_exception(error)
        return answer

    def read_line(self) -> bytes:
        while (end := self.buffer.find(b"\n")) < 0:
            left = self.deadline - time.monotonic()
            if left <= 0 or not select.select([self.answers], [], [], left)[0]:
                raise TimeoutError
            data = os.read(self.answers, 1 << 20)
            if not data:
                raise EOFError
            self.buffer += data
            if len(self.buffer) > MAX_LINE_BYTES:
                raise ValueError("too long")
        line = bytes(self.buffer[:end])
        del self.buffer[: end + 1]
        return line

    def end(self, reason: str) -> SolutionEnded:
        """Ends the solution for good; the exception to raise."""
        self.ended = reason
        self.kill()
        return SolutionEnded(reason)

    def kill(self) -> None:
        with contextlib.suppress(OSError):
            os.kill(self.pid, signal.SIGKILL)

    def as_exception(self, error: Any) -> BaseException:
        """An exception of the nearest class that the tests know, too."""
        try:
            kinds, text = error
            named = [(str(module), str(name)) for module, name in kinds]
            text = str(text)
        except (TypeError, ValueError):
            return self.end("it gave an answer that could not be read")
        for module, name in named:
            kind = self.find_kind(module, name)
            if kind is None:
                continue
            if issubclass(kind, (StopIteration, StopAsyncIteration)):
                return StoppedIteration(text)
            text_with_name = f"{named[0][1]}: {text}"
            if kind is Exception:
                return Exception(text) if name == named[0][1] else SolutionError(text_with_name)
            if kind is BaseException:
                return SolutionStopped(text_with_name)
            with contextlib.suppress(Exception):  # some want other arguments than a text
                return kind(text)
        return SolutionError(text)

    def find_kind(self, module: str, name: str) -> type[BaseException] | None:
        """A class of exceptions by its name: a built-in one, one that the tests have, or one of a loaded module."""
        if module == "builtins":
            kind = getattr(builtins, name, None)
        elif module == "solution":
            kind = self.exceptions.get(name)
        else:
            kind = getattr(sys.modules.get(module), name, None)
        if not isinstance(kind, type) or not issubclass(kind, BaseException):
            return None
        return None if kind.__module__.partition(".")[0] in FRAMEWORKS else kind


MAX_TEXT = 300
PASSED, FAILED, CAUGHT = "__passed__", "__failed__", "__caught__"
ANY, STOPS = "__exception__", "__stops__"
"""Names of the harness in the tests' source."""
_BROAD = ("AssertionError", "Exception", "BaseException")
MAIN = {("unittest", "main"), ("pytest", "main")}


class Scorekeeper(ast.NodeTransformer):
    """Has each `assert` tell whether it holds.

    One that fails does not end the tests, so that the others are counted too, unless something around it may wait for
    its exception (`try`, `with`) or a framework runs the function that it stands in: there it raises as ever. Where an
    `except AssertionError` waits for it, it is the test's own business altogether.
    """

    def __init__(self) -> None:
        self.num_asserts = 0
        self._raises = False
        self._expected = False

    def visit_Assert(self, node: ast.Assert) -> ast.AST:
        self.num_asserts += 1
        record = ast.parse(f"{PASSED}()").body[0]
        if self._expected:
            both = ast.If(test=ast.Constant(value=True), body=[node, record], orelse=[])
            return ast.fix_missing_locations(ast.copy_location(both, node))
        text = ast.unparse(node.test)[:MAX_TEXT]
        handler = ast.ExceptHandler(
            type=ast.Name(id=ANY, ctx=ast.Load()),
            name="__error__",
            body=[
                ast.parse(f"{FAILED}({text!r}, __error__)").body[0],
                *([ast.Raise()] if self._raises else []),
            ],
        )
        guarded = ast.Try(body=[node], handlers=[handler], orelse=[record], finalbody=[])
        return ast.fix_missing_locations(ast.copy_location(guarded, node))

    def visit_Try(self, node: ast.Try) -> ast.AST:
        expected = self._expected or any(_names(handler.type, "AssertionError") for handler in node.handlers)
        proves = any(isinstance(one, ast.Assert) for statement in node.body for one in ast.walk(statement))
        for handler in node.handlers:
            if handler.type is not None:
                handler.type = _StopNames().visit(handler.type)
        node.body = self._within(node.body, raises=bool(node.handlers) or self._raises, expected=expected)
        node.handlers = [self.visit(handler) for handler in node.handlers]
        if proves and not expected:
            # `try: f(-1); assert False`: the assertion that holds is that an exception comes.
            for handler in node.handlers:
                handler.body.insert(0, ast.copy_location(ast.parse(f"{CAUGHT}()").body[0], handler))
            ast.fix_missing_locations(node)
        node.orelse = self._within(node.orelse, raises=self._raises, expected=self._expected)
        node.finalbody = self._within(node.finalbody, raises=self._raises, expected=self._expected)
        return node

    def visit_With(self, node: ast.With) -> ast.AST:
        node.body = self._within(node.body, raises=True, expected=self._expected)
        return node

    def visit_ClassDef(self, node: ast.ClassDef) -> ast.AST:
        node.body = self._within(node.body, raises=True, expected=False)
        return node

    def visit_FunctionDef(self, node: ast.FunctionDef) -> ast.AST:
        raises = self._raises or node.name.startswith("test")
        node.body = self._within(node.body, raises=raises, expected=False)
        return node

    def visit_AsyncFunctionDef(self, node: ast.AsyncFunctionDef) -> ast.AST:
        node.body = self._within(node.body, raises=True, expected=False)
        return node

    def visit_Expr(self, node: ast.Expr) -> ast.AST:
        """A framework that the source itself starts would find no tests: they are run in any case."""
        call = node.value
        if isinstance(call, ast.Call) and isinstance(call.func, ast.Attribute):
            owner = call.func.value
            if isinstance(owner, ast.Name) and (owner.id, call.func.attr) in MAIN:
                return ast.copy_location(ast.Pass(), node)
        return node

    def _within(self, body: list[ast.stmt], *, raises: bool, expected: bool) -> list[ast.stmt]:
        before = self._raises, self._expected
        self._raises, self._expected = raises, expected
        try:
            return [self.visit(statement) for statement in body]
        finally:
            self._raises, self._expected = before


class _StopNames(ast.NodeTransformer):
    """Lets `except StopIteration` wait for what the solution's becomes on its way, too."""

    def visit_Name(self, node: ast.Name) -> ast.AST:
        if node.id not in ("StopIteration", "StopAsyncIteration"):
            return node
        both = ast.Tuple(elts=[node, ast.Name(id=STOPS, ctx=ast.Load())], ctx=ast.Load())
        return ast.fix_missing_locations(ast.copy_location(both, node))


def _names(kinds: ast.expr | None, name: str) -> bool:
    return kinds is not None and any(
        isinstance(node, ast.Name) and node.id == name for node in ast.walk(kinds)
    )


def denies(tree: ast.Module) -> bool:
    """Whether what surely runs of a source, its own statements and `check`, has a place that only wrong code reaches.

    `else: assert False` and `raise AssertionError` are such; what comes past them without a word has passed.
    """
    run = [
        statement
        for statement in tree.body
        if not isinstance(statement, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef))
        or statement.name == "check"
    ]
    return any(_denies(statement, caught=False) for statement in run)


def _denies(node: ast.AST, *, caught: bool) -> bool:
    """Whether a node holds such a place; what a `try` around it may catch is none."""
    if isinstance(node, ast.Assert):
        return isinstance(node.test, ast.Constant) and not node.test.value
    if isinstance(node, ast.Raise):
        return node.exc is not None and not caught
    if not isinstance(node, (ast.Try, ast.TryStar)):
        return any(_denies(child, caught=caught) for child in ast.iter_child_nodes(node))
    broad = any(
        handler.type is None or any(_names(handler.type, name) for name in _BROAD)
        for handler in node.handlers
    )
    inside = any(_denies(child, caught=caught or broad) for child in node.body)
    rest = (*node.handlers, *node.orelse, *node.finalbody)
    return inside or any(_denies(child, caught=caught) for child in rest)


class Score:
    """What passed and what failed."""

    def __init__(self, max_failures: int = 5) -> None:
        self.num_passed = 0
        self.num_failed = 0
        self.failures: list[str] = []
        self.last_error: BaseException | None = None
        self._max_failures = max_failures

    def passed(self) -> None:
        self.num_passed += 1

    def failed(self, test: str, error: BaseException | None = None) -> None:
        """Counts a failure; an exception that goes on after it has been told of is none more."""
        if error is not None and error is self.last_error:
            return
        self.last_error = error
        self.num_failed += 1
        text = str(error)[:MAX_TEXT] if error is not None else ""
        bare = error is None or (isinstance(error, AssertionError) and not text)
        reason = "" if bare else f" ({type(error).__name__}: {text})"
        if len(self.failures) < self._max_failures:
            self.failures.append(f"{test}{reason}")

    def caught(self) -> None:
        """In a handler: the exception that a test waits for has come, unless it is a failed assertion."""
        if sys.exc_info()[1] is not self.last_error:
            self.num_passed += 1

    def names(self) -> dict[str, Any]:
        """What the rewritten source calls."""
        return {PASSED: self.passed, FAILED: self.failed, CAUGHT: self.caught, ANY: Exception}


class Raises:
    """A block that must raise."""

    def __init__(self, expected: Any, match: str | None = None) -> None:
        kinds = expected if isinstance(expected, tuple) else (expected,)
        stops = any(issubclass(kind, (StopIteration, StopAsyncIteration)) for kind in kinds)
        self._expected = (*kinds, *([StoppedIteration] if stops else []))
        self._match = match
        self.value: BaseException | None = None

    def __enter__(self) -> Raises:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: Any) -> bool:
        if kind is None:
            raise AssertionError(f"{self._expected[0].__name__} was not raised")
        if not issubclass(kind, self._expected):
            return False
        self.value = error
        if self._match is not None and re.search(self._match, str(error)) is None:
            raise AssertionError(f"{str(error)!r} does not match {self._match!r}")
        return True


def raises(expected: Any, *call: Any, match: str | None = None, **names: Any) -> Any:
    """A block that must raise, or a call that must."""
    if not call:
        return Raises(expected, match)
    with Raises(expected) as caught:
        call[0](*call[1:], **names)
    return caught


class Approx:
    """Equals numbers near its own, and containers of such."""

    def __init__(self, value: Any, rel: float | None = None, abs: float | None = None) -> None:
        self._value, self._rel, self._abs = value, 1e-6 if rel is None else rel, 1e-12 if abs is None else abs

    def __repr__(self) -> str:
        return f"approx({self._value!r})"

    def __eq__(self, other: object) -> bool:
        return self._near(other, self._value)

    __hash__ = None  # type: ignore[assignment]

    def _near(self, value: Any, wanted: Any) -> bool:
        if isinstance(wanted, dict):
            return (
                isinstance(value, dict)
                and value.keys() == wanted.keys()
                and all(self._near(value[key], wanted[key]) for key in wanted)
            )
        if isinstance(wanted, (list, tuple)):
            return (
                type(value) is type(wanted)
                and len(value) == len(wanted)
                and all(map(self._near, value, wanted))
            )
        if isinstance(wanted, (int, float)) and isinstance(value, (int, float)):
            return value == wanted or math.isclose(value, wanted, rel_tol=self._rel, abs_tol=self._abs)
        return bool(value == wanted)


def parametrize(names: Any, values: Any, **_: Any) -> Callable[[Any], Any]:
    """Runs a test for each of the values."""
    known = [name.strip() for name in names.split(",")] if isinstance(names, str) else list(names)

    def decorate(function: Any) -> Any:
        def run_all(*owner: Any, **given: Any) -> None:
            for case in values:
                function(
                    *owner, **given, **dict(zip(known, case if len(known) > 1 else (case,), strict=True))
                )

        return run_all

    return decorate


class Marks:
    """Of all marks one does something."""

    parametrize = staticmethod(parametrize)

    def __getattr__(self, name: str) -> Any:
        return lambda *given, **_: given[0] if given and callable(given[0]) else lambda function: function


def install() -> None:
    """Makes `import pytest` give these names."""
    module = types.ModuleType("pytest")
    module.__dict__.update(raises=raises, approx=Approx, mark=Marks(), param=lambda *values, **_: values)
    sys.modules["pytest"] = module


Run = Callable[[], None]


class Tests:
    """What is run: prepared before the solution's code does anything, so that nothing of it can break them."""

    def __init__(self, job: Any, solution: Solution, score: Score) -> None:
        """Raises TestsBroken."""
        self.cut_short = False
        """Whether a function did not come to its end, so that some of its assertions were not reached."""
        self._job = job
        self._solution = solution
        self._score = score
        keeper = Scorekeeper()
        try:
            tree = ast.parse(job["test"], "test.py")
            self.denies = denies(tree)
            """Whether the tests can refuse wrong code by a place that right code never comes to."""
            self._program = compile(keeper.visit(tree), "test.py", "exec", dont_inherit=True)
        except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
            raise TestsBroken(f"the test is no Python: {error}") from None
        self.num_expected = max(1, keeper.num_asserts + len(job["cases"]))
        if "pytest" in job["test"]:
            install()
        # A module, as what is defined there may look for the one that it belongs to.
        sys.modules["tests"] = types.ModuleType("tests")
        self._names: dict[str, Any] = sys.modules["tests"].__dict__
        self._names["__builtins__"] = builtins
        try:
            exec(compile(job["preamble"], "preamble.py", "exec", dont_inherit=True), self._names)
        except BaseException as error:  # noqa: BLE001  SystemExit too
            raise TestsBroken(f"the code before the tests failed: {type(error).__name__}: {error}") from None
        solution.exceptions = self._names
        tested = self._solution_names(job["entry_point"])
        self._names.update({**score.names(), STOPS: StoppedIteration, "candidate": solution, **tested})
        sys.modules["solution"] = types.ModuleType("solution")  # for tests that import what they test
        sys.modules["solution"].__dict__.update(tested)

    def _solution_names(self, entry_point: str) -> dict[str, Any]:
        owner, _, name = entry_point.rpartition(".")
        solution = self._solution
        if not owner:
            return {name: solution}
        owned = type(CLASS, (), {name: lambda _, *arguments, **names: solution(*arguments, **names)})
        return {name: solution, CLASS: owned}

    def run(self) -> None:
        """All of them. What ends them early is raised; TestsBroken where the solution cannot be to blame."""
        for case in self._job["cases"]:
            self._run_case(case)
        try:
            exec(self._program, self._names)
            for name, run in self._found():
                self._unit(name, run)
        except (ImportError, NameError) as error:
            if self._solution.num_values == 0 and not self._solution.ended:
                raise TestsBroken(f"the tests fail by themselves: {type(error).__name__}: {error}") from None
            raise

    def _run_case(self, case: Any) -> None:
        arguments, names = list(map(with_keys, case.get("args", []))), case.get("kwargs", {})
        shown = ", ".join(
            [*map(_shown, arguments), *(f"{name}={_shown(value)}" for name, value in names.items())]
        )
        test = f"{self._solution.__name__}({shown[:MAX_TEXT]}) == {_shown(case['expected'])}"
        try:
            value = self._solution(*arguments, **names)
            holds = same(value, case["expected"]) or any(same(value, other) for other in case.get("or", ()))
        except Exception as error:  # noqa: BLE001
            self._score.failed(test, error)
        else:
            if holds:
                self._score.passed()
            else:
                self._score.failed(test)

    def _found(self) -> list[tuple[str, Run]]:
        """The tests that a source defines and leaves to others to run."""
        found: list[tuple[str, Run]] = []
        check = self._names.get("check")
        if check is self._solution:  # that is what the function is called
            check = None
        if callable(check):
            found.append(("check", lambda: self._expect(self._call(check))))
        for name, value in list(self._names.items()):
            if isinstance(value, type) and value.__module__ == "tests" and self._is_case(value):
                found += self._methods(value)
            elif isinstance(value, type) and value.__module__ == "tests" and name.startswith("Test"):
                found += self._plain_methods(value)
            elif name.startswith("test") and isinstance(value, types.FunctionType) and not callable(check):
                found.append((name, lambda value=value: self._expect(self._call(value))))  # type: ignore[misc]
        return found

    def _call(self, function: Any) -> Any:
        """Calls it with the solution where it takes something."""
        if not isinstance(function, types.FunctionType):
            return function(self._solution)
        code = function.__code__
        wanted = code.co_varnames[: code.co_argcount - len(function.__defaults__ or ())]
        known = function.__name__ == "check" or set(wanted) <= {
            "candidate",
            "solution",
            self._solution.__name__,
        }
        if len(wanted) > 1 or not known:
            raise TestsBroken(f"nothing is known to give to {', '.join(wanted)} of a test")
        return function(*[self._solution] * len(wanted))

    def _expect(self, value: Any) -> None:
        """A test may say what it found: one that returns a truth value is an assertion."""
        if isinstance(value, bool):
            if not value:
                raise AssertionError("it returned False")
            self._score.passed()

    def _is_case(self, kind: type) -> bool:
        unittest = sys.modules.get("unittest")
        return unittest is not None and issubclass(kind, unittest.TestCase)

    def _methods(self, kind: type) -> list[tuple[str, Run]]:
        import unittest

        suite = unittest.defaultTestLoader.loadTestsFromTestCase(kind)
        self.num_expected += suite.countTestCases()
        return [(kind.__name__, lambda: self._run_suite(suite))] if suite.countTestCases() else []

    def _plain_methods(self, kind: type) -> list[tuple[str, Run]]:
        """Those of a class as pytest takes it, each on a new instance."""

        def run(name: str) -> None:
            one = kind()
            if hasattr(one, "setup_method"):
                one.setup_method()
            self._expect(getattr(one, name)())

        names = [name for name in vars(kind) if name.startswith("test")]
        return [(name, functools.partial(run, name)) for name in names]

    def _run_suite(self, suite: Any) -> None:
        import unittest

        score = self._score

        class Result(unittest.TestResult):
            def addSuccess(self, _: Any) -> None:  # noqa: N802  the framework's names
                score.passed()

            def addFailure(self, test: Any, err: Any) -> None:  # noqa: N802
                score.failed(str(test), err[1])

            def addError(self, test: Any, err: Any) -> None:  # noqa: N802
                score.failed(str(test), err[1])

            def addSubTest(self, _: Any, subtest: Any, err: Any) -> None:  # noqa: N802
                if err is not None:
                    score.failed(str(subtest), err[1])

            def addUnexpectedSuccess(self, test: Any) -> None:  # noqa: N802
                score.failed(f"{test} must fail")

        suite.run(Result())

    def _unit(self, name: str, run: Run) -> None:
        """One function; where it ends by an exception that nothing has told of, that is a failure."""
        failed_before, passed_before = self._score.num_failed, self._score.num_passed
        try:
            run()
        except Exception as error:
            if isinstance(error, (ImportError, NameError)):
                raise
            self.cut_short = True
            self._score.failed(f"{name} runs to its end", error)
        else:
            silent = self._score.num_passed == passed_before and self._score.num_failed == failed_before
            if silent and name.startswith("test"):
                self._score.passed()


def _shown(value: Any) -> str:
    try:
        return repr(value)[:MAX_TEXT]
    except ValueError:  # an integer of more digits than the interpreter writes
        return "..."


def run_tests(job: Any, solution: Solution) -> dict[str, Any]:
    """The verdict: `{"passed", "total", "failures", "broken"}`."""
    score = Score()
    try:
        tests = Tests(job, solution, score)
    except TestsBroken as error:
        return {"broken": str(error)}
    try:
        solution.define(job)
    except BaseException as error:  # noqa: BLE001
        score.failed("the solution can be loaded", error)
        return _verdict(score, tests.num_expected)
    finished = False
    try:
        tests.run()
        finished = not tests.cut_short
    except TestsBroken as error:
        return {"broken": str(error)}
    except BaseException as error:  # noqa: BLE001  SystemExit too: whatever ends the tests early
        if not isinstance(error, SolutionEnded):
            score.failed("the tests run to their end", error)
    if solution.broken:
        return {"broken": solution.broken}
    if solution.ended:
        score.failed("the solution stays until the end", SolutionEnded(solution.ended))
    elif score.num_passed == 0 and score.num_failed == 0:
        if finished and tests.denies and solution.num_calls:
            score.passed()
        else:
            score.failed("an assertion is reached")
    elif solution.num_calls == 0:
        score.failed("the solution is called")
    return _verdict(score, 1 if finished and not solution.ended else tests.num_expected)


def _verdict(score: Score, at_least: int) -> dict[str, Any]:
    total = max(score.num_passed + score.num_failed, at_least)
    return {"passed": score.num_passed, "total": total, "failures": score.failures, "broken": ""}
