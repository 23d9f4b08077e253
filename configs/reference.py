"""Every option as Markdown tables, from the schema."""

from __future__ import annotations

import types
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from polyturn.configs.schema import RunConfig
from polyturn.configs.shapes import KIND, Variants, shape_of

_NAMES: dict[Any, str] = {
    bool: "bool",
    int: "int",
    float: "float",
    str: "text",
    Path: "path",
    type(None): "null",
}


def options_markdown() -> str:
    """One table for each section: key, type, default and meaning."""
    return "\n".join(_section(RunConfig, "", "")).rstrip() + "\n"


def _section(section: type[BaseModel], path: str, kind: str) -> Iterator[str]:
    title = f"`{path}`" if path else "The run"
    yield f"## {title}{kind}\n"
    if path:
        yield f"{(section.__doc__ or '').strip()}\n"
    yield "| key | type | default | meaning |\n| --- | --- | --- | --- |"
    below: list[tuple[type[BaseModel], str, str]] = []
    for name, field in section.model_fields.items():
        shape = shape_of(field)
        inner = f"{path}.{name}" if path else name
        if isinstance(shape, Variants):
            below += [(variant, inner, f" with `kind: {k}`") for k, variant in shape.sections.items()]
            default = f"`kind: {shape.default_kind}`" if shape.default_kind else "required"
            meaning = f"see [`{inner}`](#{_anchor(inner, below[-len(shape.sections)][2])})"
            yield f"| `{name}` | section | {default} | {meaning} |"
        elif shape is not None:
            below.append((shape, inner, ""))
            default = "required" if field.is_required() else ""
            yield f"| `{name}` | section | {default} | see [`{inner}`](#{_anchor(inner, '')}) |"
        elif name != KIND:
            yield f"| `{name}` | {_type(field)} | {_default(field)} | {_one_line(field.description)} |"
    yield ""
    for inner_section, inner_path, inner_kind in below:
        yield from _section(inner_section, inner_path, inner_kind)


def _anchor(path: str, kind: str) -> str:
    """GitHub's anchor of a heading."""
    words = f"{path}{kind}".lower().replace(" ", "-")
    return "".join(c for c in words if c.isalnum() or c in "-_")


def _type(field: FieldInfo) -> str:
    limits = [_limit(item) for item in field.metadata]
    shown = " or ".join(dict.fromkeys(_types(field.annotation)))
    return " ".join([shown, *(limit for limit in limits if limit)])


def _types(annotation: Any) -> Iterator[str]:
    origin = get_origin(annotation)
    if origin is Annotated:
        inner, *metadata = get_args(annotation)
        limits = " ".join(filter(None, (_limit(item) for item in metadata)))
        yield " ".join(filter(None, (" or ".join(_types(inner)), limits)))
    elif origin in (Union, types.UnionType):
        for option in get_args(annotation):
            yield from _types(option)
    elif origin is Literal:
        yield from (f"`{choice}`" for choice in get_args(annotation))
    elif origin is dict:
        yield "section with free keys"
    else:
        yield _NAMES.get(annotation, getattr(annotation, "__name__", str(annotation)))


def _limit(item: Any) -> str:
    signs = {"gt": ">", "ge": "≥", "lt": "<", "le": "≤"}
    nested = getattr(item, "metadata", None)
    if nested:
        return " ".join(filter(None, (_limit(inner) for inner in nested)))
    return ", ".join(f"{sign} {getattr(item, name)}" for name, sign in signs.items() if hasattr(item, name))


def _default(field: FieldInfo) -> str:
    value = field.default
    if value is PydanticUndefined:
        return "required"
    if value is None:
        return "`null`"
    if isinstance(value, bool):
        return f"`{str(value).lower()}`"
    return "`{}`" if value == {} else f"`{value}`"


def _one_line(text: str | None) -> str:
    return " ".join((text or "").split()).replace("|", "\\|")
