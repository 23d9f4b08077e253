"""From a type to the JSON schema that a model is shown, and from JSON back to a value of the type."""

from __future__ import annotations

import dataclasses
import enum
import types
import typing
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints, is_typeddict

from polyturn.tools.validation import SchemaValidator

_SCALARS: Mapping[Any, str] = {
    str: "string",
    int: "integer",
    float: "number",
    bool: "boolean",
    type(None): "null",
}
# Attributes of `annotated_types` and pydantic's `Field`, and what JSON Schema calls them.
_CONSTRAINTS: Mapping[str, str] = {
    "ge": "minimum",
    "gt": "exclusiveMinimum",
    "le": "maximum",
    "lt": "exclusiveMaximum",
    "multiple_of": "multipleOf",
    "pattern": "pattern",
}
_LENGTHS: Mapping[str, tuple[str, str]] = {
    "string": ("minLength", "maxLength"),
    "array": ("minItems", "maxItems"),
    "object": ("minProperties", "maxProperties"),
}

Convert = Callable[[Any], Any]
"""From a value that the schema allows to what the function wants. May raise `ValueError`."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TypeSchema:
    """What a model is told of a type; `convert` is None where JSON's own value is the value."""

    schema: dict[str, Any]
    convert: Convert | None = None


def schema_of_type(annotation: Any, *, where: str) -> TypeSchema:
    """The JSON schema of one annotation.

    Raises:
        ValueError: JSON has no such type.
    """
    if annotation in _SCALARS:
        return TypeSchema(schema={"type": _SCALARS[annotation]})
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        inner = schema_of_type(arguments[0], where=where)
        return dataclasses.replace(inner, schema=inner.schema | _constraints(inner.schema, arguments[1:]))
    if origin is Literal:
        return TypeSchema(schema=_enumeration(list(arguments), where))
    if origin in (Union, types.UnionType):
        return _union([schema_of_type(argument, where=where) for argument in arguments])
    if annotation is list or origin in (list, Sequence):
        return _array(arguments, where)
    if annotation is dict or origin in (dict, Mapping):
        return _mapping(arguments, where)
    if isinstance(annotation, type):
        if issubclass(annotation, enum.Enum):
            return TypeSchema(
                schema=_enumeration([member.value for member in annotation], where), convert=annotation
            )
        if is_typeddict(annotation):
            return _typed_dict(annotation, where)
        if dataclasses.is_dataclass(annotation):
            return _dataclass(annotation, where)
        if hasattr(annotation, "model_json_schema"):
            return _pydantic(annotation, where)
    raise ValueError(
        f"{where}: a model cannot be told of type {annotation!r}; use str, int, float, bool, list, dict, "
        "Literal, Enum, Annotated, None, dataclasses, TypedDicts, pydantic models or unions of them"
    )


def plain(value: Any) -> Any:
    """A value as JSON has it: enumerations, dataclasses and pydantic models taken apart.

    Raises:
        TypeError: JSON cannot hold it.
    """
    if isinstance(value, enum.Enum):
        return value.value
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return dataclasses.asdict(value)
    if hasattr(value, "model_dump"):
        return value.model_dump(mode="json")
    if isinstance(value, Mapping):
        return dict(value)
    if isinstance(value, (set, frozenset, tuple)):
        return list(value)
    if hasattr(value, "tolist"):  # of NumPy and torch
        return value.tolist()
    raise TypeError(f"a tool's result must be a text or JSON, not a {type(value).__name__}")


def _constraints(schema: Mapping[str, Any], metadata: Sequence[Any]) -> dict[str, Any]:
    """What the metadata of an `Annotated` adds: a text describes; `annotated_types` and `Field` constrain."""
    found: dict[str, Any] = {}
    for item in metadata:
        if isinstance(item, str):
            found["description"] = item
            continue
        if isinstance(text := getattr(item, "description", None), str):
            found["description"] = text
        for part in (item, *getattr(item, "metadata", ())):
            for name, keyword in _CONSTRAINTS.items():
                if (value := getattr(part, name, None)) is not None:
                    found[keyword] = value
            for name, keyword in zip(
                ("min_length", "max_length"), _LENGTHS.get(schema.get("type", ""), ("", "")), strict=True
            ):
                if (value := getattr(part, name, None)) is not None and keyword:
                    found[keyword] = value
    return found


def _array(arguments: tuple[Any, ...], where: str) -> TypeSchema:
    if not arguments:
        return TypeSchema(schema={"type": "array"})
    item = schema_of_type(arguments[0], where=where)
    convert = item.convert
    return TypeSchema(
        schema={"type": "array", "items": item.schema},
        convert=(lambda values: [convert(value) for value in values]) if convert else None,
    )


def _mapping(arguments: tuple[Any, ...], where: str) -> TypeSchema:
    if not arguments:
        return TypeSchema(schema={"type": "object"})
    if arguments[0] is not str:
        raise ValueError(f"{where}: the keys of a JSON object are strings, so write dict[str, ...]")
    member = schema_of_type(arguments[1], where=where)
    convert = member.convert
    return TypeSchema(
        schema={"type": "object", "additionalProperties": member.schema},
        convert=(lambda values: {key: convert(value) for key, value in values.items()}) if convert else None,
    )


def _union(members: list[TypeSchema]) -> TypeSchema:
    """`{"type": [...]}` where the members are bare types, else `anyOf`. The first member that fits converts."""
    schemas = [member.schema for member in members]
    if all(schema.keys() == {"type"} for schema in schemas):
        return TypeSchema(schema={"type": [schema["type"] for schema in schemas]})
    if not any(member.convert for member in members):
        return TypeSchema(schema={"anyOf": schemas})
    choices = [(SchemaValidator(member.schema), member.convert) for member in members]

    def convert(value: Any) -> Any:
        for validator, of_member in choices:
            if validator.is_valid(value):
                return of_member(value) if of_member else value
        raise AssertionError("a value that no member allows was let through")

    return TypeSchema(schema={"anyOf": schemas}, convert=convert)


def _enumeration(values: list[Any], where: str) -> dict[str, Any]:
    kinds = {type(value) for value in values}
    if len(kinds) != 1 or not kinds <= {str, int, bool}:
        raise ValueError(f"{where}: the choices must be all strings or all integers, not {values!r}")
    return {"type": _SCALARS[kinds.pop()], "enum": values}


def _dataclass(annotation: type, where: str) -> TypeSchema:
    hints = get_type_hints(annotation, include_extras=True)
    fields = [field for field in dataclasses.fields(annotation) if field.init]
    missing = dataclasses.MISSING
    members = {field.name: schema_of_type(hints[field.name], where=where) for field in fields}
    required = [f.name for f in fields if f.default is missing and f.default_factory is missing]
    return _object(members, required, lambda values: annotation(**values))


def _typed_dict(annotation: Any, where: str) -> TypeSchema:
    hints = get_type_hints(annotation, include_extras=True)
    members = {name: schema_of_type(_unqualified(hint), where=where) for name, hint in hints.items()}
    required = [name for name in hints if name in annotation.__required_keys__]
    if not any(member.convert for member in members.values()):
        return TypeSchema(schema=_object(members, required, dict).schema)
    return _object(members, required, dict)


def _unqualified(hint: Any) -> Any:
    """A TypedDict's hint without `Required` or `NotRequired`."""
    return get_args(hint)[0] if get_origin(hint) in (typing.Required, typing.NotRequired) else hint


def _object(members: Mapping[str, TypeSchema], required: list[str], build: Convert) -> TypeSchema:
    schema = {
        "type": "object",
        "properties": {name: member.schema for name, member in members.items()},
        "required": required,
        "additionalProperties": False,
    }
    converters = {name: member.convert for name, member in members.items() if member.convert}

    def convert(values: Any) -> Any:
        return build(
            {name: converters[name](v) if name in converters else v for name, v in values.items()}  # type: ignore[misc]
        )

    return TypeSchema(schema=schema, convert=convert)


def _pydantic(model: Any, where: str) -> TypeSchema:
    """A pydantic model. Its own validators speak through the `ValueError` that pydantic raises."""
    document = model.model_json_schema()
    definitions = document.pop("$defs", {})

    def expand(node: Any, open_names: tuple[str, ...] = ()) -> Any:
        if isinstance(node, list):
            return [expand(item, open_names) for item in node]
        if not isinstance(node, dict):
            return node
        if "$ref" in node:
            name = node["$ref"].rsplit("/", 1)[-1]
            if name in open_names:
                raise ValueError(f"{where}: {model.__name__} contains itself, which a tool cannot take")
            return expand(definitions[name], (*open_names, name))
        # `title` as a keyword is pydantic's name for the part; as a property it is a dictionary.
        return {
            key: expand(value, open_names)
            for key, value in node.items()
            if key != "title" or isinstance(value, dict)
        }

    return TypeSchema(schema=expand(document), convert=model.model_validate)
