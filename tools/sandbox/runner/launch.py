"""From a fork of the nursery to process 1 of a sandbox: by system calls alone, or by bubblewrap.

Some machines let bubblewrap make namespaces but not us. A new interpreter starts for each such sandbox, since
bubblewrap starts a program. Its tmpfs knows no limit of inodes, so that program mounts its own on top, with the one
capability that it is given, where it is given that, and drops it.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import sys
from dataclasses import dataclass
from typing import NoReturn

from .confine import close_all_but
from .framing import encode, write_all
from .jail import (
    DEVICE_LINKS,
    DEVICES,
    ETC,
    MS_NODEV,
    MS_NOEXEC,
    MS_NOSUID,
    PRIVATE_FOLDERS,
    RUNNER,
    Layout,
    mount,
    mount_tmpfs,
)
from .kernel import LIBC, PR_SET_DUMPABLE, PR_SET_PDEATHSIG, check, drop_bounding_set, prctl
from .serve import serve

INSIDE_ID = 65532
"""The user and the group that code sees itself as."""

CLONE_NEWNS, CLONE_NEWCGROUP, CLONE_NEWUTS, CLONE_NEWIPC = 0x20000, 0x02000000, 0x04000000, 0x08000000
CLONE_NEWUSER, CLONE_NEWPID, CLONE_NEWNET = 0x10000000, 0x20000000, 0x40000000
OF_A_SANDBOX = CLONE_NEWNS | CLONE_NEWCGROUP | CLONE_NEWUTS | CLONE_NEWIPC | CLONE_NEWPID

SCRATCH_BYTES = 16 << 20
"""Size of /tmp and of /dev/shm, at most."""


class StepFailed(Exception):
    """A step of the set-up that the kernel refused."""

    def __init__(self, step: str, error: OSError) -> None:
        super().__init__(step)
        self.step = step
        self.message = str(error)


@dataclass(frozen=True, kw_only=True, slots=True)
class SandboxPlan:
    """One sandbox to be made."""

    host_id: int | None
    """The user and the group that it has outside; None: those of the nursery."""
    disk_bytes: int
    num_files: int
    user_namespace: bool = True
    """Whether the user changes first and then makes the namespaces, below a user namespace of its own; otherwise root
    makes them, for machines that refuse user namespaces to others, and the user changes before anything is served."""
    own_network: bool = True
    own_folders: bool = True
    drop_capabilities: bool = True


def unshare(flags: int, step: str) -> None:
    """unshare(2). Raises StepFailed."""
    try:
        check(LIBC.unshare(flags), "unshare")
    except OSError as error:
        raise StepFailed(step, error) from None


def map_ids(inside_user: int, inside_group: int, user: int, group: int) -> None:
    """Says which user and group outside are which inside a user namespace just entered. Raises StepFailed."""
    try:
        for name, text in (
            ("setgroups", "deny"),
            ("uid_map", f"{inside_user} {user} 1"),
            ("gid_map", f"{inside_group} {group} 1"),
        ):
            with open(f"/proc/self/{name}", "w") as file:
                file.write(text)
    except OSError as error:
        raise StepFailed("map of users", error) from None


def become(host_id: int) -> None:
    """Drops root for good. Raises StepFailed."""
    try:
        os.setgroups([])
        os.setresgid(host_id, host_id, host_id)
        os.setresuid(host_id, host_id, host_id)
    except OSError as error:
        raise StepFailed("change of user", error) from None
    prctl(PR_SET_DUMPABLE, 1)  # or the new user could not write /proc/self/uid_map


def enter_namespaces(plan: SandboxPlan) -> None:
    """Makes a sandbox's namespaces for this process and its next child. Raises StepFailed."""
    flags = OF_A_SANDBOX | (CLONE_NEWNET if plan.own_network else 0)
    if not plan.user_namespace:
        unshare(flags, "namespaces of a sandbox, by root")
        return
    if plan.host_id is not None:
        become(plan.host_id)
    user, group = os.getuid(), os.getgid()
    unshare(flags | CLONE_NEWUSER, "namespaces of a sandbox")
    map_ids(INSIDE_ID, INSIDE_ID, user, group)


def allows_user_namespaces(host_id: int | None) -> bool:
    """Whether a user other than root may make the namespaces; some distributions let only root."""
    plan = SandboxPlan(host_id=host_id, disk_bytes=1, num_files=1)
    pid = os.fork()
    if pid == 0:
        try:
            enter_namespaces(plan)
            os._exit(0)
        finally:
            os._exit(1)
    return os.waitpid(pid, 0)[1] == 0


def start_sandbox(plan: SandboxPlan, link: int, adopted: int, report: int) -> NoReturn:
    """In a fork of the nursery: makes the namespaces, and process 1 in them, and ends.

    `link` is the host's connection, which says `g` when the sandbox may start. Process 1's pid goes to `report`; it
    waits for a byte on `adopted`, which says that the nursery is its parent now. Failures go to the host as a frame
    `{"failed": step, "message": str}`.
    """
    status = 1
    try:
        prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        signal.set_wakeup_fd(-1)
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        close_all_but((link, adopted, report))
        if os.read(link, 1) != b"g":
            os._exit(0)
        enter_namespaces(plan)
        pid = os.fork()
        if pid == 0:
            os.close(report)
            _be_process_one(plan, link, adopted)
        os.write(report, str(pid).encode())
        status = 0
    except StepFailed as failed:
        tell_failure(link, failed.step, failed.message)
    except OSError as error:
        tell_failure(link, "namespaces of a sandbox", str(error))
    finally:
        os._exit(status)


def tell_failure(link: int, step: str, message: str) -> None:
    """The frame that the host gets instead of its first answer."""
    write_all(link, encode({"failed": step, "message": message}))


def _be_process_one(plan: SandboxPlan, link: int, adopted: int) -> NoReturn:
    """Waits for the nursery, mounts the sandbox's own folders, gives up every privilege, and serves."""
    try:
        os.setsid()
        if os.read(adopted, 1) != b"a":
            os._exit(0)
        close_all_but((link,))
        try:
            _mount_own_folders(plan)
            LIBC.sethostname(b"sandbox", 7)
        except OSError as error:
            tell_failure(link, "mounts of a sandbox", str(error))
            os._exit(1)
        if not plan.user_namespace and plan.host_id is not None:
            if plan.drop_capabilities:
                drop_bounding_set()  # which needs root
            become(plan.host_id)
        prctl(PR_SET_PDEATHSIG, signal.SIGKILL)  # a change of user takes it back, so not before
        os.chdir("/")
        serve(link, link, drop_privileges=plan.drop_capabilities)
    finally:
        os._exit(1)


def _mount_own_folders(plan: SandboxPlan) -> None:
    flags = MS_NOSUID | MS_NODEV | MS_NOEXEC
    try:
        mount("proc", "/proc", "proc", flags, "subset=pid")  # nothing but processes, from Linux 5.8
    except OSError:
        mount("proc", "/proc", "proc", flags)
    if plan.own_folders:
        owner = None if plan.user_namespace else plan.host_id
        mount_private_folders(plan.disk_bytes, plan.num_files, owner=owner)


def mount_private_folders(disk_bytes: int, num_files: int, *, owner: int | None = None) -> None:
    """Empty folders in memory, with bounds, where every sandbox has its own. Raises OSError."""
    for path, mode in PRIVATE_FOLDERS.items():
        size = disk_bytes if path == "/work" else min(disk_bytes, SCRATCH_BYTES)
        mount_tmpfs(path, size=size, num_inodes=num_files, mode=mode, owner=owner)


def become_bubblewrap(
    plan: SandboxPlan, layout: Layout, link: int, errors: int, *, in_jail: bool
) -> NoReturn:
    """As `start_sandbox`, by bubblewrap: turns into bubblewrap, which turns into the runner, which serves `link`.

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
        if plan.host_id is not None:
            become(plan.host_id)
        program = shutil.which("bwrap")
        if program is None:
            tell_failure(link, "bubblewrap", "there is no program bwrap")
            os._exit(1)
        os.setsid()
        prctl(PR_SET_PDEATHSIG, signal.SIGKILL)  # which a change of user takes back
        os.dup2(link, 0)
        os.dup2(link, 1)
        os.dup2(errors, 2)
        os.execv(program, [program, *bubblewrap_arguments(plan, layout, in_jail=in_jail)])
    except StepFailed as failed:
        tell_failure(link, failed.step, failed.message)
    except OSError as error:
        tell_failure(link, "bubblewrap", str(error))
    finally:
        os._exit(1)


def bubblewrap_arguments(plan: SandboxPlan, layout: Layout, *, in_jail: bool) -> list[str]:
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
    if plan.own_network:
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
        size = plan.disk_bytes if path == "/work" else min(plan.disk_bytes, SCRATCH_BYTES)
        words += ["--perms", mode, "--size", str(size), "--tmpfs", path]
    words += ["--remount-ro", "/", "--chdir", "/"]
    program = [os.path.realpath(sys.executable), "-s", "-S", "-P", f"{RUNNER}/start.py", "launch"]
    return [*words, "--", *program, str(plan.disk_bytes), str(plan.num_files)]


def main() -> None:
    """Inside what bubblewrap made: bounds the private folders as far as this process may, and serves."""
    with contextlib.suppress(PermissionError):  # then bubblewrap's own bound the bytes alone
        mount_private_folders(int(sys.argv[2]), int(sys.argv[3]))
    serve(0, 1)
