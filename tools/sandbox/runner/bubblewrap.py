"""A sandbox made by bubblewrap, for machines that let bubblewrap make namespaces but not us.

A new interpreter starts for each sandbox, since bubblewrap starts a program. Its tmpfs knows no limit of inodes, so
that program mounts its own on top, with the one capability that it is given, where it is given that, and drops it.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import sys
from typing import NoReturn

from .confine import close_all_but
from .layout import DEVICE_LINKS, DEVICES, ETC, PRIVATE_FOLDERS, RUNNER, Layout
from .libc import PR_SET_PDEATHSIG, prctl
from .namespaces import (
    INSIDE_ID,
    SCRATCH_BYTES,
    Room,
    StepFailed,
    become,
    mount_private_folders,
    tell_failure,
)
from .serve import serve


def start_room(room: Room, layout: Layout, link: int, errors: int, *, in_jail: bool) -> NoReturn:
    """In a fork of the nursery: turns into bubblewrap, which turns into the runner, which serves `link`.

    `link` is the host's connection, which says `g` when the sandbox may start. Failures go there as a frame; what
    bubblewrap itself has to say goes to `errors`.
    """
    try:
        prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        signal.set_wakeup_fd(-1)
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        close_all_but((link, errors))
        if os.read(link, 1) != b"g":
            os._exit(0)
        if room.host_id is not None:
            become(room.host_id)
        program = shutil.which("bwrap")
        if program is None:
            tell_failure(link, "bubblewrap", "there is no program bwrap")
            os._exit(1)
        os.setsid()
        prctl(PR_SET_PDEATHSIG, signal.SIGKILL)  # which a change of user takes back
        os.dup2(link, 0)
        os.dup2(link, 1)
        os.dup2(errors, 2)
        os.execv(program, [program, *arguments(room, layout, in_jail=in_jail)])
    except StepFailed as failed:
        tell_failure(link, failed.step, failed.message)
    except OSError as error:
        tell_failure(link, "bubblewrap", str(error))
    finally:
        os._exit(1)


def arguments(room: Room, layout: Layout, *, in_jail: bool) -> list[str]:
    """bubblewrap's command line; in a jail, things already are where they are to be inside.

    Opens descriptors that the words name, so it belongs into the process that executes them.
    """
    inside = str(INSIDE_ID)
    words = [
        "--unshare-user",
        "--uid",
        inside,
        "--gid",
        inside,
        "--unshare-pid",
        "--as-pid-1",
        "--unshare-ipc",
    ]
    words += ["--unshare-uts", "--unshare-cgroup-try", "--hostname", "sandbox", "--die-with-parent"]
    words += ["--cap-drop", "ALL", "--cap-add", "CAP_SYS_ADMIN"]
    if room.own_network:
        words.append("--unshare-net")
    for path, target in layout.shown:
        words += ["--ro-bind", target if in_jail else path, target]
    if not in_jail:
        for path in layout.hidden:
            words += ["--tmpfs", path, "--remount-ro", path]
    for path, target in layout.links:
        words += ["--symlink", target, path]
    words += ["--proc", "/proc", "--dir", "/dev"]
    for name in DEVICES:
        words += ["--dev-bind", f"/dev/{name}", f"/dev/{name}"]
    for name, target in DEVICE_LINKS.items():
        words += ["--symlink", target, f"/dev/{name}"]
    for name, text in ETC.items():
        fd = os.memfd_create(name, 0)
        os.write(fd, text.encode())
        os.lseek(fd, 0, os.SEEK_SET)
        words += ["--file", str(fd), f"/etc/{name}"]
    for path, mode in PRIVATE_FOLDERS.items():
        size = room.disk_bytes if path == "/work" else min(room.disk_bytes, SCRATCH_BYTES)
        words += ["--perms", mode, "--size", str(size), "--tmpfs", path]
    words += ["--remount-ro", "/", "--chdir", "/"]
    program = [os.path.realpath(sys.executable), "-s", "-S", "-P", f"{RUNNER}/start.py", "bubblewrap"]
    return [*words, "--", *program, str(room.disk_bytes), str(room.num_files)]


def main() -> None:
    """Inside: bounds the private folders as far as this process may, and serves."""
    with contextlib.suppress(PermissionError):  # then bubblewrap's own bound the bytes alone
        mount_private_folders(int(sys.argv[2]), int(sys.argv[3]))
    serve(0, 1)
