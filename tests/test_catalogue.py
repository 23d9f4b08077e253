"""Every bug of the catalogue that the code can have is pinned by a test that is marked with its number."""

from __future__ import annotations

import ast
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

TESTS = Path(__file__).resolve().parent
NUMBERS = {f"B{number}" for number in range(1, 51)}
WITHOUT_CODE = {"B40": "replay of routed experts"}
"""Bugs of parts that there are not yet, with the part."""


def marks() -> Iterator[tuple[str, str]]:
    """Each number that a test is marked with, and the test's file."""
    for path in sorted(TESTS.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and ast.unparse(node.func) == "pytest.mark.catalogue":
                for argument in node.args:
                    assert isinstance(argument, ast.Constant), ast.unparse(node)
                    yield str(argument.value), str(path.relative_to(TESTS))


def test_every_number_is_one_of_the_catalogue() -> None:
    unknown = {number: path for number, path in marks() if number not in NUMBERS}
    assert not unknown, "numbers are written like B7"


def test_every_bug_that_there_is_code_for_has_a_test() -> None:
    files = defaultdict(set)
    for number, path in marks():
        files[number].add(path)
    missing = sorted(NUMBERS - files.keys() - WITHOUT_CODE.keys(), key=lambda number: int(number[1:]))
    assert not missing
    assert not WITHOUT_CODE.keys() & files.keys(), "it has a test: take it off the list"
