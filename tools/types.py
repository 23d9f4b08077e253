"""The values that pass between an agent and its tools, in the shape of the OpenAI chat format."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True, kw_only=True, slots=True)
class ToolSpec:
    """What a model is told about one tool."""

    name: str
    description: str
    parameters: Mapping[str, Any]
    """JSON Schema of the arguments: an object schema."""

    def to_openai(self) -> dict[str, Any]:
        """The spec as chat templates and OpenAI-compatible endpoints take it."""
        function = {"name": self.name, "description": self.description, "parameters": dict(self.parameters)}
        return {"type": "function", "function": function}


@dataclass(frozen=True, kw_only=True, slots=True)
class ToolCall:
    """One call that a model made. A call that could not be parsed carries `error` and empty arguments."""

    id: str
    name: str
    arguments: Mapping[str, Any] = field(default_factory=dict)
    error: str | None = None
    """Why the call could not be read, in words that help the model mend it."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ToolResult:
    """What a tool answered. `ok` is False when the tool told the model of a mistake."""

    call_id: str
    name: str
    content: str
    ok: bool = True
    seconds: float = field(default=0.0, compare=False)
    """How long the tool took; no part of the result's identity, no more than `queue_s`."""
    queue_s: float = field(default=0.0, compare=False)
    """How long the call waited for one of the tool's slots."""
    cost: float = 0.0
    """What the call cost, in the unit of the tool's author."""
    truncated: bool = False
    """Whether the model is shown a part only."""
    timed_out: bool = False
    """Whether the tool took longer than its `timeout_s`; `ok` is then False."""


class ToolError(Exception):
    """Raised by a tool to tell the model of a mistake it can mend: the text becomes the tool's result.

    Any other exception that leaves a tool means that the infrastructure failed, and ends the episode; but numbers that
    are too large for a float or to be printed come from the arguments, and the model is told.
    """
