"""The tool decorator: a function's signature and docstring become the JSON schema that the model is shown."""

from __future__ import annotations

import functools
import inspect
import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Annotated, Any, Literal, TypeVar, get_type_hints, overload

from pydantic.fields import FieldInfo
from pydantic_core import PydanticSerializationError, to_jsonable_python

from polyturn.tools.docstrings import read_docstring
from polyturn.tools.limits import NO_LIMITS, ConcurrencyGate, ToolLimits
from polyturn.tools.schemas import Convert, field_default, schema_of_type
from polyturn.tools.types import ToolSpec

_MARK = "__polyturn_tool__"

Function = TypeVar("Function", bound=Callable[..., Any])


@dataclass(frozen=True, kw_only=True, slots=True)
class Tool:
    """A spec and the function that answers its calls; the function may be `async`."""

    spec: ToolSpec
    function: Callable[..., Any]
    limits: ToolLimits = NO_LIMITS
    converters: Mapping[str, Convert] = field(default_factory=dict)
    """By parameter: what makes the function's type of a JSON value. May raise `ValueError` for the model to read."""
    defaults: Mapping[str, FieldInfo] = field(default_factory=dict)
    """By parameter: where the default is not Python's own but stands in a pydantic `Field`."""

    @property
    def is_async(self) -> bool:
        function = self.function
        # The method of an object that can be called; of a function it is no coroutine function.
        return inspect.iscoroutinefunction(function) or inspect.iscoroutinefunction(
            getattr(function, "__call__", None)  # noqa: B004
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class _Mark:
    """What the decorator leaves on a function. Bound methods share it, so the gate too."""

    spec: ToolSpec
    converters: Mapping[str, Convert]
    defaults: Mapping[str, FieldInfo]
    limits: ToolLimits = NO_LIMITS


@overload
def tool(function: Function, /) -> Function: ...


@overload
def tool(
    *,
    name: str | None = None,
    description: str | None = None,
    timeout_s: float | None = None,
    max_output_chars: int | None = None,
    truncate: Literal["middle", "end"] = "middle",
    max_concurrency: int | ConcurrencyGate | None = None,
    cost: float | Callable[[Mapping[str, Any]], float] = 0.0,
) -> Callable[[Function], Function]: ...


def tool(
    function: Callable[..., Any] | None = None,
    /,
    *,
    name: str | None = None,
    description: str | None = None,
    timeout_s: float | None = None,
    max_output_chars: int | None = None,
    truncate: Literal["middle", "end"] = "middle",
    max_concurrency: int | ConcurrencyGate | None = None,
    cost: float | Callable[[Mapping[str, Any]], float] = 0.0,
) -> Any:
    """Mark a function or a method as a tool. It stays callable as before.

    Every parameter needs a type that pydantic can read from JSON: `str`, `int`, `float`, `bool`, `list[T]`,
    `dict[str, T]`, tuples, sets, dates, `Literal`, `Enum`, `Annotated[T, ...]`, `T | None`, a dataclass, `TypedDict` or
    pydantic model, or a union of these. The docstring gives the description; its `Args:` section describes the
    parameters.

    Args:
        name: Takes the place of the function's name.
        description: Takes the place of the docstring's.
        timeout_s: Seconds for one call; then the model is told. An `async` tool is cancelled. A thread cannot be
            killed: the call of any other tool is given up, and its thread goes on until the function returns.
        max_output_chars: A longer result is cut, and says so.
        truncate: Where: in the `middle`, or at the `end`.
        max_concurrency: Calls at once in the whole process, over all episodes; a gate to share slots among tools.
        cost: Of one call, for the metrics: a number, or a function of the arguments.

    Raises:
        ValueError: the signature cannot be told to a model, or a limit that cannot be.
    """
    gate = ConcurrencyGate(max_concurrency) if isinstance(max_concurrency, int) else max_concurrency
    limits = ToolLimits(
        timeout_s=timeout_s, max_output_chars=max_output_chars, truncate=truncate, gate=gate, cost=cost
    )

    def mark(function: Callable[..., Any]) -> Callable[..., Any]:
        setattr(function, _MARK, replace(_read_signature(function, name, description), limits=limits))
        return function

    return mark if function is None else mark(function)


def as_tool(function: Callable[..., Any]) -> Tool:
    """The tool behind a function or bound method, decorated or not."""
    mark: _Mark = getattr(function, _MARK, None) or _read_signature(function)
    return Tool(
        spec=mark.spec,
        function=function,
        limits=mark.limits,
        converters=mark.converters,
        defaults=mark.defaults,
    )


def tools_of(owner: object) -> Iterator[Tool]:
    """The decorated methods of an object, base classes first and in the order of their definition.

    Of a class they are unbound: good for their specs.
    """
    names: dict[str, None] = {}
    for base in reversed((owner if isinstance(owner, type) else type(owner)).__mro__):
        names.update(
            (name, None) for name, member in vars(base).items() if hasattr(_unwrapped(member), _MARK)
        )
    for name in names:
        method = getattr(owner, name)
        if hasattr(method, _MARK):
            yield as_tool(method)


def spec_of_function(
    function: Callable[..., Any], *, name: str | None = None, description: str | None = None
) -> ToolSpec:
    """The tool spec that signature and docstring of `function` give.

    Raises:
        ValueError: the signature cannot be told to a model.
    """
    return _read_signature(function, name, description).spec


def _read_signature(
    function: Callable[..., Any], name: str | None = None, description: str | None = None
) -> _Mark:
    plain_function, bound = _inner(function)
    title = name or plain_function.__qualname__.removesuffix(".__call__").rpartition(".")[2]
    documented, argument_texts = read_docstring(plain_function.__doc__ or function.__doc__)
    try:
        hints = get_type_hints(plain_function, include_extras=True)
    except (NameError, TypeError) as error:
        raise ValueError(f"tool {title!r}: its types cannot be read: {error}") from error
    properties: dict[str, Any] = {}
    required: list[str] = []
    converters: dict[str, Convert] = {}
    defaults: dict[str, FieldInfo] = {}
    for parameter in _parameters(function):
        if parameter.name in bound:
            continue
        where = f"tool {title!r}, parameter {parameter.name!r}"
        if parameter.kind not in (parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY):
            raise ValueError(
                f"{where}: a tool takes named arguments only, no *args, **kwargs or positional-only ones"
            )
        if parameter.name not in hints:
            raise ValueError(f"{where} has no type; write for example `{parameter.name}: str`")
        default = parameter.default
        annotation = hints[parameter.name]
        if isinstance(default, FieldInfo):
            defaults[parameter.name] = default
            annotation = Annotated[annotation, default]
            default = parameter.empty if default.is_required() else field_default(default)
        read = schema_of_type(annotation, where=where)
        schema = {key: value for key, value in read.schema.items() if key != "default"}
        if text := argument_texts.get(parameter.name):
            schema["description"] = text
        if default is parameter.empty:
            required.append(parameter.name)
        else:
            schema |= _shown_default(default)
        properties[parameter.name] = schema
        if read.convert is not None:
            converters[parameter.name] = read.convert
    if strays := sorted(set(argument_texts) - set(properties) - bound):
        raise ValueError(f"tool {title!r}: the docstring describes {strays[0]!r}, which is not a parameter")
    parameters = {"type": "object", "properties": properties, "required": required}
    spec = ToolSpec(
        name=title, description=documented if description is None else description, parameters=parameters
    )
    return _Mark(spec=spec, converters=converters, defaults=defaults)


def _inner(function: Callable[..., Any]) -> tuple[Any, frozenset[str]]:
    """The function that has name, types and docstring, and the arguments that are given to it already."""
    bound: set[str] = set()
    while isinstance(function, functools.partial):
        names = [p.name for p in inspect.signature(function.func).parameters.values()]
        bound |= {*names[: len(function.args)], *function.keywords}
        function = function.func
    if not callable(function):
        raise ValueError(f"a tool is a function, not {function!r:.200}")
    if not inspect.isroutine(function) and not isinstance(function, type):
        return type(function).__call__, frozenset(bound)  # type: ignore[attr-defined]
    return function, frozenset(bound)


def _shown_default(value: Any) -> dict[str, Any]:
    """The default as the model is shown it; nothing of one that JSON cannot hold, such as a mark for "not given"."""
    try:
        shown = to_jsonable_python(value)
        json.dumps(shown, allow_nan=False)
    except (ValueError, TypeError, RecursionError, PydanticSerializationError):
        return {}
    return {"default": shown}


def _parameters(function: Callable[..., Any]) -> list[inspect.Parameter]:
    """The parameters that the model fills: all but a method's `self`."""
    try:
        parameters = list(inspect.signature(function).parameters.values())
    except (TypeError, ValueError) as error:
        raise ValueError(f"a tool's parameters cannot be read: {error}") from error
    return parameters[1:] if parameters and parameters[0].name == "self" else parameters


def _unwrapped(member: object) -> object:
    return member.__func__ if isinstance(member, (staticmethod, classmethod)) else member
