"""The tool decorator: a function's signature and docstring become the JSON schema that the model is shown."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, TypeVar, get_type_hints, overload

from polyturn.tools.docstrings import read_docstring
from polyturn.tools.limits import NO_LIMITS, ConcurrencyGate, ToolLimits
from polyturn.tools.schemas import Convert, plain, schema_of_type
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

    @property
    def is_async(self) -> bool:
        return inspect.iscoroutinefunction(self.function)


@dataclass(frozen=True, kw_only=True, slots=True)
class _Mark:
    """What the decorator leaves on a function. Bound methods share it, so the gate too."""

    spec: ToolSpec
    converters: Mapping[str, Convert]
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

    Every parameter needs a type: `str`, `int`, `float`, `bool`, `list[T]`, `dict[str, T]`, `Literal`, `Enum`,
    `Annotated[T, ...]`, `T | None`, a dataclass, `TypedDict` or pydantic model, or a union of these. The docstring
    gives the description; its `Args:` section describes the parameters.

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
        spec, converters = _read_signature(function, name=name, description=description)
        setattr(function, _MARK, _Mark(spec=spec, converters=converters, limits=limits))
        return function

    return mark if function is None else mark(function)


def as_tool(function: Callable[..., Any]) -> Tool:
    """The tool behind a function or bound method, decorated or not."""
    mark: _Mark | None = getattr(function, _MARK, None)
    if mark is None:
        spec, converters = _read_signature(function)
        mark = _Mark(spec=spec, converters=converters)
    return Tool(spec=mark.spec, function=function, limits=mark.limits, converters=mark.converters)


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
    return _read_signature(function, name=name, description=description)[0]


def _read_signature(
    function: Callable[..., Any], *, name: str | None = None, description: str | None = None
) -> tuple[ToolSpec, dict[str, Convert]]:
    title = name or function.__name__
    documented, argument_texts = read_docstring(function.__doc__)
    hints = get_type_hints(function, include_extras=True)
    properties: dict[str, Any] = {}
    required: list[str] = []
    converters: dict[str, Convert] = {}
    for parameter in _parameters(function):
        where = f"tool {title!r}, parameter {parameter.name!r}"
        if parameter.kind not in (parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY):
            raise ValueError(
                f"{where}: a tool takes named arguments only, no *args, **kwargs or positional-only ones"
            )
        if parameter.name not in hints:
            raise ValueError(f"{where} has no type; write for example `{parameter.name}: str`")
        read = schema_of_type(hints[parameter.name], where=where)
        schema = dict(read.schema)
        if text := argument_texts.get(parameter.name):
            schema["description"] = text
        if parameter.default is parameter.empty:
            required.append(parameter.name)
        else:
            schema["default"] = _default(parameter.default)
        properties[parameter.name] = schema
        if read.convert is not None:
            converters[parameter.name] = read.convert
    if strays := sorted(set(argument_texts) - set(properties)):
        raise ValueError(f"tool {title!r}: the docstring describes {strays[0]!r}, which is not a parameter")
    parameters = {"type": "object", "properties": properties, "required": required}
    spec = ToolSpec(
        name=title, description=documented if description is None else description, parameters=parameters
    )
    return spec, converters


def _default(value: Any) -> Any:
    return value if value is None or isinstance(value, (str, int, float, list, dict)) else plain(value)


def _parameters(function: Callable[..., Any]) -> list[inspect.Parameter]:
    """The parameters that the model fills: all but a method's `self`."""
    parameters = list(inspect.signature(function).parameters.values())
    return parameters[1:] if parameters and parameters[0].name == "self" else parameters


def _unwrapped(member: object) -> object:
    return member.__func__ if isinstance(member, (staticmethod, classmethod)) else member
