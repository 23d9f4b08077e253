"""Every assertion of a test source is noticed, however it ends."""

from __future__ import annotations

import ast
import sys
from typing import Any

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
