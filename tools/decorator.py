"""The tool decorator: a function's signature and docstring become the JSON schema that the model is shown."""

from __future__ import annotations

import inspect
import types
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints, overload

from polyturn.tools.docstrings import read_docstring
from polyturn.tools.types import ToolSpec

_SPEC_ATTRIBUTE = "__polyturn_tool__"
_SCALARS: Mapping[Any, str] = {
    str: "string",
    int: "integer",
    float: "number",
    bool: "boolean",
    type(None): "null",
}

Function = TypeVar("Function", bound=Callable[..., Any])


@dataclass(frozen=True, kw_only=True, slots=True)
class Tool:
    """A spec and the function that answers its calls; the function may be `async`."""

    spec: ToolSpec
    function: Callable[..., Any]

    @property
    def is_async(self) -> bool:
        return inspect.iscoroutinefunction(self.function)


@overload
def tool(function: Function, /) -> Function: ...


@overload
def tool(*, name: str | None = None, description: str | None = None) -> Callable[[Function], Function]: ...


def tool(
    function: Callable[..., Any] | None = None, /, *, name: str | None = None, description: str | None = None
) -> Any:
    """Mark a function or a method as a tool. It stays callable as before.

    Every parameter needs a type: `str`, `int`, `float`, `bool`, `list[T]`, `dict[str, T]`, `Literal`,
    `T | None`, or a union of these. The docstring gives the description; its `Args:` section describes the parameters.

    Raises:
        ValueError: the signature cannot be told to a model.
    """

    def mark(function: Callable[..., Any]) -> Callable[..., Any]:
        setattr(function, _SPEC_ATTRIBUTE, spec_of_function(function, name=name, description=description))
        return function

    return mark if function is None else mark(function)


def as_tool(function: Callable[..., Any]) -> Tool:
    """The tool behind a function or bound method, decorated or not."""
    spec = getattr(function, _SPEC_ATTRIBUTE, None)
    return Tool(spec=spec or spec_of_function(function), function=function)


def tools_of(owner: object) -> Iterator[Tool]:
    """The decorated methods of an object, base classes first and in the order of their definition."""
    names: dict[str, None] = {}
    for base in reversed(type(owner).__mro__):
        names.update(
            (name, None)
            for name, member in vars(base).items()
            if hasattr(_unwrapped(member), _SPEC_ATTRIBUTE)
        )
    for name in names:
        method = getattr(owner, name)
        if hasattr(method, _SPEC_ATTRIBUTE):
            yield as_tool(method)


def spec_of_function(
    function: Callable[..., Any], *, name: str | None = None, description: str | None = None
) -> ToolSpec:
    """The tool spec that signature and docstring of `function` give.

    Raises:
        ValueError: the signature cannot be told to a model.
    """
    title = name or function.__name__
    documented, argument_texts = read_docstring(function.__doc__)
    hints = get_type_hints(function)
    properties: dict[str, Any] = {}
    required: list[str] = []
    for parameter in _parameters(function):
        where = f"tool {title!r}, parameter {parameter.name!r}"
        if parameter.kind not in (parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY):
            raise ValueError(
                f"{where}: a tool takes named arguments only, no *args, **kwargs or positional-only ones"
            )
        if parameter.name not in hints:
            raise ValueError(f"{where} has no type; write for example `{parameter.name}: str`")
        schema = schema_of_type(hints[parameter.name], where=where)
        if text := argument_texts.get(parameter.name):
            schema["description"] = text
        if parameter.default is parameter.empty:
            required.append(parameter.name)
        else:
            schema["default"] = parameter.default
        properties[parameter.name] = schema
    if strays := sorted(set(argument_texts) - set(properties)):
        raise ValueError(f"tool {title!r}: the docstring describes {strays[0]!r}, which is not a parameter")
    parameters = {"type": "object", "properties": properties, "required": required}
    return ToolSpec(
        name=title, description=documented if description is None else description, parameters=parameters
    )


def schema_of_type(annotation: Any, *, where: str) -> dict[str, Any]:
    """The JSON schema of one annotation.

    Raises:
        ValueError: JSON has no such type.
    """
    if annotation in _SCALARS:
        return {"type": _SCALARS[annotation]}
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Literal:
        return _enumeration(list(arguments), where)
    if origin in (Union, types.UnionType):
        return _union([schema_of_type(argument, where=where) for argument in arguments])
    if annotation is list or origin in (list, Sequence):
        return {"type": "array"} | ({"items": schema_of_type(arguments[0], where=where)} if arguments else {})
    if annotation is dict or origin in (dict, Mapping):
        if arguments and arguments[0] is not str:
            raise ValueError(f"{where}: the keys of a JSON object are strings, so write dict[str, ...]")
        additional = {"additionalProperties": schema_of_type(arguments[1], where=where)} if arguments else {}
        return {"type": "object"} | additional
    raise ValueError(
        f"{where}: a model cannot be told of type {annotation!r}; "
        "use str, int, float, bool, list, dict, Literal, None or unions of them"
    )


def _parameters(function: Callable[..., Any]) -> list[inspect.Parameter]:
    """The parameters that the model fills: all but a method's `self`."""
    parameters = list(inspect.signature(function).parameters.values())
    return parameters[1:] if parameters and parameters[0].name == "self" else parameters


def _union(schemas: list[dict[str, Any]]) -> dict[str, Any]:
    """`{"type": [...]}` where the members are bare types, else `anyOf`."""
    if all(schema.keys() == {"type"} for schema in schemas):
        return {"type": [schema["type"] for schema in schemas]}
    return {"anyOf": schemas}


def _enumeration(values: list[Any], where: str) -> dict[str, Any]:
    kinds = {type(value) for value in values}
    if len(kinds) != 1 or not kinds <= {str, int, bool}:
        raise ValueError(f"{where}: the choices must be all strings or all integers, not {values!r}")
    return {"type": _SCALARS[kinds.pop()], "enum": values}


def _unwrapped(member: object) -> object:
    return member.__func__ if isinstance(member, (staticmethod, classmethod)) else member
