"""Environments whose answers are programs, graded by unit tests or by what they print, and their tasks.

Tasks come from rows in the form of HumanEval and of LiveCodeBench, or are the problems that come with the package.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import logging
import random
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal

from polyturn.envs.border import read_rows
from polyturn.envs.code.grading import (
    LIMIT_S,
    StdioCase,
    TestReport,
    UnitTests,
    as_cases,
    as_unit_tests,
    find_code,
    functional_tests,
    grade_stdio,
    grade_unit_tests,
    limits_for,
)
from polyturn.envs.code.mbpp import Ungradable, mbpp_task
from polyturn.envs.messages import (
    AssistantMessage,
    ListTasks,
    Message,
    Script,
    Task,
    TaskSource,
    known_split,
    script_of,
)
from polyturn.envs.tool_env import ToolEnv
from polyturn.tools.python import RunCodeTool, SharedSandboxes
from polyturn.tools.sandbox import BackendName, Limits
from polyturn.tools.types import ToolSpec

logger = logging.getLogger(__name__)
Kind = Literal["unit_tests", "stdio"]
SPLITS = ("train", "heldout")
_FORM = "Put the whole {what} in one block of Python:\n\n```python\n...\n```"


def unit_test_task(row: Mapping[str, Any]) -> Task:
    """A task from a row `{prompt, entry_point, test, task_id?, canonical_solution?, public_test?}`.

    In the place of `test`, `cases` may hold `[{"args": [...], "expected": ...}]`; `public_test` and `public_cases` are
    tests whose failures the model is told of.

    Raises:
        ValueError: a key is missing.
    """
    prompt, entry_point = _text(row, "prompt"), _text(row, "entry_point")

    def tests(name: str, cases: str) -> UnitTests | None:
        if not row.get(name) and not row.get(cases):
            return None
        return as_unit_tests(
            {"entry_point": entry_point, "prompt": prompt, "test": row.get(name), "cases": row.get(cases)}
        )

    hidden = tests("test", "cases")
    if hidden is None:
        raise ValueError("a row needs 'test' or 'cases'")
    text = f"Write this function.\n\n```python\n{prompt.strip()}\n```\n\n{_FORM.format(what='function')}"
    solution = row.get("canonical_solution")
    return Task.from_prompt(
        str(row.get("task_id", row.get("id", entry_point))),
        text,
        label=hidden,
        metadata={
            "public": tests("public_test", "public_cases"),
            "canonical_solution": hidden.program(solution) if solution else None,
        },
    )


Tests = UnitTests | tuple[StdioCase, ...]


def stdio_task(row: Mapping[str, Any]) -> Task:
    """A task from a row in the form of LiveCodeBench, or of APPS and TACO.

    `{question_content, private_test_cases, public_test_cases?, starter_code?, question_id?, canonical_solution?}`; test
    cases are lists of `{input, output}`, or the JSON text of such a list; those of type `functional` call a method of
    which `metadata` has the name. Or `{question, input_output}` with `{inputs, outputs, fn_name?}`, or its JSON text.

    Raises:
        ValueError: a key is missing, or test cases cannot be read (those that LiveCodeBench packs with pickle are not:
            unpack them where you trust their source).
    """
    public = _live_code_tests(row, "public_test_cases")
    private = _live_code_tests(row, "private_test_cases")
    if "input_output" in row:
        private = as_tests(row["input_output"])
    if not public and not private:
        raise ValueError("a row needs 'private_test_cases', 'public_test_cases' or 'input_output'")
    tests = _together(public, private)
    question = _text(row, "question_content" if "question_content" in row else "question").strip()
    starter = row.get("starter_code")
    begin = f"Begin with:\n\n```python\n{starter.strip()}\n```\n\n" if starter and starter.strip() else ""
    if isinstance(tests, UnitTests):
        text = f"{question}\n\nWrite the Python function `{tests.name}`.\n\n{begin}{_FORM.format(what='function')}"
    else:
        text = (
            f"{question}\n\nWrite a Python program that reads the standard input and prints the answer.\n\n"
            f"{begin}{_FORM.format(what='program')}"
        )
    return Task.from_prompt(
        str(row.get("question_id", row.get("id", row.get("problem_id", question[:40])))),
        text,
        label=tests,
        metadata={"public": public or None, "canonical_solution": row.get("canonical_solution")},
    )


def as_tests(label: Any) -> Tests:
    """Unit tests or cases of input and output, whichever a label is.

    `{inputs, outputs}` without a `fn_name` are cases of input and output, each a text or a list of lines.

    Raises:
        ValueError: it is neither.
    """
    if isinstance(label, str) and label.lstrip().startswith(("{", "[")):
        try:
            label = json.loads(label)
        except ValueError as error:
            raise ValueError(f"tests that are no JSON: {error}") from None
    if isinstance(label, Mapping) and {"inputs", "outputs"} <= label.keys() and not label.get("fn_name"):
        inputs, outputs = list(map(_as_text, label["inputs"])), list(map(_as_text, label["outputs"]))
        if len(inputs) != len(outputs):
            raise ValueError(f"{len(inputs)} inputs, but {len(outputs)} outputs")
        return as_cases([{"input": one, "output": other} for one, other in zip(inputs, outputs, strict=True)])
    if isinstance(label, UnitTests | Mapping):
        return as_unit_tests(label)
    return as_cases(label)


def read_tasks(path: str | Path, kind: Kind) -> ListTasks:
    """The tasks of a JSONL file, held in memory.

    Raises:
        ValueError: `path:line: ...` for a row that is none.
    """
    usual: Callable[[Mapping[str, Any]], Task] = unit_test_task if kind == "unit_tests" else stdio_task
    tasks, left_out = [], []
    for number, row in read_rows(path, "task"):
        try:
            tasks.append(_task_maker(row, usual)(row))
        except Ungradable as reason:
            left_out.append(f"{path}:{number}: {reason}")
        except (ValueError, TypeError, KeyError) as error:
            raise ValueError(f"{path}:{number}: {error}") from error
    if left_out:
        logger.warning("%d rows are left out, which cannot be graded: %s", len(left_out), "; ".join(left_out))
    return ListTasks(tasks)


def _task_maker(
    row: Mapping[str, Any], usual: Callable[[Mapping[str, Any]], Task]
) -> Callable[[Mapping[str, Any]], Task]:
    if {"question_content", "input_output"} & row.keys():
        return stdio_task
    return mbpp_task if "test_list" in row else usual


def file_tasks(path: str | Path, kind: Kind, split: str) -> ListTasks:
    """The tasks of a file that say that they are of a split, or all of them where none says so. Read once.

    Raises:
        ValueError: as `read_tasks`; an unknown split, or one without a task.
    """
    file = Path(path)
    stat = file.stat() if file.is_file() else None
    tasks = _read_once(str(path), kind, stat and (stat.st_mtime_ns, stat.st_size))
    said = [tasks[index].metadata.get("split") for index in range(len(tasks))]
    if not any(said):
        return tasks
    chosen = [tasks[index] for index, own in enumerate(said) if own == known_split(split, SPLITS)]
    if not chosen:
        raise ValueError(f"{path}: no row is of the split {split!r}")
    return ListTasks(chosen)


@functools.lru_cache(maxsize=8)
def _read_once(path: str, kind: Kind, stamp: tuple[int, int] | None) -> ListTasks:
    del stamp
    return read_tasks(path, kind)


@functools.lru_cache(maxsize=4)
def builtin_tasks(kind: Kind, split: str) -> ListTasks:
    """The problems that come with the package. Raises `ValueError` for an unknown split."""
    file = f"{kind}_{known_split(split, SPLITS)}.jsonl"
    return read_tasks(Path(__file__).with_name("data") / file, kind)


def _text(row: Mapping[str, Any], key: str) -> str:
    if not isinstance(row.get(key), str):
        raise ValueError(f"a row needs {key!r}, a text")
    return row[key]


def _as_text(value: Any) -> str:
    return "\n".join(map(str, value)) if isinstance(value, list) else str(value)


def _live_code_tests(row: Mapping[str, Any], key: str) -> Tests | None:
    given: Any = row.get(key) or []
    if isinstance(given, str):
        try:
            given = json.loads(given)
        except ValueError as error:
            raise ValueError(f"{key} is no JSON list of test cases: {error}") from error
    kinds = {case.get("testtype") for case in given if isinstance(case, Mapping)}
    if kinds != {"functional"}:
        return as_cases(given) if given else None
    metadata = row.get("metadata") or {}
    name = (json.loads(metadata) if isinstance(metadata, str) else metadata).get("func_name")
    if not isinstance(name, str):
        raise ValueError(f"{key} has cases of type 'functional', which need a 'func_name' in 'metadata'")
    return functional_tests(name, given)


def _together(public: Tests | None, private: Tests | None) -> Tests:
    """Public and private tests, all of which count."""
    if public is None or private is None:
        one = public or private
        assert one is not None
        return one
    if isinstance(public, UnitTests) and isinstance(private, UnitTests):
        cases = json.dumps([*json.loads(public.cases), *json.loads(private.cases)])
        return dataclasses.replace(private, cases=cases)
    if isinstance(public, tuple) and isinstance(private, tuple):
        return (*public, *private)
    raise ValueError("public and private test cases are of different types")


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
            path: A JSONL file of tasks, in the place of the problems that come with the package. Rows of MBPP are of
                `heldout` or `train` by their numbers; others are of every split.
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
            tasks = file_tasks(path, self.kind, split)
        elif tasks is None:
            builtin_tasks(self.kind, split)
        self._path = path
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
        if self._path is not None:
            return file_tasks(self._path, self.kind, split)
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

    def answer_of(self, message: AssistantMessage) -> str | None:
        """The program."""
        return find_code(message.content) or None

    def oracle(self, messages: Sequence[Message], tools: Sequence[ToolSpec]) -> AssistantMessage:  # type: ignore[override]
        """Gives the task's own solution."""
        del messages, tools
        return _fenced(self.task.metadata["canonical_solution"])

    def random_policy(self, seed: int) -> Script:
        """Answers with programs that give a number at random."""
        rng = random.Random(seed)
        return script_of(lambda: _fenced(self._some_program(rng.randint(0, 99))))

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


def _fenced(program: str) -> AssistantMessage:
    return AssistantMessage(content=f"```python\n{program}\n```")


def _count(report: TestReport) -> str:
    return f"{report.num_passed} of {report.num_tests} tests pass."
