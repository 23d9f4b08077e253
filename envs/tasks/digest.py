"""What tells one task from another: a digest of all that poses it and of what it is graded by."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence, Set
from dataclasses import fields, is_dataclass
from typing import Any

import numpy as np

from polyturn.envs.tasks.types import Task, TaskSource

MAX_TASKS = 1024
"""A source of more tasks than this is told by so many of them, evenly spread, and by their number."""
MAX_GENERATED = 64
"""The same of one that makes its tasks without end, which may take a while for each."""


def task_digest(task: Task) -> str:
    """64 bits of SHA-256, in hexadecimal, over what the task says: the same in every process and session."""
    said = (task.task_id, task.messages, task.label, task.metadata, task.environment)
    return hashlib.sha256(_canonical(said)).hexdigest()[:16]


def source_digest(source: TaskSource) -> str:
    """The same of a source: of its length and its tasks in their order."""
    num_tasks = len(source)
    found = hashlib.sha256(str(num_tasks).encode())
    most = MAX_GENERATED if getattr(source, "is_endless", False) else MAX_TASKS
    num_looked_at = min(num_tasks, most)
    for place in range(num_looked_at):
        index = place * (num_tasks - 1) // max(num_looked_at - 1, 1)
        found.update(task_digest(source[index]).encode())
    return found.hexdigest()[:16]


def _canonical(value: Any) -> bytes:
    """Any value as bytes: the same for equal contents, whatever the order of a mapping, and never an address."""
    match value:
        case str():
            return _tagged(b"s", value.encode("utf-8", "surrogatepass"))
        case bytes() | bytearray():
            return _tagged(b"b", bytes(value))
        case None | bool() | float():
            return _tagged(b"v", repr(value).encode())
        case int():
            return _tagged(b"i", hex(value).encode())
        case np.ndarray() | np.generic():
            return _canonical(value.tolist())
        case Mapping():
            return _tagged(b"m", *sorted(_canonical(key) + _canonical(value[key]) for key in value))
        case Set():
            return _tagged(b"t", *sorted(map(_canonical, value)))
        case Sequence():
            return _tagged(b"l", *map(_canonical, value))
    if is_dataclass(value):
        return _tagged(b"d", *(_canonical(getattr(value, field.name)) for field in fields(value)))
    return _tagged(b"o", f"{type(value).__module__}.{type(value).__qualname__}".encode())


def _tagged(tag: bytes, *parts: bytes) -> bytes:
    content = b"".join(parts)
    return b"%b%d:%b" % (tag, len(content), content)
