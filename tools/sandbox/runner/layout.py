"""What a sandbox sees of the machine: the system's programs and libraries, an interpreter, and folders of packages."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable
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
ETC = {
    "passwd": "root:x:0:0::/nonexistent:/bin/false\nsandbox:x:65532:65532::/work:/bin/sh\n",
    "group": "root:x:0:\nsandbox:x:65532:\n",
    "hosts": "127.0.0.1 localhost\n::1 localhost\n",
    "nsswitch.conf": "passwd: files\ngroup: files\nhosts: files\n",
}


@dataclass(frozen=True, kw_only=True, slots=True)
class Layout:
    """Paths that are the same inside and outside."""

    shown: tuple[str, ...]
    """Files and folders, read-only inside; none lies below another."""
    links: tuple[tuple[str, str], ...]
    """Symbolic links: path, target."""

    @classmethod
    def of_this_machine(cls, extra_folders: Iterable[str]) -> Layout:
        """The layout that this interpreter needs, and `extra_folders` besides."""
        wanted = ["/usr", *_interpreter_folders(), *extra_folders]
        links = []
        for folder in LINKED_FOLDERS:
            if os.path.islink(folder):
                links.append((folder, os.readlink(folder)))
            elif os.path.isdir(folder):
                wanted.append(folder)
        wanted += [path for path in SHOWN_IN_ETC if os.path.exists(path)]
        return cls(shown=_without_nested(wanted), links=tuple(links))


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
