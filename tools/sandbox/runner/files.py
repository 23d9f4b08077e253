"""Files of the work folder, reached one component at a time so that no symbolic link is ever followed.

The code may have put anything there: links, pipes, folders that nobody may enter.
"""

from __future__ import annotations

import contextlib
import errno
import os
import stat


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


def read(work: str, path: str, max_bytes: int) -> bytes:
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


def write(work: str, path: str, data: bytes) -> None:
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
