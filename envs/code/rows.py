"""Tasks from rows in the form of HumanEval and of LiveCodeBench, and the problems that come with the package."""

from __future__ import annotations

import dataclasses
import functools
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal

from polyturn.envs.code.stdio import StdioCase, as_cases
from polyturn.envs.code.unit_tests import UnitTests, as_unit_tests, functional_tests
from polyturn.envs.messages import known_split
from polyturn.envs.tasks import ListTasks, Task

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
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"{path}: no such task file")
    usual: Callable[[Mapping[str, Any]], Task] = unit_test_task if kind == "unit_tests" else stdio_task
    tasks = []
    with path.open(encoding="utf-8") as file:
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
                if not isinstance(row, dict):
                    raise ValueError("a row is a JSON object")
                other = {"question_content", "input_output"} & row.keys()
                tasks.append(stdio_task(row) if other else usual(row))
            except (ValueError, TypeError, KeyError) as error:
                raise ValueError(f"{path}:{number}: {error}") from error
    return ListTasks(tasks)


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
