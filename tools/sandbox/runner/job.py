"""The two kinds of process that run code: one that ends with it, and one that keeps its names."""

from __future__ import annotations

import atexit
import contextlib
import os
import signal
import socket
import sys
import threading
from collections.abc import Callable
from typing import Any, NoReturn

from . import source as sources
from .confine import Confinement
from .framing import decode, encode, write_all

SETUP_FAILED = 125


def in_child(setup: int, work: Callable[[], int]) -> NoReturn:
    """Runs `work` in a fork and ends the process with its result, whatever happens.

    `work` closes `setup` before any code runs; a failure until then is written there.
    """
    status = SETUP_FAILED
    try:
        signal.set_wakeup_fd(-1)
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        status = work()
    except BaseException as error:  # noqa: BLE001 - a fork must never return into the runner's loop
        with contextlib.suppress(OSError):
            os.write(setup, f"{type(error).__name__}: {error}".encode())
    finally:
        os._exit(status)


def run_once(
    confinement: Confinement,
    namespace: dict[str, Any],
    streams: tuple[int, ...],
    setup: int,
    program: int,
) -> int:
    """In a fork: confines it, runs in `namespace` what comes from `program`, and ends as an interpreter would."""
    _enter(confinement, streams, keep=(setup, program))
    question = _read_program(program)
    sys.argv[:] = ["main.py", *question["arguments"]]
    os.close(setup)
    status = sources.run_source(question["code"], "main.py", namespace)
    try:
        threading._shutdown()  # type: ignore[attr-defined] # waits for the code's threads
        atexit._run_exitfuncs()
    except SystemExit as stop:
        status = sources.exit_status(stop.code)
    except BaseException as error:  # noqa: BLE001 - whatever the code raises is its own
        sources.report_error(error)
    if not sources.flush_streams() and status == 0:
        status = 120  # as the interpreter ends when it cannot flush
    return status


def run_many(confinement: Confinement, namespace: dict[str, Any], link: socket.socket, setup: int) -> int:
    """In a fork: confines it and runs what comes over `link`, in one `namespace`, until the link ends.

    Each question is one byte that carries four descriptors: stdin, stdout, stderr, and the pipe with the program. The
    answer is a frame `{"exit_code"}`.
    """
    null = os.open("/dev/null", os.O_RDWR)
    _enter(confinement, (null, null, null), keep=(setup, link.fileno(), null), one_execution=False)
    os.close(setup)
    own_pid = os.getpid()
    number = 0
    while True:
        data, fds, _, _ = socket.recv_fds(link, 1, 4)
        if not data:
            return 0
        *streams, program = fds
        for target, fd in enumerate(streams):
            os.dup2(fd, target)
            os.close(fd)
        question = _read_program(program)
        number += 1
        sys.stdin = sources.open_stdin()
        sys.argv[:] = [f"exec_{number}.py", *question["arguments"]]
        status = sources.run_source(question["code"], f"exec_{number}.py", namespace)
        sources.flush_streams()
        if os.getpid() != own_pid:
            return status  # a fork that the code made, and that came back here
        for target in range(3):
            os.dup2(null, target)
        answer: dict[str, Any] = {"exit_code": status}
        write_all(link.fileno(), encode(answer))


def _read_program(fd: int) -> dict[str, Any]:
    """The frame `{"code", "arguments"}` that comes over a pipe, which is closed then."""
    with os.fdopen(fd, "rb", closefd=True) as pipe:
        return decode(pipe.read())


def _enter(
    confinement: Confinement,
    streams: tuple[int, ...],
    *,
    keep: tuple[int, ...],
    one_execution: bool = True,
) -> None:
    os.setsid()
    for target, fd in enumerate(streams):
        os.dup2(fd, target)
    confinement.apply(keep=keep, one_execution=one_execution)
