"""Deadlines that find what hangs: where a function still is when its time is over."""

from __future__ import annotations

import sys
import threading
import traceback
from collections.abc import Callable
from typing import TypeVar

from polyturn.envs.conformance.findings import Nonconforming

Value = TypeVar("Value")


class Hung(Nonconforming):
    """Something did not end in time; its thread is still at it."""


def within(seconds: float, function: Callable[[], Value], what: str) -> Value:
    """The function's value, if it comes in time.

    It runs in a thread of its own, which cannot be ended: whoever catches `Hung` should end the process before long.
    Something that holds the interpreter's lock is beyond this; `isolated.py` ends that from another process.

    Raises:
        Hung: it does not; the text is `what` and the place where the function is.
    """
    values: list[Value] = []
    errors: list[BaseException] = []

    def run() -> None:
        try:
            values.append(function())
        except BaseException as error:  # noqa: BLE001  it is raised again by whoever waits
            errors.append(error)

    thread = threading.Thread(target=run, name="conformance check", daemon=True)
    thread.start()
    thread.join(seconds)
    if thread.is_alive():
        raise Hung(f"{what} (now at {_place(thread)})")
    if errors:
        raise errors[0]
    return values[0]


def _place(thread: threading.Thread) -> str:
    frame = sys._current_frames().get(thread.ident or 0)
    if frame is None:
        return "an unknown place"
    stack = traceback.extract_stack(frame)
    return " < ".join(f"{entry.name} in {entry.filename}:{entry.lineno}" for entry in reversed(stack[-4:]))
