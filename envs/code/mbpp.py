"""MBPP's rows (arXiv 2108.07732): a sentence, three assertions that the policy is shown, and a solution."""

from __future__ import annotations

import ast
import re
from collections.abc import Mapping
from typing import Any

from polyturn.envs.code.grading import as_unit_tests
from polyturn.envs.messages import Task

HELDOUT = range(11, 511)
"""The task ids of the paper's test split; the others are `train`, its few-shot and validation rows among them."""


def mbpp_task(row: Mapping[str, Any]) -> Task:
    """A task from `{text, code, test_list, task_id, test_setup_code?}`, or of the sanitized set with `prompt`,
    `test_imports`.

    The assertions are shown, as in the paper, and grade.

    Raises:
        ValueError: a key is missing, or the assertions call no function that the solution defines.
    """
    text, code, assertions = row.get("text", row.get("prompt")), row.get("code"), row.get("test_list")
    if not isinstance(text, str) or not isinstance(code, str) or not _are_texts(assertions):
        raise ValueError("a row of MBPP needs 'text' (or 'prompt'), 'code' and 'test_list'")
    setup = row.get("test_setup_code") or "\n".join(row.get("test_imports") or ())
    code = code.replace("\r\n", "\n")
    test = "\n".join([*([setup.replace("\r\n", "\n")] if setup.strip() else []), *assertions])
    name = _called(test, code)
    shown = "\n".join(assertions)
    prompt = (
        f"{text.strip()}\n\nYour code should pass these tests:\n\n```python\n{shown}\n```\n\n"
        "Put the whole function in one block of Python:\n\n```python\n...\n```"
    )
    given = str(row.get("task_id", name))
    number = re.search(r"\d+$", given)
    metadata: dict[str, Any] = {"public": None, "canonical_solution": code}
    if number:
        metadata["split"] = "heldout" if int(number[0]) in HELDOUT else "train"
    label = as_unit_tests({"entry_point": name, "test": test})
    return Task.from_prompt(
        given if not given.isdigit() else f"mbpp-{given}", prompt, label=label, metadata=metadata
    )


def _are_texts(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(one, str) for one in value)


def _called(test: str, code: str) -> str:
    """The function of the solution that the assertions call, the first of several."""
    try:
        defined = {node.name for node in ast.parse(code).body if isinstance(node, ast.FunctionDef)}
        calls = [node.func for node in ast.walk(ast.parse(test)) if isinstance(node, ast.Call)]
    except SyntaxError as error:
        raise ValueError(f"no Python: {error}") from error
    for function in calls:
        if isinstance(function, ast.Name) and function.id in defined:
            return function.id
    raise ValueError("the assertions call no function that 'code' defines")
