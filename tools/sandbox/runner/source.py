"""Running source text as `__main__`, the way `python main.py` would."""

from __future__ import annotations

import builtins
import linecache
import sys
import traceback
import types
from typing import Any

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
