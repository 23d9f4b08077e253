"""A set of tools that answers calls. A model's mistake is answered in words that help it mend the call."""

from __future__ import annotations

import difflib
import inspect
import json
import time
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from jsonschema import Draft202012Validator, ValidationError
from jsonschema.validators import extend

from polyturn.tools.decorator import Tool, as_tool
from polyturn.tools.types import ToolCall, ToolError, ToolResult, ToolSpec

# JSON Schema takes 3.0 for an integer; a Python function that wants an int does not.
_Validator = extend(
    Draft202012Validator,
    type_checker=Draft202012Validator.TYPE_CHECKER.redefine(
        "integer", lambda _, value: isinstance(value, int) and not isinstance(value, bool)
    ),
)


class Toolset:
    """Tools by name.

    Raises:
        ValueError: two tools share a name.
    """

    def __init__(self, tools: Iterable[Tool | Callable[..., Any]] = ()) -> None:
        self._tools: dict[str, Tool] = {}
        for item in tools:
            tool = item if isinstance(item, Tool) else as_tool(item)
            if tool.spec.name in self._tools:
                raise ValueError(f"two tools are called {tool.spec.name!r}")
            _Validator.check_schema(dict(tool.spec.parameters))
            self._tools[tool.spec.name] = tool
        self._validators = {
            name: _Validator(dict(tool.spec.parameters)) for name, tool in self._tools.items()
        }

    @property
    def specs(self) -> tuple[ToolSpec, ...]:
        return tuple(tool.spec for tool in self._tools.values())

    def is_async(self, name: str) -> bool:
        """Whether the tool of that name must be awaited; False for a name that no tool has."""
        return name in self._tools and self._tools[name].is_async

    @property
    def has_async(self) -> bool:
        return any(tool.is_async for tool in self._tools.values())

    def call(self, call: ToolCall) -> ToolResult:
        """Answer one call.

        Raises:
            Exception: whatever a tool raises beside `ToolError`: the infrastructure behind it failed.
            RuntimeError: the tool is asynchronous; use `call_async`.
        """
        if complaint := self.complaint(call):
            return ToolResult(call_id=call.id, name=call.name, content=complaint, ok=False)
        if self.is_async(call.name):
            raise RuntimeError(f"tool {call.name!r} is asynchronous: await call_async")
        started = time.perf_counter()
        try:
            content, ok = self._tools[call.name].function(**call.arguments), True
        except ToolError as error:
            content, ok = str(error), False
        return _result(call, content, ok, started)

    async def call_async(self, call: ToolCall) -> ToolResult:
        """Answer one call, awaiting an asynchronous tool; a synchronous one runs where it stands. Raises as `call`."""
        if complaint := self.complaint(call):
            return ToolResult(call_id=call.id, name=call.name, content=complaint, ok=False)
        started = time.perf_counter()
        try:
            content, ok = self._tools[call.name].function(**call.arguments), True
            if inspect.isawaitable(content):
                content = await content
        except ToolError as error:
            content, ok = str(error), False
        return _result(call, content, ok, started)

    def complaint(self, call: ToolCall) -> str | None:
        """What is wrong with a call, for the model to read; None if it can be made."""
        if call.error is not None:
            return call.error
        if call.name not in self._tools:
            return f"There is no tool {call.name!r}{_nearest(call.name, self._tools)}. {self._listing()}"
        arguments, schema = dict(call.arguments), self._tools[call.name].spec.parameters
        properties: Mapping[str, Any] = schema.get("properties", {})
        problems = [] if schema.get("additionalProperties") else _unknown_arguments(arguments, properties)
        known = {name: value for name, value in arguments.items() if name in properties or not problems}
        errors = sorted(
            self._validators[call.name].iter_errors(known), key=lambda error: [str(p) for p in error.path]
        )
        problems += [_describe(error, properties) for error in errors]
        return (
            f"The call of {call.name!r} was not made: {'; '.join(dict.fromkeys(problems))}."
            if problems
            else None
        )

    def _listing(self) -> str:
        return f"The tools are: {', '.join(self._tools)}." if self._tools else "No tools can be called here."


def _result(call: ToolCall, content: Any, ok: bool, started: float) -> ToolResult:
    text = content if isinstance(content, str) else json.dumps(content, ensure_ascii=False)
    return ToolResult(
        call_id=call.id, name=call.name, content=text, ok=ok, seconds=time.perf_counter() - started
    )


def _unknown_arguments(arguments: Mapping[str, Any], properties: Mapping[str, Any]) -> list[str]:
    strays = [name for name in arguments if name not in properties]
    return [f"unknown argument {name!r}{_nearest(name, properties)}" for name in strays]


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
        return f"argument {where!r} must be {_type_name(error.schema)}, not {shown}"
    return f"argument {where!r}: {error.message}"


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


def _nearest(name: str, names: Iterable[str]) -> str:
    matches = difflib.get_close_matches(name, list(names), n=1, cutoff=0.5)
    return f" (did you mean {matches[0]!r}?)" if matches else ""
