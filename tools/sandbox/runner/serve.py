"""The runner's main loop: reads questions, answers them, those about files in the work folder itself; see the package's
documentation for the protocol.
"""

from __future__ import annotations

import contextlib
import errno
import gc
import importlib
import os
import site
import stat
import sys
from typing import Any

from .confine import Config, Confinement
from .execution import Executor, HostGone, Question
from .framing import FramingError, encode, read_exactly, read_header, write_all
from .job import become_script
from .kernel import PR_SET_CHILD_SUBREAPER, PR_SET_DUMPABLE, PR_SET_NO_NEW_PRIVS, drop_capabilities, prctl


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
    """Imports modules, and moves all objects out of the garbage player's sight, so that forks share the memory."""
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
            return {}, read_file(work, path, header["max_bytes"])
        write_file(work, path, body)
        return {}, b""
    except Refused as error:
        return {"error": "value", "message": str(error), "errno": None}, b""
    except OSError as error:
        return {"error": "os", "message": error.strerror or str(error), "errno": error.errno}, b""


class Refused(ValueError):
    """The path leaves the work folder, or is not a file that can be read or written this way."""


def split_path(path: str) -> list[str]:
    """The components of a relative path. Raises Refused for one that could leave the folder."""
    if path.startswith("/"):
        raise Refused(f"{path!r} is absolute; paths are relative to the work folder")
    if "\0" in path:
        raise Refused("a path cannot hold a zero byte")
    parts = [part for part in path.split("/") if part not in ("", ".")]
    if ".." in parts:
        raise Refused(f"{path!r} leaves the work folder")
    if not parts:
        raise Refused(f"{path!r} names no file")
    return parts


def read_file(work: str, path: str, max_bytes: int) -> bytes:
    """The contents of a regular file. Raises Refused and OSError."""
    fd = _open(work, split_path(path), os.O_RDONLY, make_parents=False)
    try:
        size = os.fstat(fd).st_size
        if size > max_bytes:
            raise Refused(f"{path!r} has {size} bytes, more than the {max_bytes} that may be read")
        chunks = []
        left = max_bytes + 1  # it may grow while it is read
        while left > 0 and (chunk := os.read(fd, min(left, 1 << 20))):
            chunks.append(chunk)
            left -= len(chunk)
        if left <= 0:
            raise Refused(f"{path!r} has more than the {max_bytes} bytes that may be read")
        return b"".join(chunks)
    finally:
        os.close(fd)


def write_file(work: str, path: str, data: bytes) -> None:
    """Writes a regular file, making its parents; one that does not fit is left empty. Raises Refused and OSError."""
    fd = _open(work, split_path(path), os.O_WRONLY | os.O_CREAT, make_parents=True)
    try:
        os.ftruncate(fd, 0)
        view = memoryview(data)
        while view:
            view = view[os.write(fd, view) :]
    except OSError:
        os.ftruncate(fd, 0)
        raise
    finally:
        os.close(fd)


def _open(work: str, parts: list[str], flags: int, *, make_parents: bool) -> int:
    """A descriptor of the regular file at the end of `parts`."""
    folder = os.open(work, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        for part in parts[:-1]:
            if make_parents:
                with contextlib.suppress(FileExistsError):
                    os.mkdir(part, 0o755, dir_fd=folder)
            inner = _open_one(part, os.O_PATH | os.O_DIRECTORY, folder)
            os.close(folder)
            folder = inner
        # Not blocking: the other end of a pipe may never come.
        fd = _open_one(parts[-1], flags | os.O_NONBLOCK | os.O_NOCTTY, folder)
    finally:
        os.close(folder)
    kind = os.fstat(fd).st_mode
    if stat.S_ISREG(kind):
        return fd
    os.close(fd)
    if stat.S_ISDIR(kind):
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), "/".join(parts))
    raise Refused(f"{'/'.join(parts)!r} is not a regular file")


def _open_one(name: str, flags: int, folder: int) -> int:
    try:
        return os.open(name, flags | os.O_NOFOLLOW | os.O_CLOEXEC, 0o644, dir_fd=folder)
    except OSError as error:
        if error.errno == errno.ENXIO:
            raise Refused(f"{name!r} is not a regular file") from None
        is_link = error.errno in (errno.ELOOP, errno.ENOTDIR) and _is_link(name, folder)
        if is_link:
            raise Refused(f"{name!r} is a symbolic link, which is not followed") from None
        raise


def _is_link(name: str, folder: int) -> bool:
    return stat.S_ISLNK(os.stat(name, dir_fd=folder, follow_symlinks=False).st_mode)
