"""Calls that are written as Python, as Llama 4 writes them."""

from __future__ import annotations

import ast
import re
from collections.abc import Sequence
from typing import Any

from polyturn.agents.dialects.calls import CallReader, can_be_written
from polyturn.agents.dialects.thoughts import leading_thoughts
from polyturn.envs.messages import AssistantMessage
from polyturn.tools.types import ToolCall, ToolSpec

_EXAMPLE = '[NAME(KEY="VALUE")] with nothing behind it'
_BEGINNING = re.compile(
    r"^[ \t]*(?:<\|python_start\|>[ \t]*)?(?P<calls>\[\s{0,9}[A-Za-z_][\w.]*\()", re.MULTILINE
)
_END = "<|python_end|>"
_MAX_CHARS = 262_144
"""Longer ones are not given to Python's parser."""


class PythonDialect:
    """`[search(query="x"), get_page(url="y")]`, a Python list of calls whose arguments are literals.

    The list begins a line and is the last thing of the turn; what stands before it is content. Thoughts at the
    beginning are the reasoning. A call that is no Python, or whose arguments are no literals with names, is explained.
    """

    def __init__(self, *, recovers: bool = True) -> None:
        """
        Args:
            recovers: As of other dialects; here nothing is recovered.
        """
        del recovers
        self._reader = CallReader(example=_EXAMPLE, recovers=False)

    def parse(
        self, text: str, *, in_thought: bool = False, tools: Sequence[ToolSpec] = ()
    ) -> AssistantMessage:
        """As `Dialect.parse`."""
        del tools
        first = _BEGINNING.search(text)
        first_call = -1 if first is None else first.start("calls")
        reasoning, position = leading_thoughts(text, in_thought=in_thought, first_call=first_call)
        content = text[position:]
        calls: tuple[ToolCall, ...] = ()
        if (found := _BEGINNING.search(content)) is not None:
            written = content[found.start("calls") :].strip().removesuffix(_END)
            calls = tuple(self._read(written.strip()))
            content = content[: found.start()]
        return AssistantMessage(content=content.strip(), reasoning=reasoning, tool_calls=calls, raw_text=text)

    def _read(self, text: str) -> list[ToolCall]:
        if len(text) > _MAX_CHARS:
            return [self._reader.unreadable(0, f"it is longer than {_MAX_CHARS:,} characters")]
        try:
            tree = ast.parse(text, mode="eval").body
        except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
            told = error.msg if isinstance(error, SyntaxError) else str(error)
            return [self._reader.unreadable(0, f"not valid Python: {told}")]
        if not isinstance(tree, ast.List) or not tree.elts:
            return [self._reader.unreadable(0, "no list of calls")]
        return [self._call(node, number) for number, node in enumerate(tree.elts)]

    def _call(self, node: ast.expr, number: int) -> ToolCall:
        name = _dotted(node.func) if isinstance(node, ast.Call) else None
        if name is None or not isinstance(node, ast.Call):
            return self._reader.unreadable(number, "what stands in the list is no call")
        if node.args or any(keyword.arg is None for keyword in node.keywords):
            return self._reader.unreadable(number, "arguments need their names", name=name)
        arguments: dict[str, Any] = {}
        for keyword in node.keywords:
            assert keyword.arg is not None, "those without a name are refused above"
            try:
                value = ast.literal_eval(keyword.value)
            except (ValueError, TypeError, SyntaxError, RecursionError, MemoryError):
                return self._reader.unreadable(number, f"'{keyword.arg}' is no literal", name=name)
            if not can_be_written(value):
                return self._reader.unreadable(number, f"'{keyword.arg}' is nothing that JSON has", name=name)
            arguments[keyword.arg] = value
        return ToolCall(id=f"call_{number}", name=name, arguments=arguments)


def _dotted(node: ast.expr) -> str | None:
    """The name that `a` or `a.b` is; None for anything else."""
    parts: list[str] = []
    while isinstance(node, ast.Attribute):
        parts.append(node.attr)
        node = node.value
    return ".".join((node.id, *reversed(parts))) if isinstance(node, ast.Name) else None
