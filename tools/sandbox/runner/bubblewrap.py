"""A sandbox made by bubblewrap, for machines that let bubblewrap make namespaces but not us.

A new interpreter starts for each sandbox, since bubblewrap starts a program; and its tmpfs knows no limit of inodes.
"""

from __future__ import annotations

import os
import shutil
import signal
import sys
from typing import NoReturn

from .confine import close_all_but
from .jail import PRIVATE_FOLDERS
from .layout import DEVICE_LINKS, DEVICES, ETC, Layout
from .libc import PR_SET_PDEATHSIG, prctl
from .namespaces import INSIDE_ID, SCRATCH_BYTES, Room, StepFailed, become, tell_failure


def start_room(room: Room, layout: Layout, link: int) -> NoReturn:
    """In a fork of the nursery: turns into bubblewrap, which turns into the runner, which serves `link`.

    `link` is the host's connection, which says `g` when the sandbox may start. Failures go there as a frame.
    """
    try:
        prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        signal.set_wakeup_fd(-1)
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        close_all_but((link,))
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
        for fd in (0, 1):
            os.dup2(link, fd)
        os.execv(program, [program, *arguments(room, layout)])
    except StepFailed as failed:
        tell_failure(link, failed.step, failed.message)
    except OSError as error:
        tell_failure(link, "bubblewrap", str(error))
    finally:
        os._exit(1)


def arguments(room: Room, layout: Layout) -> list[str]:
    """bubblewrap's command line. Opens descriptors that it names, so it belongs into the process that executes it."""
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
    words += [
        "--unshare-uts",
        "--unshare-cgroup-try",
        "--hostname",
        "sandbox",
        "--die-with-parent",
        "--cap-drop",
        "ALL",
    ]
    if room.own_network:
        words.append("--unshare-net")
    for path in layout.shown:
        words += ["--ro-bind", path, path]
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
    start = os.path.join(os.path.dirname(os.path.abspath(__file__)), "start.py")
    return [*words, "--", os.path.realpath(sys.executable), "-s", "-S", "-P", start]
