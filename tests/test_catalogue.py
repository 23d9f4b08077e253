"""Every bug of the catalogue is pinned by a test that is marked with its number."""

from __future__ import annotations

import ast
from collections.abc import Mapping
from pathlib import Path

import pytest

TESTS = Path(__file__).resolve().parent
NUMBERS = [f"B{number}" for number in range(1, 51)]


@pytest.fixture(scope="module")
def marks() -> Mapping[str, set[str]]:
    """By number, the files with tests that are marked with it."""
    found: dict[str, set[str]] = {}
    for path in sorted(TESTS.rglob("test_*.py")):
        text = path.read_text(encoding="utf-8")
        for node in ast.walk(ast.parse(text)) if "mark.catalogue" in text else ():
            if isinstance(node, ast.Call) and ast.unparse(node.func) == "pytest.mark.catalogue":
                for argument in node.args:
                    assert isinstance(argument, ast.Constant), ast.unparse(node)
                    found.setdefault(argument.value, set()).add(str(path.relative_to(TESTS)))
    return found


def test_every_number_is_one_of_the_catalogue(marks: Mapping[str, set[str]]) -> None:
    unknown = {number: paths for number, paths in marks.items() if number not in NUMBERS}
    assert not unknown, "numbers are written like B7"


@pytest.mark.parametrize("number", NUMBERS)
def test_every_bug_has_a_test(marks: Mapping[str, set[str]], number: str) -> None:
    assert marks.get(number), f"no test is marked with catalogue({number!r})"
