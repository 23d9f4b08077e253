"""The nursery: one warm interpreter on the machine itself, of which every sandbox is a fork.

The host starts it as `start.py nursery FD PARENT` and talks to it over FD, a SOCK_SEQPACKET socket that carries JSON
objects. It never sees what code writes, nor runs any. When its socket or its parent ends, it ends, and with it every
sandbox.

`{"op": "prepare", "launcher": "native" | "bubblewrap", "folders": [str], "preload": [str], "layers": {...},
    "first_id": int}`: builds the jail; once. Answer `{"readable": [str], "import_folders": [str], "user_namespace":
    bool}` (paths inside) or `{"failed": step, "message": str}`.
`{"op": "create", "id": int, "disk_bytes": int, "num_files": int}`, with the sandbox's end of a connection.
    Answer `{"pid": int}`: a process that waits on the connection for the byte `g`, and then turns into the sandbox,
    whose runner then serves the connection.
`{"op": "kill", "id": int}`: kills a sandbox and waits until all its processes are gone. Answer `{"said": str}`: what
    bubblewrap complained of, if anything.
"""

from __future__ import annotations

import contextlib
import json
import os
import resource
import secrets
import select
import signal
import socket
import sys
from typing import Any

from . import jail
from .execution import Children
from .jail import Hidden, Layout
from .kernel import PR_SET_CHILD_SUBREAPER, PR_SET_DUMPABLE, PR_SET_PDEATHSIG, prctl
from .launch import (
    CLONE_NEWNS,
    CLONE_NEWUSER,
    SandboxPlan,
    StepFailed,
    allows_user_namespaces,
    become_bubblewrap,
    map_ids,
    start_sandbox,
    unshare,
)
from .serve import add_builtins, preload

MAX_MESSAGE_BYTES = 1 << 16
MAX_BYTES_SAID = 1000
MAX_HOST_IDS = 1 << 27


def main() -> None:
    """Serves until the host is gone."""
    host = socket.socket(fileno=int(sys.argv[2]))
    prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    prctl(PR_SET_DUMPABLE, 1)
    if os.getppid() != int(sys.argv[3]):
        return  # the parent ended before the line above
    prctl(PR_SET_CHILD_SUBREAPER, 1)
    most = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the host, which then closes the connection
    Nursery(host).serve()


class _Sandbox:
    """A sandbox on its way to, or in, life. `process` is the one to kill; its end is the sandbox's end."""

    def __init__(
        self, starter: int, host_id: int | None, adopted: int, report: int, errors: int | None
    ) -> None:
        self.starter = starter
        self.host_id = host_id
        self.adopted = adopted
        self.report = report
        self.errors = errors
        self.process: int | None = None

    def close_pipes(self) -> None:
        """Nothing more is to be said while it starts; descriptors are few, and sandboxes may be many."""
        for fd in filter(None, (self.adopted, self.report)):
            os.close(fd)
        self.adopted = self.report = 0


class Nursery:
    """Makes and ends sandboxes, as the host asks."""

    def __init__(self, host: socket.socket) -> None:
        self._host = host
        self._children = Children()
        self._sandboxes: dict[int, _Sandbox] = {}
        self._launcher = "native"
        self._first_id: int | None = None
        self._num_ids = 0
        self._user_namespace = True
        self._in_jail = False
        self._layers: dict[str, bool] = {}
        self._layout: Layout | None = None
        self._said: dict[int, str] = {}

    def serve(self) -> None:
        """Answers the host, and gives every new process 1 the byte that it waits for."""
        poll = select.poll()
        poll.register(self._host, select.POLLIN)
        poll.register(self._children.wakeup, select.POLLIN)
        while True:
            for fd, _ in poll.poll():
                if fd == self._children.wakeup:
                    self._look_after_children()
                    continue
                data, fds, _, _ = socket.recv_fds(self._host, MAX_MESSAGE_BYTES, 1)
                if not data:
                    return
                answer = self._answer(json.loads(data), fds)
                self._host.send(json.dumps(answer).encode())

    def _answer(self, question: dict[str, Any], fds: list[int]) -> dict[str, Any]:
        try:
            match question["op"]:
                case "prepare":
                    self._prepare(question)
                    assert self._layout is not None
                    return {
                        "readable": self._layout.readable,
                        "import_folders": list(self._layout.import_folders),
                        "user_namespace": self._user_namespace,
                    }
                case "create":
                    return {"pid": self._create(question, fds[0])}
                case "kill":
                    self._kill(question["id"])
                    return {"said": self._said.pop(question["id"], "")}
        except StepFailed as failed:
            return {"failed": failed.step, "message": failed.message}
        except (OSError, ImportError, Hidden) as error:
            return {"failed": question["op"], "message": str(error)}
        finally:
            for fd in fds:
                os.close(fd)
        return {"failed": "question", "message": f"unknown question {question['op']!r}"}

    def _prepare(self, question: dict[str, Any]) -> None:
        self._launcher = question["launcher"]
        self._layers = question["layers"]
        add_builtins()
        num_ids = _num_ids(question["first_id"]) if os.geteuid() == 0 else 0
        is_root = num_ids > 0
        is_native = self._launcher == "native"
        if is_root and self._layers["uid_drop"]:
            self._first_id, self._num_ids = question["first_id"], num_ids
        folder = os.path.dirname(os.path.abspath(__file__))
        self._layout = Layout.of_this_machine(question["folders"], runner=None if is_native else folder)
        if is_root:
            unshare(CLONE_NEWNS, "mount namespace (root needs CAP_SYS_ADMIN)")
        elif is_native:
            user, group = os.getuid(), os.getgid()
            unshare(CLONE_NEWUSER | CLONE_NEWNS, "user namespace")
            prctl(PR_SET_PDEATHSIG, signal.SIGKILL)  # which the new namespace took back
            map_ids(user, group, user, group)
        else:
            return  # bubblewrap makes the root folder, of the paths that this user can reach
        try:
            jail.build(self._layout, share_private_folders=not self._layers["fresh_tmpfs"])
        except OSError as error:
            raise StepFailed("root folder", error) from None
        self._in_jail = True
        if is_native:
            preload(tuple(question["preload"]), self._layout.import_folders)
            if is_root:
                self._user_namespace = self._layers["user_namespace"] and allows_user_namespaces(
                    self._first_id
                )

    def _create(self, question: dict[str, Any], link: int) -> int:
        number = question["id"]
        plan = SandboxPlan(
            host_id=self._new_host_id(),
            disk_bytes=question["disk_bytes"],
            num_files=question["num_files"],
            user_namespace=self._user_namespace,
            own_network=self._layers["network_namespace"],
            own_folders=self._layers["fresh_tmpfs"],
            drop_capabilities=self._layers["drop_capabilities"],
        )
        adopted_theirs, adopted = os.pipe()
        report, report_theirs = os.pipe()
        errors = os.memfd_create("errors") if self._launcher == "bubblewrap" else None
        starter = os.fork()
        if starter == 0:
            if self._launcher == "native":
                start_sandbox(plan, link, adopted_theirs, report_theirs)
            assert self._layout is not None
            assert errors is not None
            become_bubblewrap(plan, self._layout, link, errors, in_jail=self._in_jail)
        os.close(adopted_theirs)
        os.close(report_theirs)
        self._children.watch(starter)
        sandbox = _Sandbox(starter, plan.host_id, adopted, report, errors)
        if self._launcher == "bubblewrap":
            sandbox.process = starter
            sandbox.close_pipes()
        self._sandboxes[number] = sandbox
        return starter

    def _new_host_id(self) -> int | None:
        """A user that no other sandbox has, of this owner or another: the kernel counts processes and more by user."""
        if self._first_id is None:
            return None
        taken = {sandbox.host_id for sandbox in self._sandboxes.values()}
        while (chosen := self._first_id + secrets.randbelow(self._num_ids)) in taken:
            pass
        return chosen

    def _look_after_children(self) -> None:
        """Learns who process 1 of a new sandbox is, once the starter has ended; drops sandboxes that ended."""
        self._children.collect()
        for number, sandbox in list(self._sandboxes.items()):
            if sandbox.process is None and self._children.status(sandbox.starter) is not None:
                self._adopt(sandbox)
            if sandbox.process is not None and self._children.status(sandbox.process) is not None:
                self._drop(number)

    def _adopt(self, sandbox: _Sandbox) -> None:
        """The starter has ended, so that the kernel made this process, a subreaper, the parent of process 1."""
        pid = os.read(sandbox.report, 32)
        if not pid:  # it failed, and told the host why
            sandbox.process = sandbox.starter
            return
        self._children.forget(sandbox.starter)
        sandbox.process = int(pid)
        self._children.watch(sandbox.process)
        with contextlib.suppress(BrokenPipeError):  # it may be dead already; its status comes
            os.write(sandbox.adopted, b"a")
        sandbox.close_pipes()

    def _drop(self, number: int) -> None:
        sandbox = self._sandboxes.pop(number)
        sandbox.close_pipes()
        if sandbox.errors is not None:
            if said := os.pread(sandbox.errors, MAX_BYTES_SAID, 0):
                self._said[number] = said.decode(errors="replace").strip()
            os.close(sandbox.errors)
        if sandbox.process is not None:
            self._children.forget(sandbox.process)

    def _kill(self, number: int) -> None:
        self._look_after_children()
        while (sandbox := self._sandboxes.get(number)) is not None:
            os.kill(sandbox.process or sandbox.starter, signal.SIGKILL)
            select.select([self._children.wakeup], [], [], 0.1)
            self._look_after_children()


def _num_ids(needed_id: int) -> int:
    """How many users there are from that one on, up to as many as are wanted.

    None where this root is one of a user namespace alone, without the other users that root would change to.
    Raises StepFailed where it lacks them although it is root outside, too.
    """
    with open("/proc/self/uid_map") as uid_map:
        ranges = [tuple(map(int, line.split())) for line in uid_map]
    for first, _, size in ranges:
        if first <= needed_id < first + size:
            return min(first + size - needed_id, MAX_HOST_IDS)
    if any(first == 0 and outside == 0 for first, outside, _ in ranges):
        raise StepFailed("change of user", PermissionError("this root has no other user to change to"))
    return 0
