"""Environments whose answers are programs: graded by unit tests, or by what they print."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

from polyturn.envs.code.answers import find_code
from polyturn.envs.code.reports import LIMIT_S, TestReport
from polyturn.envs.code.rows import Kind, Tests, as_tests, builtin_tasks, read_tasks
from polyturn.envs.code.stdio import grade_stdio, limits_for
from polyturn.envs.code.unit_tests import UnitTests, grade_unit_tests
from polyturn.envs.messages import AssistantMessage, Message
from polyturn.envs.spaces import Script
from polyturn.envs.tasks import TaskSource
from polyturn.envs.tool_env import ToolEnv
from polyturn.tools.python import BackendName, RunCodeTool, SharedSandboxes
from polyturn.tools.sandbox import Limits
from polyturn.tools.types import ToolSpec

NO_CODE = "There is no block of Python in the answer. Put the code between ```python and ```."


class CodeEnv(ToolEnv):
    """Write a program that passes tests; the last fenced block of Python in an answer is the program.

    The reward is `tests`: 1.0 if every test passes, else 0.0 (or the fraction that passes, with `partial_credit`).
    With `tries` above 1 an answer that fails is told what failed, and another is asked for; only the last one counts.
    With `run_code` there is a tool to run code in a sandbox before answering. Programs run in sandboxes only, and what
    they print is never taken for a verdict. A sandbox that fails is an `EnvironmentFault`.
    """

    kind: ClassVar[Kind]

    def __init__(
        self,
        *,
        path: str | Path | None = None,
        tries: int = 1,
        run_code: bool = False,
        partial_credit: bool = False,
        timeout_s: float = LIMIT_S,
        backend: BackendName = "auto",
        limits: Limits | None = None,
        split: str = "train",
        max_turns: int | None = None,
        tasks: TaskSource | None = None,
        render_mode: str | None = None,
    ) -> None:
        """
        Args:
            path: A JSONL file of tasks, in the place of the problems that come with the package.
            tries: Answers that may be given.
            run_code: Whether there is a tool `run_code`.
            partial_credit: Whether the reward is the fraction of tests passed.
            timeout_s: Seconds for all tests of one answer (and for one call of `run_code`).
            backend: Of the sandbox.
            limits: Of the sandbox.
            split: `train` or `heldout`.
            max_turns: Calls and answers together; None: `tries`, and 6 calls where there is `run_code`.
            tasks: In the place of the built-in ones. The label is the tests: `{entry_point, test or cases, prompt?}`,
                or a list of `{input, output}`; `metadata["public"]` may hold tests whose failures the model is told.
            render_mode: None or "ansi".

        Raises:
            ValueError: a split or a file that does not exist, `tries` or `timeout_s` that cannot be.
        """
        if tries < 1:
            raise ValueError(f"tries must be at least 1, not {tries}")
        if not timeout_s > 0:
            raise ValueError(f"timeout_s must be above 0, not {timeout_s}")
        if path is not None:
            tasks = read_tasks(path, self.kind)
        elif tasks is None:
            builtin_tasks(self.kind, split)
        self.sandboxes = SharedSandboxes(backend)
        self._limits = limits or Limits()
        self._tries = tries
        self._partial_credit = partial_credit
        self._timeout_s = timeout_s
        self._num_answers = 0
        self._report: tuple[str | None, TestReport] | None = None
        self._hidden_tests: Tests | None = None
        self._public_tests: Tests | None = None
        tool = RunCodeTool.using(sandboxes=self.sandboxes, timeout_s=timeout_s, limits=self._limits)
        super().__init__(
            tools=[tool] if run_code else [],
            tasks=tasks,
            split=split,
            max_turns=max_turns or tries + 6 * run_code,
            render_mode=render_mode,
        )

    def tasks(self, split: str) -> TaskSource:
        """The problems of `train` or `heldout`, or the tasks given to the constructor."""
        return self._given_tasks if self._given_tasks is not None else builtin_tasks(self.kind, split)

    def begin(self, task: Any) -> Sequence[Message]:
        """The problem. Raises `ValueError` for a task without tests."""
        self._num_answers, self._report = 0, None
        public = task.metadata.get("public")
        self._hidden_tests = as_tests(task.label)
        self._public_tests = as_tests(public) if public else None
        return task.messages

    def check_label(self, label: Any) -> None:
        """Raise `ValueError` for tests that cannot be run, or that prove nothing."""
        as_tests(label)

    def follow_up(self, message: AssistantMessage) -> Sequence[Message]:
        """What failed, while there are tries left and something did."""
        self._num_answers += 1
        self.metrics["answers"] = float(self._num_answers)
        if self._num_answers >= self._tries:
            return ()
        code = find_code(message.content)
        if code is None:
            text = NO_CODE
        elif self._public_tests is not None:
            report = self._run(code, self._public_tests)
            if report.all_passed:
                return ()
            text = f"{_count(report)} Failed:\n" + "\n".join(f"- {failure}" for failure in report.failures)
        else:
            report = self._hidden(code)
            if report.all_passed:
                return ()
            text = _count(report)
        return [{"role": "user", "content": f"{text}\n\nTry again: give the whole program once more."}]

    def grade(self, message: AssistantMessage) -> Mapping[str, float]:
        """The tests that the answer's program passes."""
        report = self._hidden(find_code(message.content))
        self.metrics["tests_passed"] = report.fraction
        return {"tests": report.reward(partial_credit=self._partial_credit)}

    def oracle(self, messages: Sequence[Message], tools: Sequence[ToolSpec]) -> AssistantMessage:  # type: ignore[override]
        """Gives the task's own solution."""
        del messages, tools
        return AssistantMessage(content=f"```python\n{self.task.metadata['canonical_solution']}\n```")

    def random_policy(self, seed: int) -> Script:
        """Answers with programs that give a number at random."""
        rng = random.Random(seed)

        def script(messages: Sequence[Message], tools: Sequence[ToolSpec]) -> AssistantMessage:
            del messages, tools
            return AssistantMessage(content=f"```python\n{self._some_program(rng.randint(0, 99))}\n```")

        return script

    def close(self) -> None:
        """Free the sandboxes."""
        super().close()
        self.sandboxes.close()

    def _some_program(self, number: int) -> str:
        if isinstance(self._hidden_tests, UnitTests):
            return f"def {self._hidden_tests.name}(*arguments):\n    return {number}"
        return f"print({number})"

    def _run(self, code: str, tests: Tests) -> TestReport:
        # A new sandbox each time: nothing that an earlier answer left can help or harm this one.
        if isinstance(tests, UnitTests):
            with self.sandboxes.create(self._limits) as sandbox:
                return grade_unit_tests(code, tests, sandbox, timeout_s=self._timeout_s)
        with self.sandboxes.create(limits_for(tests, self._limits)) as sandbox:
            return grade_stdio(
                code,
                tests,
                sandbox,
                timeout_s=self._timeout_s,
                total_s=self._timeout_s,
                stop_at_first=not self._partial_credit,
            )

    def _hidden(self, code: str | None) -> TestReport:
        """The report of all tests; an answer that was tested for `follow_up` is not tested again."""
        if self._report is None or self._report[0] != code:
            assert self._hidden_tests is not None
            report = TestReport.nothing(NO_CODE) if code is None else self._run(code, self._hidden_tests)
            self._report = (code, report)
        return self._report[1]


class CodeUnitTestsEnv(CodeEnv):
    """Write a function that passes unit tests (rows in the form of HumanEval)."""

    kind = "unit_tests"


class CodeStdioEnv(CodeEnv):
    """Write a program that prints the right answer for its input (rows in the form of LiveCodeBench)."""

    kind = "stdio"


def _count(report: TestReport) -> str:
    return f"{report.num_passed} of {report.num_tests} tests pass."
