"""Whether the source of tests can tell right code from wrong, found out by reading it."""

from __future__ import annotations

import ast
import functools
from collections.abc import Iterator

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
