"""What a tool is: a function with a spec, what a call of it may cost, and the state that it keeps for one episode."""

from __future__ import annotations

import asyncio
import functools
import inspect
import json
import threading
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Annotated, Any, Literal, TypeVar, get_type_hints, overload

from pydantic.fields import FieldInfo
from pydantic_core import PydanticSerializationError, to_jsonable_python

from polyturn.tools.arguments import ParameterTypes
from polyturn.tools.plain import as_number
from polyturn.tools.schemas import TypeSchema, field_default, read_docstring, schema_of_type
from polyturn.tools.types import ToolSpec

if TYPE_CHECKING:
    import numpy as np


class StatefulTool:
    """A class of tools whose instance lives for one episode.

        class Notebook(StatefulTool):
            def __init__(self, size: int = 10) -> None:
                self.size, self.pages = size, []

            @tool
            def write(self, text: str) -> str:
                "Write a page."
                if len(self.pages) == self.size:
                    raise ToolError("the notebook is full")
                self.pages.append(text)
                return f"page {len(self.pages)}"

        MyEnv(tools=[Notebook])                 # or Notebook.using(size=3)

    The environment makes an instance at every reset and calls `setup`; it calls `close` at the next reset, or when it
    is closed itself. `env.state_of(Notebook)` is the instance of the episode, for the grade. The class, not an
    instance, is what environments are given, so episodes never share one. `setup` and `close` are plain functions;
    an exception in them is an infrastructure fault.
    """

    def setup(self, task: Any, rng: np.random.Generator) -> None:
        """Prepare for an episode of `task`; draw random numbers from `rng` only."""

    def close(self) -> None:
        """Free what the instance holds; also called after a `setup` that failed."""

    @classmethod
    def using(cls, **options: Any) -> StateFactory:
        """The class with options for its constructor, to be given to an environment."""
        return StateFactory(cls, options)


@dataclass(frozen=True, slots=True)
class StateFactory:
    """Makes instances of one `StatefulTool` class with given options.

    Raises:
        ValueError: options that its constructor does not take, or lacks.
    """

    state_class: type[StatefulTool]
    options: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        try:
            inspect.signature(self.state_class).bind(**self.options)
        except TypeError as error:
            raise ValueError(
                f"{self.state_class.__name__} cannot be made with these options: {error}"
            ) from error

    def __call__(self) -> StatefulTool:
        return self.state_class(**self.options)


def as_state_factory(item: object) -> StateFactory | None:
    """The factory behind a `StatefulTool` class or `using(...)`; None for anything else."""
    if isinstance(item, StateFactory):
        return item
    if isinstance(item, type) and issubclass(item, StatefulTool):
        return StateFactory(item)
    return None


Value = TypeVar("Value")

MAX_RESULT_CHARS = 32_768
"""What the model is shown of the result of a tool that sets no limit of its own."""


class SlotsExhausted(RuntimeError):
    """Every slot of a tool is held by a call that was given up and never returned. Infrastructure, not the model."""


class OutOfTime(Exception):
    """What the policy may take for its tool calls is over, and one of them has not returned."""


class ConcurrencyGate:
    """At most `num_slots` calls at once, over all threads and event loops of the process; first come, first served.

    A thread cannot be killed, so a call that was given up keeps its slot until it really ends. When all slots are
    kept that way, those who wait and those who come get `SlotsExhausted` instead of waiting for ever.
    """

    def __init__(self, num_slots: int) -> None:
        """
        Raises:
            ValueError: `num_slots` below 1.
        """
        if num_slots < 1:
            raise ValueError(f"a tool needs at least one slot, not {num_slots}")
        self.num_slots = num_slots
        self._lock = threading.Lock()
        self._num_free = num_slots
        self._num_given_up = 0
        self._waiting: deque[Future[None]] = deque()

    @property
    def num_running(self) -> int:
        """Slots that are taken."""
        return self.num_slots - self._num_free

    def acquire(self) -> None:
        """Take a slot; blocks the thread until there is one."""
        ticket = self._ticket()
        if ticket is not None:
            ticket.result()

    async def acquire_async(self) -> None:
        """Take a slot; waits on the event loop that runs."""
        ticket = self._ticket()
        if ticket is None:
            return
        try:
            await asyncio.wrap_future(ticket)
        except asyncio.CancelledError:
            # Granted in the very moment of the cancellation: nobody will use it.
            if not ticket.cancel() and ticket.exception() is None:
                self.release()
            raise

    def release(self, *, given_up: bool = False) -> None:
        """Give a slot back; `given_up` says that the call had been marked so."""
        with self._lock:
            self._num_given_up -= given_up
            while self._waiting:
                ticket = self._waiting.popleft()
                if ticket.set_running_or_notify_cancel():
                    ticket.set_result(None)
                    return
            self._num_free += 1

    def give_up(self) -> None:
        """Mark one running call as given up: it keeps its slot until `release(given_up=True)`."""
        with self._lock:
            self._num_given_up += 1
            if self._num_given_up < self.num_slots:
                return
            waiting, self._waiting = self._waiting, deque()
            for ticket in waiting:
                if ticket.set_running_or_notify_cancel():
                    ticket.set_exception(self._exhausted())

    def _ticket(self) -> Future[None] | None:
        """None where a slot was free, else what to wait for."""
        with self._lock:
            if self._num_given_up >= self.num_slots:
                raise self._exhausted()
            if self._num_free > 0:
                self._num_free -= 1
                return None
            ticket: Future[None] = Future()
            self._waiting.append(ticket)
            return ticket

    def _exhausted(self) -> SlotsExhausted:
        return SlotsExhausted(f"all {self.num_slots} slots are held by calls that never returned")


@dataclass(frozen=True, kw_only=True, slots=True)
class ToolLimits:
    """The limits and the price of one tool, as given to `@tool`."""

    timeout_s: float | None = None
    """Seconds for one call, without the wait for a slot. None: as long as it takes."""
    max_output_chars: int | None = None
    """Characters of a result that the model is shown. None: as many as of any tool."""
    truncate: Literal["middle", "end"] = "middle"
    """Where a longer result is cut."""
    gate: ConcurrencyGate | None = None
    """How many calls run at once. Tools that share a gate share its slots."""
    cost: float | Callable[[Mapping[str, Any]], float] = 0.0
    """What a call costs, in a unit of the author's: a number, or a function of the arguments."""

    def __post_init__(self) -> None:
        if self.timeout_s is not None and not self.timeout_s > 0:
            raise ValueError(f"timeout_s must be above 0, not {self.timeout_s}")
        if self.max_output_chars is not None and self.max_output_chars < 1:
            raise ValueError(f"max_output_chars must be at least 1, not {self.max_output_chars}")
        if self.truncate not in ("middle", "end"):
            raise ValueError(f"truncate must be 'middle' or 'end', not {self.truncate!r}")

    def cost_of(self, arguments: Mapping[str, Any]) -> float:
        """The price of one call. Raises `ValueError` where it is no finite number."""
        try:
            return as_number(self.cost(arguments) if callable(self.cost) else self.cost)
        except ValueError as error:
            raise ValueError(f"the cost of a call: {error}") from error

    def shorten(self, text: str, default: int | None = None) -> tuple[str, bool]:
        """The text as the model is shown it, and whether it was cut; `default` is the limit where there is none.

        shorten("abcdefghij") at 4 characters, middle: "ab\\n... [truncated: 4 of 10 characters shown] ...\\nij"
        """
        limit = self.max_output_chars or default
        if limit is None or len(text) <= limit:
            return text, False
        notice = f"... [truncated: {limit:,} of {len(text):,} characters shown]"
        if self.truncate == "end":
            return f"{text[:limit]}\n{notice}", True
        tail = limit // 2
        return f"{text[: limit - tail]}\n{notice} ...\n{text[len(text) - tail :] if tail else ''}", True


NO_LIMITS = ToolLimits()


_MARK = "__polyturn_tool__"

Function = TypeVar("Function", bound=Callable[..., Any])


@dataclass(frozen=True, kw_only=True, slots=True)
class Tool:
    """A spec and the function that answers its calls; the function may be `async`."""

    spec: ToolSpec
    function: Callable[..., Any]
    limits: ToolLimits = NO_LIMITS
    types: ParameterTypes | None = None
    """What makes the function's values of a model's arguments; None where those are the values."""

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
    types: ParameterTypes
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
    return Tool(spec=mark.spec, function=function, limits=mark.limits, types=mark.types)


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
    types: dict[str, TypeSchema] = {}
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
        types[parameter.name] = read
    if strays := sorted(set(argument_texts) - set(properties) - bound):
        raise ValueError(f"tool {title!r}: the docstring describes {strays[0]!r}, which is not a parameter")
    parameters = {"type": "object", "properties": properties, "required": required}
    spec = ToolSpec(
        name=title, description=documented if description is None else description, parameters=parameters
    )
    return _Mark(spec=spec, types=ParameterTypes(types, required=required, defaults=defaults))


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
