"""How a tool environment runs its hooks: where they stand or in threads, awaited or not."""

from __future__ import annotations

import asyncio
import inspect
import signal
import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from polyturn.tools.tool import MAX_RESULT_CHARS


@dataclass(frozen=True, kw_only=True, slots=True)
class StepLimits:
    """What one reset or step of an environment may take. None: no limit."""

    hook_timeout_s: float | None = None
    """Seconds for each hook that the policy does not cause: setting up tools, `begin`, `follow_up`, grading."""
    tools_timeout_s: float | None = None
    """Seconds for the tool calls of one step together, without their waits for slots."""
    queue_timeout_s: float | None = None
    """Seconds that a tool call may wait for a slot of its tool."""
    max_tool_calls: int | None = None
    """Calls of one action that are made; the others are told so."""
    max_result_chars: int | None = MAX_RESULT_CHARS
    """Characters that the model is shown of a result, where the tool sets no limit of its own."""


NO_LIMITS = StepLimits()


def current_task() -> asyncio.Task[Any] | None:
    """The task that runs; None outside of an event loop."""
    try:
        return asyncio.current_task()
    except RuntimeError:
        return None


def is_interruption(error: BaseException, task: asyncio.Task[Any] | None) -> bool:
    """Whether an exception is meant for whoever plays the episode in `task`, and was not raised by code of the episode.

    That is a cancellation of the task, the end of a coroutine that is thrown away, and the user's Ctrl-C. Code of an
    episode may raise the same exceptions; then they are its failure like any other.
    """
    if isinstance(error, asyncio.CancelledError):
        return task is not None and task.cancelling() > 0
    if isinstance(error, GeneratorExit):
        return current_task() is not task
    if isinstance(error, KeyboardInterrupt):
        # Ctrl-C raises it in the main thread only, and only where nobody else handles the signal.
        is_main = threading.current_thread() is threading.main_thread()
        return is_main and signal.getsignal(signal.SIGINT) is signal.default_int_handler
    return False


def is_async_function(function: Callable[..., Any]) -> bool:
    """As `inspect.iscoroutinefunction`, at a tenth of its price for functions and methods."""
    code = getattr(function, "__code__", None)
    return (
        inspect.iscoroutinefunction(function) if code is None else bool(code.co_flags & inspect.CO_COROUTINE)
    )
