"""Calls that are written as JSON: from the text to `ToolCall`s, or to words that help the model to mend it."""

from __future__ import annotations

import difflib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from polyturn.agents.dialects.repair import repaired, without_fence
from polyturn.tools.types import ToolCall

NAMES = ("name", "function")
ARGUMENTS = ("arguments", "parameters")
"""The keys of a call, the first as it is asked for."""


@dataclass(frozen=True, kw_only=True, slots=True)
class CallReader:
    """Reads what stands between the marks of a call."""

    example: str
    """How a call is written, marks and all; the end of every error."""
    recovers: bool
    """Whether a malformed call is taken for what it plainly means, else the model is told of it."""
    any_spelling: bool = False
    """Whether `function` and `parameters` are as good as `name` and `arguments` even where nothing is recovered."""

    def read(self, text: str, first: int, *, is_closed: bool = True) -> list[ToolCall]:
        """The calls that a text is, at least one; their ids count from `first`. Never raises.

        Args:
            is_closed: Whether the model wrote a mark of the end; without one, brackets that are missing were cut off.
        """
        try:
            return self.calls_of([_decode(text)], first)
        except (ValueError, RecursionError) as error:
            values = self._recovered(text, is_closed)
            if not values:
                return [self.unreadable(first, f"not valid JSON: {_reason(error)}")]
        return as_recovered(self.calls_of(values, first))

    def calls_of(self, values: list[Any], first: int) -> list[ToolCall]:
        """The calls that decoded values are; at least one."""
        items = [item for value in values for item in self._items(value)]
        calls = [self._call(item, number) for number, item in enumerate(items, first)]
        is_listed = len(values) > 1 or any(isinstance(value, list) for value in values)
        return as_recovered(calls) if is_listed and not self.any_spelling else calls

    def call_of(self, name: str, arguments_text: str, number: int) -> ToolCall:
        """The call of a tool whose arguments are a text."""
        is_recovered = False
        try:
            values = [_decode(arguments_text)]
        except (ValueError, RecursionError) as error:
            values, is_recovered = self._recovered(arguments_text, is_closed=True), True
            if not values:
                told = f"its arguments are not valid JSON: {_reason(error)}"
                return self.unreadable(number, told, name=name)
        arguments = values[0]
        if self.recovers and isinstance(arguments, str):
            arguments, is_recovered = _inside(arguments), True
        if len(values) > 1 or not isinstance(arguments, dict):
            told = f"its arguments must be an object, not a {_type_name(arguments)}"
            return self.unreadable(number, told, name=name)
        return ToolCall(id=f"call_{number}", name=name, arguments=arguments, is_recovered=is_recovered)

    def unreadable(self, number: int, reason: str, *, name: str = "") -> ToolCall:
        """A call that was meant, and what is wrong with it."""
        error = f"The tool call could not be read: {reason}. Write {self.example}."
        return ToolCall(id=f"call_{number}", name=name, error=error)

    def _recovered(self, text: str, is_closed: bool) -> list[Any]:
        """What a text that is no JSON plainly means; empty where that is not plain."""
        if not self.recovers:
            return []
        values = repaired(without_fence(text), may_close=is_closed)
        try:
            return [_decode_mended(value) for value in values or ()]
        except (ValueError, RecursionError):
            return []

    def _items(self, value: Any) -> list[Any]:
        several = (
            (self.recovers or self.any_spelling)
            and isinstance(value, list)
            and all(isinstance(one, dict) for one in value)
        )
        return value if several and value else [value]

    def _call(self, call: Any, number: int) -> ToolCall:
        if not isinstance(call, dict):
            return self.unreadable(number, f"a {_type_name(call)} in place of an object")
        name, arguments, is_recovered = call.get("name"), call.get("arguments"), False
        if (self.recovers or self.any_spelling) and not (
            isinstance(name, str) and isinstance(arguments, dict)
        ):
            try:
                call = _respelled(call)
            except ValueError as error:
                return self.unreadable(number, str(error))
            name, arguments, is_recovered = call.get("name"), call.get("arguments"), not self.any_spelling
        if not isinstance(name, str):
            return self.unreadable(number, _missing(call, "name", "a string"))
        if not isinstance(arguments, dict):
            return self.unreadable(number, _missing(call, "arguments", "an object"), name=name)
        if self.recovers and call.get("parameters", arguments) != arguments:
            return self.unreadable(number, "'arguments' and 'parameters' differ", name=name)
        return ToolCall(id=f"call_{number}", name=name, arguments=arguments, is_recovered=is_recovered)


def as_recovered(calls: Sequence[ToolCall]) -> list[ToolCall]:
    """The calls, those that can be made marked as written with a slip."""
    return [replace(call, is_recovered=call.error is None) for call in calls]


def is_call(value: Any) -> bool:
    """Whether a decoded value has the keys of a call, or is a list of such."""
    if isinstance(value, list):
        return bool(value) and all(isinstance(one, dict) and is_call(one) for one in value)
    if not isinstance(value, dict):
        return False
    inner = value.get("function")
    if isinstance(inner, dict) and "name" not in value:
        return is_call(inner)
    return any(key in value for key in NAMES) and any(key in value for key in ARGUMENTS)


def _respelled(call: dict[str, Any]) -> dict[str, Any]:
    """A call under the keys that are asked for. Raises `ValueError` where it says two things."""
    inner = call.get("function")
    if isinstance(inner, dict) and "name" not in call and not any(key in call for key in ARGUMENTS):
        call = inner
    found: dict[str, Any] = {}
    for spellings in (NAMES, ARGUMENTS):
        given = [key for key in spellings if key in call]
        if len(given) > 1 and call[given[0]] != call[given[1]]:
            raise ValueError(f"'{given[0]}' and '{given[1]}' differ")
        if given:
            found[spellings[0]] = call[given[0]]
    if isinstance(found.get("arguments"), str):
        found["arguments"] = _inside(found["arguments"])
    return {**call, **found}


def _inside(text: str) -> Any:
    """The object that is written as JSON in a text; any other text as it is."""
    try:
        inside = _decode(text)
    except (ValueError, RecursionError):
        return text
    return inside if isinstance(inside, dict) else text


def _decode(text: str) -> Any:
    """Strict JSON that can be written down again. Raises `ValueError` or `RecursionError`."""
    value = _READER.decode(text)
    if not text.isascii() or "\\u" in text or text.count("{") + text.count("[") > _FEW_LEVELS:
        # Half of a surrogate pair can be parsed, but not written down again.
        _WRITER.encode(value).encode()
    return value


def _decode_mended(text: str) -> Any:
    value = _MENDED_READER.decode(text)
    _WRITER.encode(value).encode()
    return value


def decode_at(text: str, start: int) -> tuple[Any, int]:
    """The JSON value that begins at a place, and where it ends. Raises `ValueError` or `RecursionError`."""
    value, end = _READER.raw_decode(text, start)
    _WRITER.encode(value).encode()
    return value, end


def can_be_written(value: Any) -> bool:
    """Whether a value is one that JSON has, and that can be written down: what Python has beside it is refused."""
    try:
        return bool(_decode(_WRITER.encode(value)) == value)
    except (ValueError, TypeError, RecursionError):
        return False


def _reason(error: Exception) -> str:
    if isinstance(error, json.JSONDecodeError):
        return f"{error.msg} at line {error.lineno} column {error.colno}"
    return str(error)


def _missing(call: Mapping[str, Any], key: str, kind: str) -> str:
    if key in call:
        return f"'{key}' must be {kind}, not a {_type_name(call[key])}"
    near = difflib.get_close_matches(key, call, n=1, cutoff=0.5)
    return f"'{key}' is missing" + (f"; you wrote {near[0]!r}" if near else "")


def _type_name(value: Any) -> str:
    names = {str: "string", bool: "boolean", int: "number", float: "number", list: "list", dict: "object"}
    return names.get(type(value), "null")


def _refuse_constant(text: str) -> None:
    raise ValueError(f"{text} is no JSON value")


def _finite(text: str) -> float:
    """As `float`. 1e999 can be parsed, but not written down again."""
    value = float(text)
    if math.isinf(value):
        raise ValueError(f"{text} is too large for a number")
    return value


def _without_twins(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object. One that was mended must not say the same thing twice: which of them is meant?"""
    made = dict(pairs)
    if len(made) != len(pairs):
        raise ValueError("a key stands twice in one object")
    return made


_READER = json.JSONDecoder(parse_constant=_refuse_constant, parse_float=_finite)
_MENDED_READER = json.JSONDecoder(
    parse_constant=_refuse_constant, parse_float=_finite, strict=False, object_pairs_hook=_without_twins
)
_WRITER = json.JSONEncoder(ensure_ascii=False, allow_nan=False)
_FEW_LEVELS = 32
