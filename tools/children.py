"""Child processes that cannot outlive their owner, however that ends.

The owner starts a program of ours with `start_child`; the program calls `end_with(owner)` before anything else. From
then on the kernel kills it when the thread that started it ends, so one thread starts all children of a process, and
lives as long as the process.

Programs of others that start processes of their own, such as an engine, run under `rollout.engines.supervisor`, which
ends all of them, gently at first. The sandbox's runner stands apart, because it is alone in its container, and so does
the guard of an MCP server, which is run by its path without this package and bounds what the server writes.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import os
import signal
import subprocess
from collections.abc import Sequence
from typing import Any

_PR_SET_PDEATHSIG = 1


def start_child(command: Sequence[str], **options: Any) -> subprocess.Popen[Any]:
    """Start a program that calls `end_with`, in a session of its own: Ctrl-C is for the owner.

    Args:
        command: The program and its arguments, one of which should tell it this process's id.
        options: As `subprocess.Popen` takes them.

    Raises:
        OSError: it cannot be started.
    """
    start = functools.partial(subprocess.Popen, command, start_new_session=True, **options)
    process: subprocess.Popen[Any] = _starter(os.getpid()).call(start)
    return process


def end_with(owner: int) -> None:
    """Have this process killed when the process `owner`, which started it, ends; ends at once where it is gone."""
    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != owner:
        os._exit(1)


def end_child(process: subprocess.Popen[Any], *, wait_s: float = 0.0) -> None:
    """Kill a child and all in its session's process group; give it `wait_s` seconds to end by itself before."""
    if wait_s:
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(wait_s)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def how_it_ended(status: int) -> str:
    """An exit status in words, whether a signal is told as Python does (-9) or as a shell does (137)."""
    number = -status if status < 0 else status - 128
    try:
        return f"was killed by {signal.Signals(number).name}"
    except ValueError:
        return f"ended with status {status}"


@functools.lru_cache(maxsize=1)
def _starter(owner: int) -> Any:
    """The thread that starts this process's children; a fork gets one of its own."""
    # Late: a child imports this module for `end_with` alone, and some are to be small.
    from polyturn.tools.threads import PinnedThread

    del owner
    return PinnedThread("children")
