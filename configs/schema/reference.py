"""Every option as Markdown tables, from the schema."""

from __future__ import annotations

import inspect
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from polyturn.configs.loading.router_options import SET_ROUTER
from polyturn.configs.loading.sglang_options import SET_SGLANG, SET_SGLANG_ON_CPU
from polyturn.configs.loading.validation import KIND, Shape, Variants, shape_of
from polyturn.configs.schema.run import RunConfig

_NAMES: dict[Any, str] = {
    bool: "bool",
    int: "int",
    float: "float",
    str: "text",
    Path: "path",
    type(None): "null",
}


def options_markdown() -> str:
    """One table for each section: key, type, default and meaning. A section that is used twice is shown once."""
    return "\n".join([*_section(RunConfig, "", "", {}), *_set_sglang()]) + "\n"


def _set_sglang() -> Iterator[str]:
    """The options of servers and router that a user cannot set, because Polyturn does."""
    yield "## What Polyturn sets of SGLang's server\n"
    yield "The `sglang:` section may not name these options.\n"
    yield "| option | on | why, or what to set |\n| --- | --- | --- |"
    for on, options in (("CPU and GPU", SET_SGLANG), ("CPU", SET_SGLANG_ON_CPU)):
        yield from (f"| `{option}` | {on} | {reason} |" for option, reason in options.items())
    yield "\n## What Polyturn sets of sglang-router\n"
    yield "`engines.router.options` may not name these options.\n"
    yield "| option | why, or what to set |\n| --- | --- |"
    yield from (f"| `{option}` | {reason} |" for option, reason in SET_ROUTER.items())


_Shown = dict[type[BaseModel], str]
"""Links to the tables of sections."""


def _section(section: type[BaseModel], path: str, kind: str, shown: _Shown) -> Iterator[str]:
    title = f"`{path}`" if path else "The run"
    yield f"## {title}{kind}\n"
    if path:
        yield f"{inspect.cleandoc(section.__doc__ or '')}\n"
    if section.model_fields.keys() == {KIND}:
        return
    yield "| key | type | default | meaning |\n| --- | --- | --- | --- |"
    below: list[tuple[type[BaseModel], str, str]] = []
    for name, field in section.model_fields.items():
        shape = shape_of(field)
        inner = f"{path}.{name}" if path else name
        if shape is None:
            if name != KIND:
                yield f"| `{name}` | {_type(field)} | {_default(field)} | {_one_line(field.description)} |"
            continue
        if isinstance(shape, Variants):
            tables = [(variant, f" with `kind: {k}`") for k, variant in shape.sections.items()]
        else:
            tables = [(shape, "")]
        for variant, k in tables:
            if variant not in shown:
                shown[variant] = f"[`{inner}`](#{_anchor(inner, k)})"
                below.append((variant, inner, k))
        link, described = shown[tables[0][0]], _one_line(field.description)
        meaning = f"{described} See {link}." if described else f"see {link}"
        yield f"| `{name}` | {_section_type(field)} | {_section_default(field, shape)} | {meaning} |"
    yield ""
    for inner_section, inner_path, inner_kind in below:
        yield from _section(inner_section, inner_path, inner_kind, shown)


def _section_type(field: FieldInfo) -> str:
    options = [option for option in _options(field.annotation) if option is not type(None)]
    return "list of sections" if any(get_origin(option) is list for option in options) else "section"


def _section_default(field: FieldInfo, shape: Shape) -> str:
    if isinstance(shape, Variants) and shape.default_kind is not None:
        return f"`kind: {shape.default_kind}`"
    if field.is_required():
        return "required"
    return "" if isinstance(field.default, BaseModel) else _default(field)


def _options(annotation: Any) -> Iterator[Any]:
    """The members of a union, or the annotation alone."""
    if get_origin(annotation) is Annotated:
        yield from _options(get_args(annotation)[0])
    elif get_origin(annotation) in (Union, types.UnionType):
        for option in get_args(annotation):
            yield from _options(option)
    else:
        yield annotation


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
