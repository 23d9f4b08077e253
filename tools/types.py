"""The values that pass between an agent and its tools, in the shape of the OpenAI chat format, and their sums."""

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
    is_recovered: bool = field(default=False, compare=False)
    """Whether it was written with a slip that left one meaning; no part of the call's identity."""


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


UNKNOWN_TOOL = "(unknown)"
"""The name under which calls of tools that do not exist are counted."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ToolUsage:
    """Calls of one tool, summed."""

    num_calls: int = 0
    num_failures: int = 0
    """Answered with a mistake: arguments that were refused, a `ToolError`, a timeout."""
    num_timeouts: int = 0
    num_truncated: int = 0
    seconds: float = 0.0
    max_seconds: float = 0.0
    """Of the slowest call."""
    queue_s: float = 0.0
    """Waiting for a slot; not part of `seconds`."""
    cost: float = 0.0

    @classmethod
    def of(cls, result: ToolResult) -> ToolUsage:
        """One call."""
        return cls(
            num_calls=1,
            num_failures=int(not result.ok),
            num_timeouts=int(result.timed_out),
            num_truncated=int(result.truncated),
            seconds=result.seconds,
            max_seconds=result.seconds,
            queue_s=result.queue_s,
            cost=result.cost,
        )

    def __add__(self, other: ToolUsage) -> ToolUsage:
        return ToolUsage(
            num_calls=self.num_calls + other.num_calls,
            num_failures=self.num_failures + other.num_failures,
            num_timeouts=self.num_timeouts + other.num_timeouts,
            num_truncated=self.num_truncated + other.num_truncated,
            seconds=self.seconds + other.seconds,
            max_seconds=max(self.max_seconds, other.max_seconds),
            queue_s=self.queue_s + other.queue_s,
            cost=self.cost + other.cost,
        )

    @property
    def mean_seconds(self) -> float:
        """Seconds per call; 0.0 where there was none."""
        return self.seconds / self.num_calls if self.num_calls else 0.0
