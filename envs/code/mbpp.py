"""MBPP's rows (arXiv 2108.07732): a sentence, three assertions that the policy is shown, and a solution."""

from __future__ import annotations

import ast
import re
from collections.abc import Mapping
from typing import Any, TypeGuard

from polyturn.envs.code.grading import as_unit_tests
from polyturn.envs.messages import Task

HELDOUT = range(11, 511)
"""The task ids of the paper's test split; the others are `train`, its few-shot and validation rows among them."""


def mbpp_task(row: Mapping[str, Any]) -> Task:
    """A task from `{text, code, test_list, task_id, test_setup_code?}`, or of the sanitized set with `prompt`,
    `test_imports`.

    The assertions are shown, as in the paper, and grade.

    Raises:
        Ungradable: the assertions name something that only a solution could define, such as a class.
        ValueError: a key is missing, or the assertions call no function that the solution defines.
    """
    text, code, assertions = row.get("text", row.get("prompt")), row.get("code"), row.get("test_list")
    if not isinstance(text, str) or not isinstance(code, str) or not _are_texts(assertions):
        raise ValueError("a row of MBPP needs 'text' (or 'prompt'), 'code' and 'test_list'")
    setup = row.get("test_setup_code") or "\n".join(row.get("test_imports") or ())
    code = code.replace("\r\n", "\n")
    test = "\n".join([*([setup.replace("\r\n", "\n")] if setup.strip() else []), *assertions])
    test = "\n".join([*_imports_for(test, code), test])
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


class Ungradable(ValueError):
    """Tests and solution run in two processes, and this needs them in one."""


def _imports_for(test: str, code: str) -> list[str]:
    """The imports of the solution that the assertions rely on; raises `Ungradable` for anything else of it."""
    try:
        tests, solution = ast.parse(test), ast.parse(code)
    except SyntaxError as error:
        raise ValueError(f"no Python: {error}") from error
    used = {node.id for node in ast.walk(tests) if isinstance(node, ast.Name)}
    bound = {name for node in ast.walk(tests) for name in _bound_by(node)}
    imports = []
    for node in solution.body:
        needed = sorted((used - bound) & set(_bound_by(node)))
        if needed and isinstance(node, ast.Import | ast.ImportFrom):
            imports.append(ast.unparse(node))
        elif needed and isinstance(node, ast.ClassDef | ast.Assign):
            raise Ungradable(f"the assertions name {needed[0]!r}, which is the solution's")
    return imports


def _bound_by(node: ast.AST) -> list[str]:
    """The names that a statement binds."""
    match node:
        case ast.Import() | ast.ImportFrom():
            return [(alias.asname or alias.name).partition(".")[0] for alias in node.names]
        case ast.ClassDef() | ast.FunctionDef():
            return [node.name]
        case ast.Assign():
            return [target.id for target in node.targets if isinstance(target, ast.Name)]
    return []


def _are_texts(value: Any) -> TypeGuard[list[str]]:
    return isinstance(value, list) and bool(value) and all(isinstance(one, str) for one in value)


def _called(test: str, code: str) -> str:
    """The function of the solution that the assertions call, the first of several."""
    defined = {node.name for node in ast.parse(code).body if isinstance(node, ast.FunctionDef)}
    calls = [node.func for node in ast.walk(ast.parse(test)) if isinstance(node, ast.Call)]
    for function in calls:
        if isinstance(function, ast.Name) and function.id in defined:
            return function.id
    raise ValueError("the assertions call no function that 'code' defines")
