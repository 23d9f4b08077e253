"""The fields of a client's request: read by name and type, whichever protocol they are of.

What cannot be taken raises `RequestRefused` with a sentence that names the field.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any

from polyturn.agents.sessions.requests import RequestRefused
from polyturn.envs.messages import Message
from polyturn.tools.plain import clean_text, recordable, shown, unfit
from polyturn.tools.types import ToolSpec

MAX_STOPS = 16
LARGEST_NUMBER = 1e30

Body = Mapping[str, Any]
"""A decoded JSON object."""


def refuse_fields(body: Body, reasons: Mapping[str, str]) -> None:
    """Refuse what is asked for by one of these fields, with its reason. Null, false and empty ask for nothing."""
    for name, reason in reasons.items():
        if body.get(name) not in (None, False, "", [], {}):
            raise RequestRefused(f"{name}: {reason}")


def read_object(given: Any, where: str) -> Body:
    """An object."""
    if not isinstance(given, Mapping):
        raise RequestRefused(f"{where} must be an object, not {shown(given)}")
    return given


def read_objects(given: Any, where: str) -> list[tuple[str, Body]]:
    """The objects of a list, each with where it stands; null is an empty list."""
    if given is None:
        return []
    if not isinstance(given, list):
        raise RequestRefused(f"{where} must be a list of objects, not {shown(given)}")
    places = [f"{where}[{index}]" for index in range(len(given))]
    return [(place, read_object(item, place)) for place, item in zip(places, given, strict=True)]


def read_string(body: Body, name: str, where: str = "") -> str:
    """A text that has to be there."""
    value = body.get(name)
    if not isinstance(value, str):
        raise RequestRefused(f"{_path(where, name)} must be a text, not {shown(value)}")
    return clean_text(value)


def read_name(body: Body, name: str, where: str = "") -> str:
    """A text that has to be there and is not empty."""
    value = read_string(body, name, where)
    if not value:
        raise RequestRefused(f"{_path(where, name)} must not be empty")
    return value


def read_number(value: Any, where: str) -> float:
    """A finite number."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) < LARGEST_NUMBER:
        raise RequestRefused(f"{where} must be a number, not {shown(value)}")
    return float(value)


def read_flag(body: Body, name: str) -> bool:
    """A truth value; null and nothing are false."""
    value = body.get(name)
    if value is not None and not isinstance(value, bool):
        raise RequestRefused(f"{name} must be true or false, not {shown(value)}")
    return bool(value)


def read_limits(body: Body, names: Sequence[str]) -> int | None:
    """The smallest of these numbers of tokens; None where none is given."""
    found = [value for name in names if (value := _read_limit(body, name)) is not None]
    return min(found, default=None)


def read_stops(body: Body, name: str) -> tuple[str, ...]:
    """Stop texts: one, a list, or none."""
    given = body.get(name)
    texts = [given] if isinstance(given, str) else given if given is not None else []
    if not isinstance(texts, list) or not all(isinstance(text, str) and text for text in texts):
        raise RequestRefused(
            f"{name} must be a text or a list of texts that are not empty, not {shown(given)}"
        )
    if len(texts) > MAX_STOPS:
        raise RequestRefused(f"{name} has {len(texts)} texts; at most {MAX_STOPS} are taken")
    return tuple(dict.fromkeys(clean_text(text) for text in texts))


def read_text(given: Any, where: str, kinds: Collection[str]) -> str:
    """The text of a content: a text, null, or parts of these kinds, joined by line breaks."""
    if isinstance(given, str):
        return clean_text(given)
    if given is None:
        return ""
    parts = given if isinstance(given, list) else None
    if parts is None:
        raise RequestRefused(f"{where} must be a text or a list of parts, not {shown(given)}")
    return "\n".join(read_part(part, f"{where}[{index}]", kinds) for index, part in enumerate(parts))


def read_part(part: Any, where: str, kinds: Collection[str]) -> str:
    """The text of a part of a content."""
    if isinstance(part, str):
        return clean_text(part)
    fields = read_object(part, where)
    kind = fields.get("type")
    if not isinstance(kind, str) or kind not in kinds:
        raise RequestRefused(
            f"{where} is of type {shown(kind)}; the policy reads texts alone: no images, sounds, files or documents, "
            "by URL or inline"
        )
    return read_string(fields, "text", where)


def read_arguments(given: Any) -> dict[str, Any] | str:
    """The arguments of a call: an object, of JSON text or as it is; text that is no JSON object stays text."""
    value = given
    if isinstance(given, str):
        try:
            value = json.loads(given) if given else {}
        except (ValueError, RecursionError):
            value = None
    if isinstance(value, Mapping):
        return recordable(value)
    return clean_text(given) if isinstance(given, str) else json.dumps(recordable(given))


def call_record(call_id: str, name: str, arguments: Any) -> dict[str, Any]:
    """A call as it stands in a `Message`."""
    function = {"name": name, "arguments": read_arguments(arguments)}
    return {"id": call_id, "type": "function", "function": function}


def read_tool(fields: Body, where: str, *, schema: str) -> ToolSpec:
    """A tool of which `schema` names the field with the JSON Schema of its arguments; without one it takes none."""
    name = read_name(fields, "name", where)
    description = "" if fields.get("description") is None else read_string(fields, "description", where)
    parameters = fields.get(schema)
    if parameters is None:
        parameters = {"type": "object", "properties": {}}
    parameters = read_object(parameters, f"{where}.{schema}")
    if (problem := unfit(parameters, where=f"{where}.{schema}")) is not None:
        raise RequestRefused(problem)
    return ToolSpec(name=name, description=description, parameters=parameters)


def checked_tools(tools: Iterable[ToolSpec]) -> tuple[ToolSpec, ...]:
    """The tools, which have names of their own."""
    found: dict[str, ToolSpec] = {}
    for tool in tools:
        if tool.name in found:
            raise RequestRefused(f"two tools have the name {shown(tool.name)}")
        found[tool.name] = tool
    return tuple(found.values())


def with_names(messages: Iterable[Message]) -> tuple[Message, ...]:
    """The messages; a tool's result that does not say of which tool gets the name of the last call with its id."""
    names: dict[str, str] = {}
    found: list[Message] = []
    for message in messages:
        for call in message.get("tool_calls", ()):
            names[call["id"]] = call["function"]["name"]
        name = names.get(message.get("tool_call_id", ""))
        if message["role"] == "tool" and "name" not in message and name is not None:
            message["name"] = name
        found.append(message)
    return tuple(found)


def _read_limit(body: Body, name: str) -> int | None:
    value = body.get(name)
    if value is None:
        return None
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise RequestRefused(f"{name} must be a whole number from 1 on, not {shown(value)}")
    return value


def _path(where: str, name: str) -> str:
    return f"{where}.{name}" if where else name
