"""What a sandbox sees of the machine: the system's programs and libraries, an interpreter, and folders of packages."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

LINKED_FOLDERS = ("/lib", "/lib32", "/lib64", "/libx32", "/bin", "/sbin")
SHOWN_IN_ETC = (
    "/etc/ld.so.cache",
    "/etc/ld.so.conf",
    "/etc/ld.so.conf.d",
    "/etc/alternatives",
    "/etc/localtime",
)
DEVICES = ("null", "zero", "full", "random", "urandom")
DEVICE_LINKS = {
    "fd": "/proc/self/fd",
    "stdin": "/proc/self/fd/0",
    "stdout": "/proc/self/fd/1",
    "stderr": "/proc/self/fd/2",
}
PACKAGES, RUNNER = "/packages", "/runner"
ETC = {
    "passwd": "root:x:0:0::/nonexistent:/bin/false\nsandbox:x:65532:65532::/work:/bin/sh\n",
    "group": "root:x:0:\nsandbox:x:65532:\n",
    "hosts": "127.0.0.1 localhost\n::1 localhost\n",
    "nsswitch.conf": "passwd: files\ngroup: files\nhosts: files\n",
}


PRIVATE_FOLDERS = {"/work": "0700", "/tmp": "1777", "/dev/shm": "1777"}
"""Folders that every sandbox has for itself, and their modes."""


class Hidden(ValueError):
    """Something that has to be shown would be hidden by a private folder; the message says what."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Layout:
    """Where things are inside."""

    shown: tuple[tuple[str, str], ...]
    """Files and folders that are read-only inside: path outside, path inside; none lies below another."""
    links: tuple[tuple[str, str], ...]
    """Symbolic links: path, target."""
    import_folders: tuple[str, ...]
    """The folders of packages, as they are called inside."""

    @classmethod
    def of_this_machine(cls, packages: Sequence[str], runner: str | None = None) -> Layout:
        """The layout that this interpreter needs, with folders of packages and, if it is started there, the runner.

        The interpreter is at the same path inside and outside, since it knows where it is. Raises Hidden.
        """
        wanted = ["/usr", *_interpreter_folders()]
        links = []
        for folder in LINKED_FOLDERS:
            if os.path.islink(folder):
                links.append((folder, os.readlink(folder)))
            elif os.path.isdir(folder):
                wanted.append(folder)
        wanted += [path for path in SHOWN_IN_ETC if os.path.exists(path)]
        for path in wanted:
            for private in PRIVATE_FOLDERS:
                if path == private or path.startswith(private + "/"):
                    raise Hidden(f"the interpreter needs {path}, but {private} inside is the sandbox's own")
        inside = tuple(f"{PACKAGES}/{number}" for number in range(len(packages)))
        shown = [(path, path) for path in _without_nested(wanted)] + list(zip(packages, inside, strict=True))
        if runner is not None:
            shown.append((runner, RUNNER))
        return cls(shown=tuple(shown), links=tuple(links), import_folders=inside)

    @property
    def readable(self) -> list[str]:
        """What code may read, as it is called inside."""
        return [*(inside for _, inside in self.shown if inside != RUNNER), "/etc", "/proc", "/dev"]


def _interpreter_folders() -> list[str]:
    """Where this interpreter, its standard library and its shared libraries are."""
    prefixes = {sys.base_prefix, sys.base_exec_prefix}
    folders = [os.path.join(prefix, name) for prefix in sorted(prefixes) for name in ("bin", "lib", "lib64")]
    folders.append(os.path.dirname(os.path.realpath(sys.executable)))
    folders.append(os.path.dirname(os.__file__))
    return [folder for folder in folders if os.path.isdir(folder)]


def _without_nested(paths: Iterable[str]) -> tuple[str, ...]:
    kept: list[str] = []
    for path in sorted({os.path.normpath(path) for path in paths}):
        if not any(path == above or path.startswith(above + "/") for above in kept):
            kept.append(path)
    return tuple(kept)
