"""The two kinds of process that run code, one that ends with it and one that keeps its names, and how source text runs
as `__main__`, the way `python main.py` would.
"""

from __future__ import annotations

import atexit
import builtins
import contextlib
import linecache
import os
import signal
import socket
import sys
import threading
import traceback
import types
from collections.abc import Callable
from typing import Any, NoReturn

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
    status = run_source(question["code"], "main.py", namespace)
    try:
        threading._shutdown()  # type: ignore[attr-defined] # waits for the code's threads
        atexit._run_exitfuncs()
    except SystemExit as stop:
        status = exit_status(stop.code)
    except BaseException as error:  # noqa: BLE001 - whatever the code raises is its own
        report_error(error)
    if not flush_streams() and status == 0:
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
        sys.stdin = open_stdin()
        sys.argv[:] = [f"exec_{number}.py", *question["arguments"]]
        status = run_source(question["code"], f"exec_{number}.py", namespace)
        flush_streams()
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


MAX_FRAMES = 1000
"""The innermost frames of a traceback that are printed, as the interpreter does; there may be millions."""

_HIDDEN: list[types.ModuleType] = []
"""Keeps the modules that code must not find."""


def become_script(work: str, import_folders: tuple[str, ...]) -> dict[str, Any]:
    """Makes this interpreter look like one that is about to run a script in `work`; the namespace of `__main__`.

    The runner does so once, for all its forks: whatever a fork touches has to be copied. So from here on the runner
    must not import any module of its own, nor use the standard streams, which are those of the forks.
    """
    package = __name__.rpartition(".")[0]
    for name in [name for name in sys.modules if name == package or name.startswith(package + ".")]:
        _HIDDEN.append(sys.modules.pop(name))
    sys.path[:] = [work, *(path for path in sys.path if path not in (work, *import_folders)), *import_folders]
    main = types.ModuleType("__main__")
    main.__dict__["__builtins__"] = builtins
    sys.modules["__main__"] = main
    open_streams()
    return main.__dict__


def open_streams() -> None:
    """New text streams on descriptors 0, 1 and 2, with the error modes of an interpreter in a UTF-8 locale.

    Every line is written at once, so that what was printed before a deadline is not lost; output is bounded anyway.
    """
    sys.stdin = sys.__stdin__ = open_stdin()  # type: ignore[misc]
    sys.stdout = sys.__stdout__ = _open_output(1, "surrogateescape")  # type: ignore[misc]
    sys.stderr = sys.__stderr__ = _open_output(2, "backslashreplace")  # type: ignore[misc]


def _open_output(fd: int, errors: str) -> Any:
    return open(fd, "w", encoding="utf-8", errors=errors, closefd=False, buffering=1)


def open_stdin() -> Any:
    """A text stream on descriptor 0 whose buffer is empty."""
    return open(0, encoding="utf-8", errors="surrogateescape", closefd=False)


def run_source(source: str, file_name: str, namespace: dict[str, Any]) -> int:
    """Runs the source; the exit status that a script would have had. Tracebacks go to stderr."""
    lines = source.splitlines(keepends=True)
    linecache.cache[file_name] = (len(source), None, lines, file_name)
    try:
        exec(compile(source, file_name, "exec", dont_inherit=True), namespace)
    except SystemExit as stop:
        return exit_status(stop.code)
    except BaseException as error:  # noqa: BLE001 - whatever the code raises is its own
        # Without this function's own line; a SyntaxError has none of the code's.
        trace = error.__traceback__
        report_error(error.with_traceback(trace.tb_next if trace is not None else None))
        return 1
    return 0


def report_error(error: BaseException) -> None:
    """Prints a traceback as the interpreter does, with lines of source that is in no file."""
    try:
        if sys.excepthook is sys.__excepthook__:
            traceback.print_exception(error, limit=-MAX_FRAMES)
        else:
            sys.excepthook(type(error), error, error.__traceback__)
    except BaseException:  # noqa: BLE001 - out of memory, say, or out of stack
        sys.__excepthook__(type(error), error, error.__traceback__)


def exit_status(code: object) -> int:
    """What `sys.exit(code)` makes of its argument."""
    if code is None:
        return 0
    if isinstance(code, int):
        return code & 0xFF
    print(code, file=sys.stderr)
    return 1


def flush_streams() -> bool:
    """Writes out what is buffered; False where that fails or the code closed the streams."""
    fine = True
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except (AttributeError, OSError, ValueError):
            fine = False
    return fine
