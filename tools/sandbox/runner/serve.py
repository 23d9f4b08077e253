"""The runner's main loop: reads questions, answers them; see the package's documentation for the protocol."""

from __future__ import annotations

import gc
import importlib
import os
import site
import sys
from typing import Any

from . import files
from .config import Config
from .confine import Confinement
from .execution import Executor, HostGone, Question
from .framing import FramingError, encode, read_exactly, read_header, write_all
from .libc import PR_SET_CHILD_SUBREAPER, PR_SET_DUMPABLE, PR_SET_NO_NEW_PRIVS, drop_capabilities, prctl
from .source import become_script


def main() -> None:
    """Serves on stdin and stdout, as the first process of a container."""
    serve(0, 1)


def serve(reading: int, writing: int, *, drop_privileges: bool = True) -> None:
    """Answers questions until the input ends, with no capability (`drop_privileges=False` is for tests).

    Raises RuntimeError unless this is the first process of a PID namespace: it kills everything that it can see.
    """
    if os.getpid() != 1:
        raise RuntimeError("the runner must be process 1 of a PID namespace of its own")
    prctl(PR_SET_DUMPABLE, 0)  # no process of the same user may trace it or open its files under /proc
    prctl(PR_SET_CHILD_SUBREAPER, 1)
    prctl(PR_SET_NO_NEW_PRIVS, 1)
    if drop_privileges:
        drop_capabilities()
    executor: Executor | None = None
    try:
        while True:
            header, body_bytes = read_header(reading)
            if header.get("op") == "configure":
                executor, answer = _configure(header, reading)
                write_all(writing, encode(answer))
            elif executor is None:
                raise FramingError("the first question must be `configure`")
            elif header.get("op") == "exec":
                # The body stays where it is: what the runner had in its memory, the code could find there.
                question = Question(
                    program_bytes=header["program_bytes"],
                    stdin_bytes=body_bytes - header["program_bytes"],
                    timeout_s=float(header["timeout_s"]),
                )
                executor.run(question, writing, fresh=bool(header["fresh"]))
            else:
                body = read_exactly(reading, body_bytes)
                write_all(writing, encode(*_answer(executor, header, body)))
    except (EOFError, HostGone, BrokenPipeError):
        return  # and with the first process the kernel ends all others


def add_builtins() -> None:
    """`exit`, `quit` and their like, which an interpreter that was started without `site` lacks."""
    site.setquit()
    site.setcopyright()
    site.sethelper()


def preload(modules: tuple[str, ...], folders: tuple[str, ...]) -> None:
    """Imports modules, and moves all objects out of the garbage collector's sight, so that forks share the memory."""
    added = [folder for folder in folders if folder not in sys.path]
    sys.path.extend(added)
    try:
        for module in modules:
            importlib.import_module(module)
    finally:
        for folder in added:
            sys.path.remove(folder)
    gc.collect()
    gc.freeze()


def _configure(header: dict[str, Any], host: int) -> tuple[Executor, dict[str, Any]]:
    config = Config.from_header(header)
    add_builtins()
    preload(config.preload, config.import_folders)
    confinement = Confinement.prepare(config)
    executor = Executor(confinement, become_script(config.work, config.import_folders), host)
    gc.freeze()
    return executor, {"landlock": confinement.landlock_abi}


def _answer(executor: Executor, header: dict[str, Any], body: bytes) -> tuple[dict[str, Any], bytes]:
    match header.get("op"):
        case "read" | "write":
            return _answer_file(executor.config.work, header, body)
        case "ping":
            return {}, b""
        case unknown:
            raise FramingError(f"unknown question {unknown!r}")


def _answer_file(work: str, header: dict[str, Any], body: bytes) -> tuple[dict[str, Any], bytes]:
    path = header["path"]
    try:
        if header["op"] == "read":
            return {}, files.read(work, path, header["max_bytes"])
        files.write(work, path, body)
        return {}, b""
    except files.Refused as error:
        return {"error": "value", "message": str(error), "errno": None}, b""
    except OSError as error:
        return {"error": "os", "message": error.strerror or str(error), "errno": error.errno}, b""
