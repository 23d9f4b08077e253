"""Tasks from rows in the form of HumanEval and of LiveCodeBench, and the problems that come with the package."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal

from polyturn.envs.code.stdio import StdioCase, as_cases
from polyturn.envs.code.unit_tests import UnitTests, as_unit_tests
from polyturn.envs.tasks import ListTasks, Task
from polyturn.envs.tasks.splits import known_split

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


def stdio_task(row: Mapping[str, Any]) -> Task:
    """A task from a row `{question_content, private_test_cases, public_test_cases?, starter_code?, question_id?,
    canonical_solution?}`; test cases are lists of `{input, output}`, or the JSON text of such a list.

    Raises:
        ValueError: a key is missing, or test cases cannot be read (those that LiveCodeBench packs with pickle are not:
            unpack them where you trust their source).
    """
    public, private = _stdio_cases(row, "public_test_cases"), _stdio_cases(row, "private_test_cases")
    if not public and not private:
        raise ValueError("a row needs 'private_test_cases' or 'public_test_cases'")
    question = _text(row, "question_content").strip()
    starter = row.get("starter_code")
    begin = f"Begin with:\n\n```python\n{starter.strip()}\n```\n\n" if starter and starter.strip() else ""
    text = (
        f"{question}\n\nWrite a Python program that reads the standard input and prints the answer.\n\n"
        f"{begin}{_FORM.format(what='program')}"
    )
    return Task.from_prompt(
        str(row.get("question_id", row.get("id", question[:40]))),
        text,
        label=(*public, *private),
        metadata={"public": public or None, "canonical_solution": row.get("canonical_solution")},
    )


def read_tasks(path: str | Path, kind: Kind) -> ListTasks:
    """The tasks of a JSONL file, held in memory.

    Raises:
        ValueError: `path:line: ...` for a row that is none.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"{path}: no such task file")
    make: Callable[[Mapping[str, Any]], Task] = unit_test_task if kind == "unit_tests" else stdio_task
    tasks = []
    with path.open(encoding="utf-8") as file:
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
                if not isinstance(row, dict):
                    raise ValueError("a row is a JSON object")
                tasks.append(make(row))
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


def _stdio_cases(row: Mapping[str, Any], key: str) -> tuple[StdioCase, ...]:
    given: Any = row.get(key) or []
    if isinstance(given, str):
        try:
            given = json.loads(given)
        except ValueError as error:
            raise ValueError(f"{key} is no JSON list of test cases: {error}") from error
    return as_cases(given) if given else ()
