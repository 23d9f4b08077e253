"""The file system that code sees: which folders are where, and the root that is built of them by mounts."""

from __future__ import annotations

import ctypes
import glob
import os
import stat
import struct
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from .kernel import LIBC, check, syscall

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


MS_RDONLY, MS_NOSUID, MS_NODEV, MS_NOEXEC = 1, 2, 4, 8
MS_BIND, MS_REC, MS_PRIVATE = 0x1000, 0x4000, 0x40000
MNT_DETACH = 2

MOUNT_SETATTR = 442  # on every architecture
AT_FDCWD, AT_RECURSIVE = -100, 0x8000
MOUNT_ATTR_RDONLY, MOUNT_ATTR_NOSUID, MOUNT_ATTR_NODEV = 1, 2, 4


def mount(source: str, target: str, kind: str | None, flags: int, options: str = "") -> None:
    """mount(2). Raises OSError that names the target."""
    result = LIBC.mount(
        source.encode(),
        target.encode(),
        kind.encode() if kind else None,
        ctypes.c_ulong(flags),
        options.encode() if options else None,
    )
    check(result, f"mount {target}")


def mount_tmpfs(
    target: str, *, size: int | None, num_inodes: int | None, mode: str, owner: int | None = None
) -> None:
    """An empty folder in memory, of so many bytes and inodes at most; as the kernel likes where None."""
    options = [f"mode={mode}"]
    if owner is not None:
        options.append(f"uid={owner},gid={owner}")
    if size is not None:
        options.append(f"size={size}")
    if num_inodes is not None:
        options.append(f"nr_inodes={num_inodes}")
    mount("tmpfs", target, "tmpfs", MS_NOSUID | MS_NODEV, ",".join(options))


def make_private(path: str) -> None:
    """Keeps mounts below from reaching, or coming from, other mount namespaces."""
    mount("none", path, None, MS_REC | MS_PRIVATE)


def bind(fd: int, target: str) -> None:
    """Shows what a descriptor stands for at `target`, with all mounts below it, even where a mount hides its path."""
    mount(f"/proc/self/fd/{fd}", target, None, MS_BIND | MS_REC)


def set_attributes(path: str, attributes: int, *, recursive: bool = True) -> None:
    """mount_setattr(2), of Linux 5.12: adds attributes to the mount at `path` and those below it."""
    wanted = struct.pack("=QQQQ", attributes, 0, 0, 0)
    flags = AT_RECURSIVE if recursive else 0
    size = ctypes.c_size_t(len(wanted))
    syscall(MOUNT_SETATTR, f"mount_setattr {path}", AT_FDCWD, path.encode(), flags, wanted, size)


def enter_root(path: str) -> None:
    """Makes the mount at `path` this namespace's root, and lets go of the old one."""
    os.chdir(path)
    check(LIBC.pivot_root(b".", b"."), "pivot_root")
    check(LIBC.umount2(b".", MNT_DETACH), "umount the old root")
    os.chdir("/")


SCAFFOLD = "/tmp"
"""Where the new root is mounted while it is built; only this process's namespace sees it there."""
READ_ONLY = MOUNT_ATTR_RDONLY | MOUNT_ATTR_NOSUID


def build(layout: Layout, *, share_private_folders: bool = False) -> None:
    """Replaces this process's root; it must be in a mount namespace of its own. Raises OSError.

    `share_private_folders` is for tests: all sandboxes then share the folders that each has for itself.
    """
    make_private("/")
    sources = {inside: os.open(path, os.O_PATH | os.O_CLOEXEC) for path, inside in _sources(layout)}
    mount_tmpfs(SCAFFOLD, size=1 << 20, num_inodes=4096, mode="0755")
    os.umask(0o022)
    for path, fd in sources.items():
        _make_target(SCAFFOLD + path, fd)
        bind(fd, SCAFFOLD + path)
        if (
            path != "/proc"
        ):  # each sandbox mounts its own, which the kernel allows only where this one is whole
            device = path.startswith("/dev/")
            set_attributes(SCAFFOLD + path, READ_ONLY | (0 if device else MOUNT_ATTR_NODEV))
        os.close(fd)
    for path in layout.hidden:
        mount_tmpfs(SCAFFOLD + path, size=1 << 12, num_inodes=1, mode="0755")
        set_attributes(SCAFFOLD + path, READ_ONLY | MOUNT_ATTR_NODEV)
    for path, target in layout.links:
        os.symlink(target, SCAFFOLD + path)
    for name, target in DEVICE_LINKS.items():
        os.symlink(target, f"{SCAFFOLD}/dev/{name}")
    for name, text in ETC.items():
        with open(f"{SCAFFOLD}/etc/{name}", "w") as file:
            file.write(text)
    for path in PRIVATE_FOLDERS:
        os.makedirs(SCAFFOLD + path, exist_ok=True)
    enter_root(SCAFFOLD)
    if share_private_folders:
        for path in PRIVATE_FOLDERS:
            mount_tmpfs(path, size=None, num_inodes=None, mode="1777")
    set_attributes("/", READ_ONLY | MOUNT_ATTR_NODEV, recursive=False)


def _sources(layout: Layout) -> list[tuple[str, str]]:
    same = [*(f"/dev/{name}" for name in DEVICES), "/proc"]
    return [*layout.shown, *((path, path) for path in same)]


def _make_target(path: str, fd: int) -> None:
    if stat.S_ISDIR(os.fstat(fd).st_mode):
        os.makedirs(path, exist_ok=True)
        return
    os.makedirs(os.path.dirname(path), exist_ok=True)
    with open(path, "x"):
        pass
