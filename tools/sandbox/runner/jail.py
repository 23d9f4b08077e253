"""The root folder that all sandboxes of a nursery share, read-only: built once, in a mount namespace of its own.

Every path inside has parents that anyone may pass, so an interpreter below somebody's private home is reachable after
the user has changed. Paths are opened before the new root hides them, and bound through their descriptors.
"""

from __future__ import annotations

import os
import stat

from .layout import DEVICE_LINKS, DEVICES, ETC, PRIVATE_FOLDERS, Layout
from .mounts import (
    MOUNT_ATTR_NODEV,
    MOUNT_ATTR_NOSUID,
    MOUNT_ATTR_RDONLY,
    bind,
    enter_root,
    make_private,
    mount_tmpfs,
    set_attributes,
)

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
