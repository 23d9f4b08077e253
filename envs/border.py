"""What the code and the files of an environment hand over, coerced or refused as it enters.

Every function raises `ValueError` with what is wrong; whoever calls it says whose value it was.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, get_args

from polyturn.envs.messages import Message, Observation, Role
from polyturn.tools.plain import MAX_SIZE, as_number, clean_text, recordable, shown
from polyturn.tools.types import ToolResult, ToolSpec

ROLES = frozenset(get_args(Role))
_TEXT_KEYS = frozenset(("tool_call_id", "name"))
_FLAT_KEYS = frozenset(("role", "content", *_TEXT_KEYS))
_NUMBERS = ("reward_parts", "metrics", "role_rewards")
_TEXTS = ("role", "anchor", "stop_reason", "task_id", "given_answer")
_OBJECTS: Mapping[str, type] = {"tools": ToolSpec, "tool_results": ToolResult}


PARQUET = (".parquet", ".pq")
"""What the name of a Parquet file ends in; all others are JSONL."""


def read_rows(
    path: str | Path, what: str, *, columns: Collection[str] | None = None
) -> Iterator[tuple[int, dict[str, Any]]]:
    """The rows of a JSONL or Parquet file with the numbers of their lines, from 1 on; blank lines are passed over.

    Args:
        path: The file.
        what: What messages call a row: `problem`.
        columns: Of a Parquet file, those that are read, as far as it has them; None: all.

    Raises:
        ValueError: there is no such file; it is none of Parquet; `path:line: ...` for a line that is no JSON object.
    """
    if not Path(path).is_file():
        raise ValueError(f"{path}: no such {what} file")
    if Path(path).suffix in PARQUET:
        yield from _read_parquet(path, columns)
        return
    with Path(path).open("rb") as lines:
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except (ValueError, RecursionError) as error:
                raise ValueError(f"{path}:{number}: not valid JSON: {error}") from error
            if not isinstance(row, dict):
                raise ValueError(f"{path}:{number}: a {what} is a JSON object, not {type(row).__name__}")
            yield number, row


def _read_parquet(path: str | Path, columns: Collection[str] | None) -> Iterator[tuple[int, dict[str, Any]]]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    number = 0
    try:
        with pq.ParquetFile(path) as file:
            names = [name for name in file.schema_arrow.names if columns is None or name in columns]
            for batch in file.iter_batches(batch_size=1024, columns=names):
                for row in batch.to_pylist():
                    number += 1
                    # A column that only some rows use is null in the others, as if the key were not there.
                    yield number, {key: value for key, value in row.items() if value is not None}
    except (pa.ArrowException, OSError) as error:
        raise ValueError(f"{path}: not a Parquet file: {error}") from error


def read_messages(given: Any, *, roles: Collection[str]) -> Observation:
    """Messages as copies that share nothing with what was given; texts that UTF-8 cannot hold are mended.

    Content may be the text parts of the OpenAI chat format, which become one text.
    """
    if isinstance(given, str | bytes | Mapping) or not isinstance(given, Iterable):
        raise ValueError(
            f"it must be a list of messages with a role and a content (an empty one for none), not {shown(given)}"
        )
    return tuple([_read_message(message, index, roles) for index, message in enumerate(given)])


def read_content(given: Any) -> str:
    """The text of a message: a text, or text parts `[{"type": "text", "text": ...}, ...]`, joined by line breaks."""
    if isinstance(given, str):
        return clean_text(given)
    if not isinstance(given, Sequence) or isinstance(given, bytes | bytearray):
        raise ValueError(f"'content' must be a text, not {shown(given)}")
    return "\n".join([_read_part(part) for part in given])


def read_calls(given: Any) -> list[dict[str, Any]]:
    """Tool calls of the OpenAI chat format, their arguments as objects: that format has them as JSON text."""
    if not isinstance(given, list | tuple):
        raise ValueError(f"'tool_calls' must be a list, not {shown(given)}")
    return [_read_call(call) for call in given]


def _read_call(call: Any) -> dict[str, Any]:
    function = call.get("function") if isinstance(call, Mapping) else None
    if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
        raise ValueError(
            f"a tool call must have a 'function' with a 'name' and 'arguments', not be {shown(call)}"
        )
    arguments = function.get("arguments") or {}
    if isinstance(arguments, str):
        try:
            arguments = json.loads(arguments)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"the arguments of a tool call are not valid JSON: {error}") from error
    if not isinstance(arguments, Mapping):
        raise ValueError(f"the arguments of a tool call must be an object, not {shown(arguments)}")
    return recordable({**call, "function": {**function, "arguments": arguments}})


def read_numbers(given: Any) -> dict[str, float]:
    """Finite numbers by name."""
    if not isinstance(given, Mapping):
        raise ValueError(f"it must be numbers by name, not {shown(given)}")
    read: dict[str, float] = {}
    for name, value in given.items():
        if type(value) is float and -MAX_SIZE <= value <= MAX_SIZE and type(name) is str and name.isascii():
            read[name] = value
            continue
        try:
            read[clean_text(name) if isinstance(name, str) else shown(name)] = as_number(value)
        except ValueError as error:
            raise ValueError(f"{shown(name)}: {error}") from error
    return read


def read_text(given: Any) -> str:
    """A text such as a role or an anchor; other values as they are printed, None as no text."""
    if given is None:
        return ""
    return clean_text(given if isinstance(given, str) else str(given))


def _read_message(given: Any, index: int, roles: Collection[str]) -> Message:
    # Nearly every message is flat and plain; what is not is read at three times the price.
    if type(given) is dict:
        for key, value in given.items():
            if type(key) is not str or type(value) is not str or key not in _FLAT_KEYS or not value.isascii():
                break
        else:
            if "content" in given and given.get("role") in roles:
                return given.copy()  # type: ignore[return-value]
    if not isinstance(given, Mapping):
        raise ValueError(f"message {index} must have a role and a content, not be {shown(given)}")
    role = given.get("role")
    if not isinstance(role, str) or role not in roles:
        raise ValueError(f"message {index} must have a role of {', '.join(sorted(roles))}, not {shown(role)}")
    if "content" not in given:
        raise ValueError(f"message {index} has no 'content'")
    content = given["content"]
    try:
        # Calls of an assistant stand beside a content that may be null.
        text = "" if content is None and given.get("tool_calls") else read_content(content)
    except ValueError as error:
        raise ValueError(f"message {index}: {error}") from error
    message: Any = {"role": str(role), "content": text}
    for key, value in given.items():
        if key in _TEXT_KEYS:
            if value is not None and not isinstance(value, str):
                raise ValueError(f"message {index}: {key!r} must be a text, not {shown(value)}")
            if value is not None:
                message[key] = clean_text(value)
        elif key == "tool_calls":
            if value:
                message[key] = _read_calls_of(value, index)
        elif key not in ("role", "content"):
            message[read_text(key)] = recordable(value)
    return message


def _read_calls_of(value: Any, index: int) -> list[dict[str, Any]]:
    try:
        return read_calls(value)
    except ValueError as error:
        raise ValueError(f"message {index}: {error}") from error


def _read_part(part: Any) -> str:
    if isinstance(part, str):
        return clean_text(part)
    if isinstance(part, Mapping):
        text = part.get("text")
        if isinstance(text, str) and part.get("type", "text") in ("text", "input_text", "output_text"):
            return clean_text(text)
        if "type" in part:
            raise ValueError(
                f"a part of 'content' is of type {shown(part['type'])}; only texts can be played"
            )
    raise ValueError(f"a part of 'content' must be {{'type': 'text', 'text': ...}}, not {shown(part)}")


def read_reset(result: Any) -> tuple[Observation, dict[str, Any]]:
    """What `reset` of any Gymnasium environment of conversations gave: the first messages, and `info`."""
    if not isinstance(result, tuple) or len(result) != 2:
        raise ValueError(f"reset must return an observation and an info, not {shown(result)}")
    observation, info = result
    return _observation(observation), _read_info(info)


def read_step(result: Any) -> tuple[Observation, float, bool, bool, dict[str, Any]]:
    """What `step` of any Gymnasium environment of conversations gave: its five values."""
    if not isinstance(result, tuple) or len(result) != 5:
        raise ValueError(f"step must return five values, not {shown(result)}")
    observation, reward, terminated, truncated, info = result
    try:
        reward = as_number(reward)
    except ValueError as error:
        raise ValueError(f"the reward: {error}") from error
    return _observation(observation), reward, bool(terminated), bool(truncated), _read_info(info)


def _observation(given: Any) -> Observation:
    try:
        return read_messages(given, roles=ROLES)
    except ValueError as error:
        raise ValueError(f"the observation: {error}") from error


def _read_info(given: Any) -> dict[str, Any]:
    if not isinstance(given, Mapping):
        raise ValueError(f"info must be a mapping, not {shown(given)}")
    info = dict(given)
    for name in _NUMBERS:
        if name in info:
            try:
                info[name] = read_numbers(info[name])
            except ValueError as error:
                raise ValueError(f"info[{name!r}]: {error}") from error
    for name in _TEXTS:
        if info.get(name, "") is None:
            del info[name]
        elif name in info:
            info[name] = read_text(info[name])
    for name, kind in _OBJECTS.items():
        if not isinstance(info.get(name, ()), Iterable):
            raise ValueError(f"info[{name!r}] must hold {kind.__name__}s, not be {shown(info[name])}")
        for item in info.get(name, ()):
            if not isinstance(item, kind):
                raise ValueError(f"info[{name!r}] must hold {kind.__name__}s, not {shown(item)}")
    return info
