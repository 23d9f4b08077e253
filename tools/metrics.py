"""How often a tool was called, how that went, and what it took."""

from __future__ import annotations

from dataclasses import dataclass

from polyturn.tools.types import ToolResult

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
