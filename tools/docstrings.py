"""Reads what a docstring in Google style says of a function and of its parameters."""

from __future__ import annotations

import inspect
import re

_SECTIONS = frozenset(
    ("args:", "arguments:", "parameters:", "returns:", "raises:", "yields:", "example:", "examples:")
)
_ARGUMENT_SECTIONS = frozenset(("args:", "arguments:", "parameters:"))
_ARGUMENT = re.compile(r"\*{0,2}(\w+)\s*(?:\([^)]*\))?:\s*(.*)")


def read_docstring(docstring: str | None) -> tuple[str, dict[str, str]]:
    """The description (all text before the first section) and the descriptions of the parameters by name."""
    lines = inspect.cleandoc(docstring or "").splitlines()
    starts = [
        i for i, line in enumerate(lines) if line.strip().lower() in _SECTIONS and not line.startswith(" ")
    ]
    description = " ".join(" ".join(lines[: starts[0] if starts else len(lines)]).split())
    arguments: dict[str, str] = {}
    for start, end in zip(starts, [*starts[1:], len(lines)], strict=False):
        if lines[start].strip().lower() in _ARGUMENT_SECTIONS:
            arguments.update(_read_arguments(lines[start + 1 : end]))
    return description, arguments


def _read_arguments(lines: list[str]) -> dict[str, str]:
    """The entries of one section; a line indented deeper than the first entry continues the entry above it."""
    arguments: dict[str, str] = {}
    indent: int | None = None
    name = ""
    for line in lines:
        if not line.strip():
            continue
        depth = len(line) - len(line.lstrip())
        if indent is None:
            indent = depth
        match = _ARGUMENT.match(line.strip())
        if depth <= indent and match:
            name = match[1]
            arguments[name] = match[2].strip()
        elif name:
            arguments[name] = f"{arguments[name]} {line.strip()}".strip()
    return arguments
