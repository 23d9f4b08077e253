"""mount(2) and its relatives."""

from __future__ import annotations

import ctypes
import os
import struct

from .libc import LIBC, check, syscall

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
