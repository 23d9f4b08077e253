"""The tests are run, whatever their form, and what they found out is the verdict.

A source has assertions at its top level, or in a function `check`, or in functions `test...`, or in classes of
`unittest`; or there is no source, but cases of arguments and values.
"""

from __future__ import annotations

import ast
import builtins
import functools
import sys
import types
from collections.abc import Callable
from typing import Any

from polyturn.envs.code.harness.answering import CLASS
from polyturn.envs.code.harness.asking import Solution, SolutionEnded, StoppedIteration, TestsBroken
from polyturn.envs.code.harness.scoring import MAX_TEXT, STOPS, Score, Scorekeeper, denies
from polyturn.envs.code.harness.values import same, with_keys

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
            from polyturn.envs.code.harness.stand_in import install

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
