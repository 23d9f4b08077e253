"""From a model's arguments to the values that a function wants, or to words that help the model mend its call.

What the types of a function take is pydantic's to say. A JSON schema is asked where somebody else wrote it, and where a
call is wrong, for the words.
"""

from __future__ import annotations

import difflib
import functools
import json
from collections.abc import Collection, Iterable, Mapping
from typing import Any

import orjson
import pydantic
import referencing
import referencing.exceptions
import typing_extensions
from jsonschema import Draft202012Validator, SchemaError, ValidationError
from jsonschema.validators import extend
from pydantic import TypeAdapter
from pydantic.fields import FieldInfo
from referencing.jsonschema import DRAFT202012

from polyturn.tools.plain import shown
from polyturn.tools.schemas import TypeSchema, field_default, is_exact

# JSON Schema takes 3.0 for an integer; a Python function that wants an int does not.
_Validator = extend(
    Draft202012Validator,
    type_checker=Draft202012Validator.TYPE_CHECKER.redefine(
        "integer", lambda _, value: isinstance(value, int) and not isinstance(value, bool)
    ),
)
_EXACT_TYPES: Mapping[str, frozenset[type]] = {
    "string": frozenset({str}),
    "integer": frozenset({int}),
    "number": frozenset({int, float}),
    "boolean": frozenset({bool}),
    "null": frozenset({type(None)}),
}
MAX_PROBLEMS = 8
"""The model is told of so many mistakes in one call."""
MAX_PROBLEM_CHARS = 400
_PLAIN_KEYWORDS = frozenset(("type", "description", "default", "title"))


class ParameterTypes:
    """The types of a function's parameters: they make its values of a model's arguments."""

    def __init__(
        self,
        types: Mapping[str, TypeSchema],
        *,
        required: Collection[str],
        defaults: Mapping[str, FieldInfo],
    ) -> None:
        """
        Args:
            types: By parameter.
            required: Those without a default.
            defaults: Where the default is not Python's own but stands in a pydantic `Field`.
        """
        self._types, self._required, self._defaults = types, required, defaults
        self._converters = {name: kind.convert for name, kind in types.items() if kind.convert is not None}
        self._changed = frozenset(name for name, kind in types.items() if not kind.is_json)

    @property
    def are_plain(self) -> bool:
        """Whether a model's arguments are the values."""
        return not self._converters and not self._defaults

    def read(self, arguments: Mapping[str, Any]) -> dict[str, Any] | None:
        """The values of arguments that are right beyond doubt; None where the schema has to be asked."""
        if self._adapter is None:
            return None
        try:
            values = self._adapter.validate_json(orjson.dumps(arguments), strict=True, extra="forbid")
        except (ValueError, TypeError):  # also integers that orjson does not take
            return None
        return {name: values[name] if name in self._changed else arguments[name] for name in arguments}

    @functools.cached_property
    def _adapter(self) -> TypeAdapter[Any] | None:
        """All parameters as one type, where pydantic takes of it what the schema allows and nothing else."""
        if self._defaults or not all(is_exact(kind.annotation) for kind in self._types.values()):
            return None
        members: dict[str, Any] = {}
        for name, kind in self._types.items():
            need = typing_extensions.Required if name in self._required else typing_extensions.NotRequired
            members[name] = need[kind.annotation]
        return TypeAdapter(typing_extensions.TypedDict("Arguments", members))  # type: ignore[operator]

    def convert(self, arguments: Mapping[str, Any]) -> tuple[dict[str, Any], list[str]]:
        """The values of arguments that the schema allows, and what a type's own checks say of them."""
        absent = {name: field for name, field in self._defaults.items() if name not in arguments}
        values = {**arguments, **{name: field_default(field) for name, field in absent.items()}}
        problems: list[str] = []
        for name, convert in self._converters.items():
            if name not in arguments:
                continue
            try:
                values[name] = convert(arguments[name])
            except ValueError as error:
                problems += [f"argument {name!r}: {text}" for text in _texts(error)]
        return values, problems


class ArgumentChecker:
    """Checks and converts the arguments of one tool.

    Raises:
        ValueError: `parameters` are no JSON schema.
    """

    def __init__(self, name: str, parameters: Mapping[str, Any], types: ParameterTypes | None = None) -> None:
        """`types` are None where the schema was written by somebody else: it is checked, and its values are plain."""
        self._name = name
        self._schema = parameters
        self._types = types
        self._quick = _exact_types(parameters) if types is None or types.are_plain else None
        self._required = frozenset(parameters.get("required", ()))
        if types is None:
            _ = self._validator  # a schema of somebody else may be none

    @functools.cached_property
    def _validator(self) -> Any:
        return _compile(json.dumps(self._schema, sort_keys=True))

    def read(self, arguments: Mapping[str, Any]) -> tuple[Mapping[str, Any], str | None]:
        """The values for the function, and what is wrong with the arguments, for the model to read, or None."""
        if self._quick is not None and self._plainly_right(arguments, self._quick):
            return arguments, None
        if self._types is not None and (values := self._types.read(arguments)) is not None:
            return values, None
        complaint = self.complaint(arguments)
        if complaint is not None or self._types is None:
            return arguments, complaint
        values, problems = self._types.convert(arguments)
        return values, not_made(self._name, listed(problems)) if problems else None

    def complaint(self, arguments: Mapping[str, Any]) -> str | None:
        """What the schema says is wrong with the arguments, for the model to read; None if the call can be made."""
        if self._quick is not None and self._plainly_right(arguments, self._quick):
            return None
        properties: Mapping[str, Any] = self._schema.get("properties", {})
        takes_others = self._schema.get("additionalProperties")
        problems = [] if takes_others else _unknown_arguments(arguments, properties)
        known = {name: value for name, value in arguments.items() if name in properties or not problems}
        errors = sorted(
            self._validator.iter_errors(known), key=lambda error: [str(part) for part in error.path]
        )
        problems += [_describe(error, properties) for error in errors]
        return not_made(self._name, listed(problems)) if problems else None

    def _plainly_right(self, arguments: Mapping[str, Any], types: Mapping[str, frozenset[type]]) -> bool:
        """Whether every argument is known and of the very type, without asking the validator."""
        for name, value in arguments.items():
            if name not in types or type(value) not in types[name]:
                return False
        return self._required <= arguments.keys()


def not_made(name: str, problem: str) -> str:
    """The answer to a call whose arguments are wrong."""
    return f"The call of {name!r} was not made: {problem}."


def listed(problems: Iterable[str]) -> str:
    """Problems in one line, each once and none too long, whatever the model wrote."""
    different = list(dict.fromkeys(problems))
    more = f"; and {len(different) - MAX_PROBLEMS:,} more" if len(different) > MAX_PROBLEMS else ""
    return "; ".join(_cut(problem) for problem in different[:MAX_PROBLEMS]) + more


def _cut(text: str) -> str:
    return text if len(text) <= MAX_PROBLEM_CHARS else f"{text[:MAX_PROBLEM_CHARS]}..."


def nearest(name: str, names: Iterable[str]) -> str:
    """` (did you mean 'x'?)`, or nothing."""
    matches = difflib.get_close_matches(name[:80], list(names), n=1, cutoff=0.5)
    return f" (did you mean {matches[0]!r}?)" if matches else ""


@functools.lru_cache(maxsize=4096)
def _compile(document: str) -> Any:
    schema = json.loads(document)
    try:
        _Validator.check_schema(schema)
    except SchemaError as error:
        raise ValueError(f"the parameters of a tool are no JSON schema: {error.message}") from error
    _check_references(schema, schema)
    # A registry that fetches nothing: a schema of somebody else must not choose a URL that is read here.
    return _Validator(schema, registry=referencing.Registry())


def _check_references(node: Any, schema: Mapping[str, Any]) -> None:
    """Raise `ValueError` for a reference that leads out of the schema, or to nothing in it."""
    if isinstance(node, list):
        for item in node:
            _check_references(item, schema)
    if not isinstance(node, dict):
        return
    for key, value in node.items():
        if key not in ("$ref", "$dynamicRef") or not isinstance(value, str):
            _check_references(value, schema)
            continue
        if not value.startswith("#"):
            raise ValueError(
                f"the parameters of a tool refer to {value[:200]!r}: only what stands in the schema itself is read"
            )
        root = referencing.Resource.from_contents(schema, default_specification=DRAFT202012)
        try:
            referencing.Registry().with_resource("", root).resolver().lookup(value)
        except referencing.exceptions.Unresolvable as error:
            raise ValueError(
                f"the parameters of a tool refer to {value[:200]!r}, which is not in their schema"
            ) from error


def _exact_types(parameters: Mapping[str, Any]) -> dict[str, frozenset[type]] | None:
    """The Python types of each argument where the schema says no more than types; else None."""
    if not parameters.keys() <= {"type", "properties", "required", "additionalProperties", "title"}:
        return None
    types: dict[str, frozenset[type]] = {}
    for name, schema in parameters.get("properties", {}).items():
        if not isinstance(schema, Mapping) or not schema.keys() <= _PLAIN_KEYWORDS or "type" not in schema:
            return None
        kinds = schema["type"] if isinstance(schema["type"], list) else [schema["type"]]
        if not set(kinds) <= _EXACT_TYPES.keys():
            return None
        types[name] = frozenset().union(*(_EXACT_TYPES[kind] for kind in kinds))
    return types


def _unknown_arguments(arguments: Mapping[str, Any], properties: Mapping[str, Any]) -> list[str]:
    strays = [name for name in arguments if name not in properties]
    return [f"unknown argument {shown(name)}{nearest(name, properties)}" for name in strays]


def _describe(error: ValidationError, properties: Mapping[str, Any]) -> str:
    """One problem that validation found, in the words of the call."""
    if error.validator == "required" and not error.path:
        missing = [name for name in error.validator_value if name not in error.instance]
        named = ", ".join(f"{name!r} ({_type_name(properties.get(name, {}))})" for name in missing)
        return f"missing argument{'s' if len(missing) > 1 else ''} {named}"
    where = "".join(
        f"[{part}]" if isinstance(part, int) else f".{part}" for part in error.absolute_path
    ).lstrip(".")
    value = json.dumps(error.instance, ensure_ascii=False, default=str)
    shown = value if len(value) <= 80 else f"{value[:77]}..."
    if error.validator == "type":
        return f"argument {where!r} must be {_type_name(error.schema)}, not {shown}"
    if error.validator == "enum":
        choices = ", ".join(json.dumps(choice) for choice in error.validator_value)
        return f"argument {where!r} must be one of {choices}, not {shown}"
    if error.validator == "anyOf":
        if meant := _meant(error):
            return "; ".join(_describe(part, properties) for part in meant)
        return f"argument {where!r} must be {_type_name(error.schema)}, not {shown}"
    return f"argument {where!r}: {error.message}"


def _meant(error: ValidationError) -> list[ValidationError]:
    """What is wrong under the one choice of an `anyOf` whose type is right; empty if that is not one choice."""
    by_choice: dict[Any, list[ValidationError]] = {}
    for part in error.context or ():
        by_choice.setdefault(part.schema_path[0], []).append(part)
    fitting = [
        parts
        for parts in by_choice.values()
        if not any(part.validator == "type" and not part.path for part in parts)
    ]
    return fitting[0] if len(fitting) == 1 else []


def _type_name(schema: Any) -> str:
    """A schema in a few words: `integer`, `array of string`, `string or null`."""
    if not isinstance(schema, Mapping):
        return "something else"
    if "anyOf" in schema:
        return " or ".join(_type_name(option) for option in schema["anyOf"])
    if "enum" in schema:
        return "one of " + ", ".join(json.dumps(choice) for choice in schema["enum"])
    kind = schema.get("type", "any type")
    if kind == "array" and "items" in schema:
        return f"array of {_type_name(schema['items'])}"
    return kind if isinstance(kind, str) else " or ".join(kind)


def _texts(error: ValueError) -> list[str]:
    """One line for each problem; pydantic's errors have a list of them."""
    if not isinstance(error, pydantic.ValidationError):
        return [str(error)]
    texts = []
    for detail in error.errors(include_url=False, include_input=False):
        raised = detail.get("ctx", {}).get("error")
        if detail["loc"] or raised is None:
            texts.append(
                f"{'.'.join(str(part) for part in detail['loc'])}: {detail['msg']}".removeprefix(": ")
            )
        else:  # of a check of the whole value, in its author's words
            texts.append(str(raised))
    return texts
