"""What a sandbox sees of the machine: the system's programs and libraries, an interpreter, and folders of packages.

Things are shown by need. What is installed beside them (packages of the interpreter, which may have labels and
solutions among them) is hidden, and so is this package wherever it is.
"""

from __future__ import annotations

import glob
import os
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

SYSTEM_FOLDERS = (
    *(
        "/usr/bin",
        "/usr/sbin",
        "/usr/lib",
        "/usr/lib32",
        "/usr/lib64",
        "/usr/libx32",
        "/usr/libexec",
        "/usr/include",
    ),
    *("/usr/share/perl", "/usr/share/perl5", "/usr/share/terminfo", "/usr/share/zoneinfo"),
)
"""Programs, and what they need."""
LINKED_FOLDERS = ("/lib", "/lib32", "/lib64", "/libx32", "/bin", "/sbin")
PLACES_OF_PACKAGES = ("site-packages", "dist-packages", "python*/site-packages", "python*/dist-packages")
"""Below a folder of libraries."""
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
    hidden: tuple[str, ...]
    """Folders below those that are empty inside, as they are called there."""
    links: tuple[tuple[str, str], ...]
    """Symbolic links: path, target."""
    import_folders: tuple[str, ...]
    """The folders of packages, as they are called inside."""

    @classmethod
    def of_this_machine(cls, packages: Sequence[str], runner: str | None = None) -> Layout:
        """The layout that this interpreter needs, with folders of packages and, if it is started there, the runner.

        The interpreter is at the same path inside and outside, since it knows where it is. Raises Hidden.
        """
        wanted = [*filter(_is_own_folder, SYSTEM_FOLDERS), *_interpreter_folders()]
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
        hidden = _hidden(shown, inside)
        if runner is not None:
            shown.append((runner, RUNNER))
        return cls(shown=tuple(shown), hidden=hidden, links=tuple(links), import_folders=inside)

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


def _is_own_folder(path: str) -> bool:
    return os.path.isdir(path) and not os.path.islink(path)


def _hidden(shown: Iterable[tuple[str, str]], packages: Sequence[str]) -> tuple[str, ...]:
    """What is hidden of the shown, as it is called inside: packages nobody asked for, and the one that this is in."""
    this_package = os.path.realpath(os.path.join(os.path.dirname(__file__), *[os.pardir] * 3))
    found = []
    for path, inside in shown:
        places = ("polyturn",) if inside in packages else PLACES_OF_PACKAGES
        below = [name for place in places for name in glob.glob(f"{glob.escape(path)}/{place}")]
        if f"{this_package}/".startswith(f"{os.path.realpath(path)}/"):
            below.append(path + this_package.removeprefix(os.path.realpath(path)))
        found += [inside + name.removeprefix(path) for name in below if os.path.isdir(name)]
    return _without_nested(found)


def _without_nested(paths: Iterable[str]) -> tuple[str, ...]:
    kept: list[str] = []
    for path in sorted({os.path.normpath(path) for path in paths}):
        if not any(path == above or path.startswith(above + "/") for above in kept):
            kept.append(path)
    return tuple(kept)
