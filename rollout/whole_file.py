"""Files and directories that are there whole or not at all, whenever the writer is killed or the disk is full."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

PROBE_BYTES = 1 << 16
"""So much is written, and removed again, to see whether a directory can be written to."""


@contextmanager
def whole_file(path: Path) -> Iterator[BinaryIO]:
    """Write a file under a name of its own; it takes its place when all of it is on the disk.

    A reader sees what was there before or all that is new. What could not be finished is removed.

    Raises:
        OSError: the disk is full, or does not take it; what was there before is as it was.
    """
    part = path.with_name(f"{path.name}.part")
    try:
        with part.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, path)
    except BaseException:
        part.unlink(missing_ok=True)
        raise
    sync_directory(path.parent)


@contextmanager
def removed_on_failure(part: Path) -> Iterator[Path]:
    """Make a directory to write into, which the caller renames at the end; what could not be finished is removed."""
    part.mkdir(parents=True)
    try:
        yield part
    except BaseException:
        shutil.rmtree(part, ignore_errors=True)
        raise


def sync_directory(directory: Path) -> None:
    """Make the names in a directory survive a power failure."""
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def check_writable(path: Path) -> None:
    """Raise `ValueError` where no file can be made in a directory, or in what is to be made to hold it.

    Permission bits say little: of a superuser, a full or a read-only disk.
    """
    parent = path.absolute()
    while not parent.exists():
        parent = parent.parent
    if not parent.is_dir():
        raise ValueError(f"{path} cannot be written to: {parent} is no directory; name another place")
    try:
        with tempfile.TemporaryFile(dir=parent) as file:
            file.write(bytes(PROBE_BYTES))
    except OSError as error:
        raise ValueError(
            f"{path} cannot be written to: {error.strerror}; make room or give permission there, or name another place"
        ) from error
