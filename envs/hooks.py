"""How a tool environment runs its hooks: where they stand or in threads, awaited or not."""

from __future__ import annotations

import asyncio
import contextvars
import functools
import inspect
import signal
import threading
from collections.abc import Awaitable, Callable
from concurrent.futures import Executor
from typing import Any

Offload = Callable[[Callable[[], Any]], Awaitable[Any]]
"""Runs a function somewhere and gives its value."""


async def inline(function: Callable[[], Any]) -> Any:
    """Run it where it stands."""
    return function()


def in_threads(executor: Executor | None) -> Offload:
    """Run things in threads of `executor` (None: of the event loop's own), with the context variables of the caller."""

    async def offload(function: Callable[[], Any]) -> Any:
        context = contextvars.copy_context()
        return await asyncio.get_running_loop().run_in_executor(
            executor, functools.partial(context.run, function)
        )

    return offload


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
