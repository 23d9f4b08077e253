"""From a function's types and docstring to the JSON schema that a model is shown, and from JSON back to values."""

from __future__ import annotations

import copy
import dataclasses
import enum
import functools
import inspect
import re
import types
import typing
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from decimal import Decimal
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints, is_typeddict

import annotated_types
import typing_extensions
from pydantic import BaseModel, ConfigDict, Field, PydanticUserError, TypeAdapter, ValidationError
from pydantic.errors import PydanticInvalidForJsonSchema
from pydantic.fields import FieldInfo
from pydantic.json_schema import GenerateJsonSchema, JsonSchemaValue

_SCALARS: tuple[Any, ...] = (str, int, bool, type(None), Any)
"""Types whose JSON value is the value, and that have no bounds of their own."""
_NO_JSON: tuple[Any, ...] = (complex, object)
_SIZES = (
    annotated_types.Ge,
    annotated_types.Gt,
    annotated_types.Le,
    annotated_types.Lt,
    annotated_types.MultipleOf,
)
_LENGTHS = (annotated_types.MinLen, annotated_types.MaxLen)
_EXACT_BOUNDS = (*_LENGTHS, annotated_types.Ge, annotated_types.Gt, annotated_types.Le, annotated_types.Lt)
"""Those that JSON Schema and pydantic read alike."""
_CONFIG = ConfigDict(regex_engine="python-re")

Convert = Callable[[Any], Any]
"""From a value that the schema allows to what the function wants. May raise `ValueError`."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TypeSchema:
    """What a model is told of a type, and how its values are made."""

    annotation: Any
    schema: dict[str, Any]
    is_json: bool
    """Whether JSON's own value is the value."""
    convert: Convert | None = None
    """None where there is nothing to convert and nothing that the schema does not say."""


def schema_of_type(annotation: Any, *, where: str) -> TypeSchema:
    """The JSON schema of one annotation.

    Raises:
        ValueError: JSON has no such type.
    """
    annotation = _prepared(annotation)
    refusal = f"{where}: a model cannot be told of type {annotation!r}"
    if annotation in _NO_JSON:
        raise ValueError(f"{refusal}; use types that JSON has, or dataclasses, pydantic models and the like")
    try:
        adapter = _adapter(annotation)
        schema = adapter.json_schema(schema_generator=_Generator)
    except _RefusedTypeError as error:
        raise ValueError(f"{where}: {error}") from error
    except (PydanticUserError, PydanticInvalidForJsonSchema, TypeError) as error:
        reason = str(error).partition("\n")[0]
        raise ValueError(f"{refusal}: {reason}") from error
    schema = _tidied(schema, schema.pop("$defs", {}), where)
    convert: Convert | None = adapter.validate_python
    if is_json := _is_json(annotation):
        convert = functools.partial(_checked, adapter) if _has_floats(annotation) else None
    return TypeSchema(annotation=annotation, schema=schema, is_json=is_json, convert=convert)


def is_exact(annotation: Any) -> bool:
    """Whether strict pydantic, which knows no further members, takes from JSON nothing that the schema forbids.

    Not so, for one, where choices are numbers: it takes `true` for 1. May say no to a type of which it is true.
    """
    if annotation in (*_SCALARS, float, list, dict):
        return True
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Literal:
        return all(type(value) is str for value in arguments)
    if origin is Annotated:
        return is_exact(arguments[0]) and all(map(_is_exact_bound, arguments[1:]))
    if origin in (Union, types.UnionType):
        return all(map(is_exact, arguments)) and (len(arguments) == 2 and type(None) in arguments)
    if origin in (list, dict):
        return all(map(is_exact, arguments))
    if isinstance(annotation, enum.EnumType):
        finds_by_value = annotation._missing_.__func__ is enum.Enum._missing_.__func__  # type: ignore[attr-defined]
        return finds_by_value and all(type(value) is str for value in annotation._value2member_map_)
    if dataclasses.is_dataclass(annotation) and not hasattr(annotation, "__pydantic_validator__"):
        hints = get_type_hints(annotation, include_extras=True)
        return all(field.init and is_exact(hints[field.name]) for field in dataclasses.fields(annotation))
    return False


def _is_exact_bound(item: Any) -> bool:
    if isinstance(item, FieldInfo):
        return item.is_required() and item.alias is None and all(map(_is_exact_bound, item.metadata))
    if isinstance(item, annotated_types.GroupedMetadata):
        return all(map(_is_exact_bound, item))
    return isinstance(item, (str, *_EXACT_BOUNDS))


def field_default(field: FieldInfo) -> Any:
    """The default of a parameter that is written `x: int = Field(3, ge=1)`.

    Raises:
        LookupError: it has none.
    """
    if field.is_required():
        raise LookupError("the field has no default")
    return field.get_default(call_default_factory=True, validated_data={})


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


class _RefusedTypeError(Exception):
    """A type that pydantic knows and that is refused here."""


class _Generator(GenerateJsonSchema):
    """Pydantic's schemas in the few words that a model needs."""

    def enum_schema(self, schema: Any) -> JsonSchemaValue:
        return self._choices([member.value for member in schema["members"]])

    def literal_schema(self, schema: Any) -> JsonSchemaValue:
        return self._choices(
            [value.value if isinstance(value, enum.Enum) else value for value in schema["expected"]]
        )

    def dataclass_schema(self, schema: Any) -> JsonSchemaValue:
        return self._closed(super().dataclass_schema(schema))

    def typed_dict_schema(self, schema: Any) -> JsonSchemaValue:
        return self._closed(super().typed_dict_schema(schema))

    def field_title_should_be_set(self, schema: Any) -> bool:
        del schema
        return False

    def _choices(self, values: list[Any]) -> JsonSchemaValue:
        kinds = {type(value) for value in values if value is not None}
        if len(kinds) > 1 or not kinds <= {str, int, bool}:
            raise _RefusedTypeError(f"the choices must be all strings or all integers, not {values!r}")
        names = {str: "string", int: "integer", bool: "boolean"}
        types = [names[kind] for kind in kinds] + ["null"] * (None in values)
        return {"type": types[0] if len(types) == 1 else types, "enum": values}

    @staticmethod
    def _closed(schema: JsonSchemaValue) -> JsonSchemaValue:
        """An object that has these members and no others."""
        for member in schema.get("properties", {}).values():
            member.pop("default", None)
        schema.setdefault("required", [])
        return {**schema, "additionalProperties": False}


def _adapter(annotation: Any) -> TypeAdapter[Any]:
    kind = get_args(annotation)[0] if get_origin(annotation) is Annotated else annotation
    has_config = dataclasses.is_dataclass(kind) or typing_extensions.is_typeddict(kind)
    if has_config or (isinstance(kind, type) and issubclass(kind, BaseModel)):
        return TypeAdapter(annotation)
    return TypeAdapter(annotation, config=_CONFIG)


def _prepared(annotation: Any) -> Any:
    """The annotation as pydantic reads it: texts in `Annotated` describe, and `TypedDict` is the one that it takes."""
    if is_typeddict(annotation):
        return _own_typed_dict(annotation)
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        metadata = [Field(description=item) if isinstance(item, str) else item for item in arguments[1:]]
        members = get_args(arguments[0])
        if get_origin(arguments[0]) in (Union, types.UnionType) and len(set(members) - {type(None)}) > 1:
            return _bounded_members(members, metadata)
        return Annotated[(_prepared(arguments[0]), *metadata)]  # type: ignore[return-value]
    if origin in (
        typing.Required,
        typing.NotRequired,
        typing_extensions.Required,
        typing_extensions.NotRequired,
    ):
        return origin[_prepared(arguments[0])]
    if origin in (Union, types.UnionType):
        return Union[tuple(map(_prepared, arguments))]  # noqa: UP007  made as the program runs
    if origin in (list, dict, set, frozenset, tuple, Sequence, Mapping):
        prepared = tuple(_prepared(argument) for argument in arguments)
        return origin[prepared] if prepared != arguments else annotation
    return annotation


def _bounded_members(members: Sequence[Any], metadata: Sequence[Any]) -> Any:
    """A choice of types, each with the bounds that it can have: pydantic would tell of those of a choice in no way."""
    bounds: list[Any] = []
    rest: list[Any] = []
    for item in metadata:
        own = list(item.metadata) if isinstance(item, FieldInfo) else [item]
        parts = [
            part
            for one in own
            for part in (one if isinstance(one, annotated_types.GroupedMetadata) else [one])
        ]
        bounds += [part for part in parts if isinstance(part, _SIZES + _LENGTHS)]
        others = [part for part in parts if not isinstance(part, _SIZES + _LENGTHS)]
        if isinstance(item, FieldInfo):
            item = copy.copy(item)
            item.metadata = others
            rest.append(item)
        else:
            rest += others
    bounded = []
    for member in members:
        kind = get_args(member)[0] if get_origin(member) is Annotated else member
        fit = (
            _SIZES
            if kind in (int, float, Decimal)
            else _LENGTHS
            if kind is str or get_origin(kind) or kind is list
            else ()
        )
        own = [bound for bound in bounds if isinstance(bound, fit)]
        bounded.append(Annotated[(_prepared(member), *own)] if own else _prepared(member))
    choice: Any = Union[tuple(bounded)]  # noqa: UP007  made as the program runs
    return Annotated[(choice, *rest)] if rest else choice


@functools.cache
def _own_typed_dict(annotation: Any) -> Any:
    """The same `TypedDict` as `typing_extensions` has it, which is the one that pydantic takes before Python 3.12."""
    hints = get_type_hints(annotation, include_extras=True)
    marks = (typing.Required, typing.NotRequired, typing_extensions.Required, typing_extensions.NotRequired)
    members: dict[str, Any] = {}
    for name, hint in hints.items():
        bare = _prepared(get_args(hint)[0] if get_origin(hint) in marks else hint)
        required = name in annotation.__required_keys__
        members[name] = (typing_extensions.Required if required else typing_extensions.NotRequired)[bare]
    return typing_extensions.TypedDict(annotation.__name__, members)  # type: ignore[operator]


def _is_json(annotation: Any) -> bool:
    """Whether the JSON value is the value: scalars, lists and objects of such, and bounds on them."""
    if annotation in _SCALARS or annotation in (float, list, dict):
        return True
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Literal:
        return not any(isinstance(value, enum.Enum) for value in arguments)
    if origin is Annotated:
        return _is_json(arguments[0]) and all(_only_bounds(item) for item in arguments[1:])
    if origin in (Union, types.UnionType, list):
        return all(map(_is_json, arguments))
    return origin is dict and all(map(_is_json, arguments))


def _only_bounds(item: Any) -> bool:
    """Whether metadata describes or bounds a value, and cannot change it."""
    if isinstance(item, FieldInfo):
        return all(map(_only_bounds, item.metadata))
    return (
        isinstance(item, str | annotated_types.BaseMetadata)
        or type(item).__name__ == "_PydanticGeneralMetadata"
    )


def _has_floats(annotation: Any) -> bool:
    return annotation is float or any(map(_has_floats, get_args(annotation)))


def _checked(adapter: TypeAdapter[Any], value: Any) -> Any:
    """A number as JSON has it, so that 5 stays 5, but none that a float cannot hold."""
    try:
        adapter.validate_python(value)
    except ValidationError as error:
        if error.errors(include_url=False, include_input=False)[0]["type"] == "float_type":
            raise ValueError("a number is too large for a float") from error
        raise
    return value


def _tidied(schema: dict[str, Any], definitions: Mapping[str, Any], where: str) -> dict[str, Any]:
    """Without references and titles, types first, and bare types of a union as one list."""

    def expand(node: Any, open_names: tuple[str, ...] = ()) -> Any:
        if isinstance(node, list):
            return [expand(item, open_names) for item in node]
        if not isinstance(node, dict):
            return node
        if "$ref" in node:
            name = node["$ref"].rsplit("/", 1)[-1]
            if name in open_names:
                title = definitions[name].get("title", name)
                raise ValueError(f"{where}: {title} contains itself, which a tool cannot take")
            rest = {key: value for key, value in node.items() if key != "$ref"}
            return expand({**definitions[name], **rest}, (*open_names, name))
        # `title` as a keyword is pydantic's name for the part; as a property it is a dictionary.
        tidy = {
            key: expand(value, open_names)
            for key, value in node.items()
            if key != "title" or isinstance(value, dict)
        }
        options = tidy.get("anyOf")
        if isinstance(options, list) and all(
            option.keys() == {"type"} and isinstance(option["type"], str) for option in options
        ):
            tidy = {"type": [option["type"] for option in tidy.pop("anyOf")], **tidy}
        kind = tidy.get("type")
        return {"type": kind, **tidy} if isinstance(kind, str | list) else tidy

    return expand(schema)


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
