"""Whether a value fits a type annotation read from source.

What is not simple is accepted: upstream checks it.
"""

from __future__ import annotations

import ast
from typing import Any

_SIMPLE = {"bool": "true or false", "int": "an integer", "float": "a number", "str": "text"}
_LISTS = {"list", "List", "tuple", "Tuple", "Sequence"}
_MAPPINGS = {"dict", "Dict", "Mapping"}


def accepts(annotation: ast.expr, value: Any) -> bool:
    """Whether `value`, as YAML gives it, may be meant by the annotation."""
    options = _options(annotation)
    return any(_accepts_one(option, value) for option in options)


def describe_annotation(annotation: ast.expr) -> str:
    """The annotation in words."""
    words = []
    for option in _options(annotation):
        literals = _literals(option)
        if literals is not None:
            words.append("one of " + ", ".join(repr(value) for value in literals))
        elif _name(option) in _SIMPLE:
            words.append(_SIMPLE[_name(option)])
        elif _name(option) in _LISTS:
            words.append("a list")
        elif _name(option) in _MAPPINGS:
            words.append("a section")
    return " or ".join(dict.fromkeys(words)) or ast.unparse(annotation)


def _options(annotation: ast.expr) -> list[ast.expr]:
    """The members of Optional, Union or `|`; anything else alone."""
    if isinstance(annotation, ast.Constant) and isinstance(annotation.value, str):
        return _options(ast.parse(annotation.value, mode="eval").body)
    if isinstance(annotation, ast.BinOp) and isinstance(annotation.op, ast.BitOr):
        return _options(annotation.left) + _options(annotation.right)
    if isinstance(annotation, ast.Subscript):
        inner = annotation.slice
        if _name(annotation) == "Optional":
            return [*_options(inner), ast.Constant(None)]
        if _name(annotation) == "Union":
            members = inner.elts if isinstance(inner, ast.Tuple) else [inner]
            return [option for member in members for option in _options(member)]
    return [annotation]


def _accepts_one(option: ast.expr, value: Any) -> bool:
    if isinstance(option, ast.Constant) and option.value is None:
        return value is None
    literals = _literals(option)
    if literals is not None:
        return value in literals
    name = _name(option)
    if name == "bool":
        return isinstance(value, bool)
    if name == "int":
        return isinstance(value, int) and not isinstance(value, bool)
    if name == "float":
        return isinstance(value, int | float) and not isinstance(value, bool)
    if name == "str":
        # A section stands for the JSON text that such options take.
        return isinstance(value, str | dict)
    if name in _LISTS:
        return isinstance(value, list)
    if name in _MAPPINGS:
        return isinstance(value, dict)
    return True


def _literals(option: ast.expr) -> list[Any] | None:
    if not isinstance(option, ast.Subscript) or _name(option) != "Literal":
        return None
    members = option.slice.elts if isinstance(option.slice, ast.Tuple) else [option.slice]
    return [member.value for member in members if isinstance(member, ast.Constant)]


def _name(node: ast.expr) -> str:
    """`List` of `List[int]`, `typing.List[int]` and `List`."""
    if isinstance(node, ast.Subscript):
        return _name(node.value)
    if isinstance(node, ast.Attribute):
        return node.attr
    return node.id if isinstance(node, ast.Name) else ""
