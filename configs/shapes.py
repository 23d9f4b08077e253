"""What the schema has below a key: a section, a choice between sections by `kind`, or a plain value."""

from __future__ import annotations

import types
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import PurePath
from typing import Annotated, Any, Union, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo

KIND = "kind"


@dataclass(frozen=True, slots=True)
class Variants:
    """A discriminated union: one section for each `kind`."""

    sections: dict[str, type[BaseModel]]
    default_kind: str | None

    def kind_of(self, mapping: dict[str, Any]) -> str | None:
        """The kind that a mapping of trees names, or the default one."""
        named = mapping.get(KIND)
        kind = self.default_kind if named is None else named.value
        return kind if isinstance(kind, str) else None


Shape = type[BaseModel] | Variants | None
"""None: a plain value, or a mapping with free keys."""


def shape_of(field: FieldInfo) -> Shape:
    """The shape of a field's value."""
    sections = [option for option in _options(field.annotation) if _is_section(option)]
    if field.discriminator is None and len(sections) < 2:
        return sections[0] if sections else None
    # In a list of choices the discriminator is the items', which the field does not show.
    assert field.discriminator in (KIND, None), "every union of sections is told apart by `kind`"
    by_kind = {get_args(section.model_fields[KIND].annotation)[0]: section for section in sections}
    default_kind = getattr(field.default, KIND, None) if isinstance(field.default, BaseModel) else None
    return Variants(by_kind, default_kind)


def select(shape: Shape, mapping: dict[str, Any]) -> type[BaseModel] | None:
    """The section that a mapping of trees is written for; None for free keys or an unknown kind."""
    if isinstance(shape, Variants):
        return shape.sections.get(shape.kind_of(mapping) or "")
    return shape


def takes_text(field: FieldInfo) -> bool:
    """Whether the field's value is text or a path, so that a bare `123` may mean the text."""
    options = _options(field.annotation)
    return any(
        isinstance(option, type) and issubclass(option, str | PurePath) for option in options
    ) and not any(option in (int, float, bool) for option in options)


def is_text(field: FieldInfo) -> bool:
    """Whether the field's value is text, a path or null, and nothing else."""
    annotation = field.annotation
    members = get_args(annotation) if get_origin(annotation) in (Union, types.UnionType) else (annotation,)
    plain = [get_args(member)[0] if get_origin(member) is Annotated else member for member in members]
    kinds = [kind for kind in plain if kind is not type(None)]
    return bool(kinds) and all(isinstance(kind, type) and issubclass(kind, str | PurePath) for kind in kinds)


def field_paths(section: type[BaseModel], prefix: str = "") -> Iterator[tuple[str, FieldInfo]]:
    """Every key of the schema below a section, dotted, variants' keys included, in order of declaration."""
    for name, field in section.model_fields.items():
        path = f"{prefix}{name}"
        yield path, field
        shape = shape_of(field)
        if isinstance(shape, Variants):
            for variant in shape.sections.values():
                yield from field_paths(variant, f"{path}.")
        elif shape is not None:
            yield from field_paths(shape, f"{path}.")


def _options(annotation: Any) -> list[Any]:
    """The members of a union, or the annotation alone; Annotated and lists are seen through."""
    if get_origin(annotation) is Annotated:
        return _options(get_args(annotation)[0])
    if get_origin(annotation) is list:
        return _options(get_args(annotation)[0])
    if get_origin(annotation) in (Union, types.UnionType):
        return [option for member in get_args(annotation) for option in _options(member)]
    return [annotation]


def _is_section(option: Any) -> bool:
    return isinstance(option, type) and issubclass(option, BaseModel)
