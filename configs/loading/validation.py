"""Pydantic's findings as sentences: where it was written, which key, what was expected and what was given.

What is expected below a key (a section, a choice between sections by `kind`, or a plain value) is read from the schema.
"""

from __future__ import annotations

import types
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import PurePath
from typing import Annotated, Any, Union, get_args, get_origin

from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo

from polyturn.configs.errors import did_you_mean
from polyturn.configs.loading.yaml_tree import Tree, describe

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


_EXPECTED = {
    "bool_type": "true or false",
    "dict_type": "a section (`key: value` lines)",
    "finite_number": "a finite number",
    "float_type": "a number",
    "greater_than": "a value greater than {gt}",
    "greater_than_equal": "a value of at least {ge}",
    "int_from_float": "an integer",
    "int_type": "an integer",
    "less_than": "a value less than {lt}",
    "less_than_equal": "a value of at most {le}",
    "list_type": "a list",
    "literal_error": "one of {expected}",
    "model_attributes_type": "a section (`key: value` lines)",
    "model_type": "a section (`key: value` lines)",
    "path_type": "a path",
    "string_pattern_mismatch": "text that matches {pattern}",
    "string_too_short": "text of at least {min_length} characters",
    "string_type": "text",
    "too_short": "a list of at least {min_length}",
}


def explain(error: ValidationError, tree: Tree, section: type[BaseModel]) -> Iterator[str]:
    """One sentence for each finding."""
    descriptions = {path: field.description for path, field in field_paths(section)}
    for finding in error.errors(include_url=False):
        path, node, origin = _locate(finding["loc"], tree)
        key = ".".join(path)
        context: Mapping[str, Any] = finding.get("ctx", {})
        if finding["type"] == "missing":
            meaning = descriptions.get(key)
            first = f": {meaning.splitlines()[0]}" if meaning else ""
            yield f"{origin}: '{key}' is required{first}"
        elif finding["type"] in ("union_tag_invalid", "union_tag_not_found"):
            yield _explain_kind(key, node, origin, context)
        elif finding["type"] == "value_error":
            about = f"{key}: " if key else ""
            yield f"{origin}: {about}{context['error']}"
        elif finding["type"] in _EXPECTED:
            expected = _EXPECTED[finding["type"]].format_map(context)
            given = describe(finding["input"])
            yield f"{origin}: '{key}' must be {expected}, got {given}{_hint(finding, node)}"
        else:
            yield f"{origin}: '{key}': {finding['msg']}, got {describe(finding['input'])}"


def _explain_kind(key: str, node: Tree, origin: str, context: Mapping[str, Any]) -> str:
    given = node.value.get(KIND) if isinstance(node.value, dict) else None
    known = str(context.get("expected_tags", "")).replace("'", "").split(", ")
    listed = ", ".join(f"'{kind}'" for kind in known if kind)
    if given is None:
        return f"{origin}: '{key}.{KIND}' is required" + (f": one of {listed}" if listed else "")
    return (
        f"{given.origin}: '{key}.{KIND}' must be one of {listed}, got {describe(given.value)}"
        + did_you_mean(str(given.value), known)
    )


def _hint(finding: Mapping[str, Any], node: Tree) -> str:
    if finding["type"] == "string_type" and node.text is not None:
        return f'; write "{node.text}" in quotes'
    if finding["type"] == "literal_error" and isinstance(finding["input"], str):
        return did_you_mean(
            finding["input"],
            str(finding["ctx"]["expected"]).replace("'", "").replace(" or ", ", ").split(", "),
        )
    return ""


def _locate(location: tuple[int | str, ...], tree: Tree) -> tuple[list[str], Tree, str]:
    """The key's path, the deepest tree on it, and where that was written.

    Pydantic puts the kind of a choice between the keys.
    """
    path: list[str] = []
    for part in location:
        value = tree.value
        inner = dict(enumerate(value)) if isinstance(value, list) else value
        if isinstance(inner, dict) and part in inner:
            tree = inner[part]
        elif isinstance(value, dict) and KIND in value and value[KIND].value == part:
            continue
        elif isinstance(part, int) and isinstance(value, dict | str):
            continue  # one item that stands for a list of one
        path.append(str(part))
    return path, tree, tree.origin
