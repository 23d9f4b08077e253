"""The embedded backend: sandboxes as forks of a nursery, in namespaces of their own."""

from __future__ import annotations

import contextlib
import itertools
import os
import queue
import socket
import threading
import weakref
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from polyturn.tools.sandbox.embedded.cgroups import Cgroup, CgroupParent, CgroupsUnavailable
from polyturn.tools.sandbox.embedded.layers import Layers
from polyturn.tools.sandbox.embedded.link import Link
from polyturn.tools.sandbox.embedded.nursery import Nursery, NurseryGone
from polyturn.tools.sandbox.embedded.room import NurseryRoom
from polyturn.tools.sandbox.runner_sandbox import LinkEnded, RunnerSandbox
from polyturn.tools.sandbox.types import MIB, Limits, SandboxUnavailable

Launcher = Literal["auto", "native", "bubblewrap"]
CONFIGURE_TIMEOUT_S = 60.0
SCRATCH_BYTES = 32 * MIB
"""/tmp and /dev/shm together."""
NUM_OWN_PROCESSES = 3
"""Processes of a sandbox that are not the code's: bubblewrap, the runner, a persistent interpreter."""


class EmbeddedBackend:
    """Sandboxes on this machine, with nothing to install. Thread-safe.

    `packages` are folders, such as a site-packages, from which code may import: they are shown read-only. `preload`
    names modules that are imported once and for all, so that code gets them for nothing (they must come from the
    standard library or from `packages`, and start no threads).

    `launcher` says who makes the namespaces: this program itself (`native`, where every sandbox is a fork of a warm
    interpreter), or `bubblewrap`, which some machines let do what they refuse others; `auto` prefers the former.

    `layers` is for tests alone: see `Layers`.

    The constructor makes a sandbox and runs code in it; it raises SandboxUnavailable, naming the step that failed,
    where that does not work.
    """

    name = "embedded"

    def __init__(
        self,
        *,
        packages: Sequence[str | Path] = (),
        preload: Sequence[str] = (),
        launcher: Launcher = "auto",
        layers: Layers | None = None,
    ) -> None:
        self._packages = [str(Path(folder).resolve(strict=True)) for folder in packages]
        self._preload = list(preload)
        self._layers = Layers() if layers is None else layers
        self._lock = threading.Lock()
        self._numbers = itertools.count(1)
        self._rooms: weakref.WeakSet[NurseryRoom] = weakref.WeakSet()
        self._dropped: queue.SimpleQueue[tuple[Nursery, int, Cgroup | None]] = queue.SimpleQueue()
        self._closed = False
        self._cgroups, self.no_cgroups = _find_cgroups(self._layers)
        self._nursery: Nursery | None = None
        self.launcher = launcher
        try:
            self._choose_launcher(launcher)
        except BaseException:
            self.close()
            raise

    def create(self, limits: Limits | None = None) -> RunnerSandbox:
        """A new sandbox; see `SandboxBackend.create`."""
        return RunnerSandbox(limits if limits is not None else Limits(), self._make_room)

    def close(self) -> None:
        """Closes every sandbox and ends the nursery; again is harmless."""
        with self._lock:
            self._closed = True
            for room in list(self._rooms):
                room.close()
            self._end_nursery()
            if self._cgroups is not None:
                self._cgroups.close()
                self._cgroups = None

    def _choose_launcher(self, launcher: Launcher) -> None:
        """Settles on the first launcher with which a sandbox runs code."""
        if launcher not in ("auto", "native", "bubblewrap"):
            raise ValueError(f"unknown launcher {launcher!r}; there are 'auto', 'native' and 'bubblewrap'")
        failures = []
        for candidate in ("native", "bubblewrap") if launcher == "auto" else (launcher,):
            self.launcher = candidate
            try:
                with self.create() as sandbox:
                    result = sandbox.exec("print(6 * 7)")
                if result.stdout == "42\n":
                    return
                failures.append(
                    f"{candidate}: first code: {result.status} {result.detail}{result.stderr}".strip()
                )
            except SandboxUnavailable as unavailable:
                failures.append(f"{candidate}: {unavailable}")
            with self._lock:
                self._end_nursery()
        raise SandboxUnavailable("; ".join(failures))

    def _end_nursery(self) -> None:
        if self._nursery is not None:
            self._finalizer()
            self._nursery = None

    def _running_nursery(self) -> Nursery:
        """The nursery; a new one where it has ended. Raises SandboxUnavailable."""
        with self._lock:
            if self._closed:
                raise ValueError("the sandbox backend is closed")
            if self._nursery is not None and self._nursery.alive():
                return self._nursery
            self._end_nursery()
            try:
                nursery = Nursery()
            except OSError as error:
                raise SandboxUnavailable(f"start of an interpreter: {error}") from error
            try:
                prepared = nursery.prepare(
                    launcher=self.launcher, folders=self._packages, preload=self._preload, layers=self._layers
                )
            except (SandboxUnavailable, NurseryGone) as error:
                nursery.close()
                raise SandboxUnavailable(str(error)) from None
            self._nursery = nursery
            self._finalizer = weakref.finalize(self, _close_nursery, nursery, os.getpid())
            self._readable, self._import_folders = prepared["readable"], prepared["import_folders"]
            self.user_namespace: bool = prepared["user_namespace"]
            return nursery

    def _make_room(self, limits: Limits) -> NurseryRoom:
        nursery = self._running_nursery()
        self._free_dropped()
        number = next(self._numbers)
        ours, theirs = socket.socketpair()
        cgroup = None
        link = Link(ours)
        try:
            with theirs:
                pid = nursery.create(number, theirs, disk_bytes=limits.disk_bytes, num_files=limits.num_files)
            cgroup = self._make_cgroup(number, limits)
            if cgroup is not None:
                cgroup.add(pid)
            ours.sendall(b"g")
            answer, _ = link.ask(
                self._configuration(limits, cgroup), within_s=CONFIGURE_TIMEOUT_S, max_body_bytes=0
            )
            room = NurseryRoom(nursery, number, link, cgroup)
            # Of a room that nobody holds any more only this much is left; a collector must not wait for locks.
            room.dropped = weakref.finalize(room, self._dropped.put, (nursery, number, cgroup))
            room.dropped.atexit = False
        except (OSError, LinkEnded, NurseryGone) as error:
            said = _abandon(nursery, number, link, cgroup)
            raise SandboxUnavailable(f"start of a sandbox: {said or error}") from error
        except SandboxUnavailable:
            _abandon(nursery, number, link, cgroup)
            raise
        if "failed" in answer:
            room.close()
            raise SandboxUnavailable(f"{answer['failed']}: {answer['message']}")
        self.landlock_abi: int = answer["landlock"]
        self._rooms.add(room)
        return room

    def _free_dropped(self) -> None:
        """Frees what sandboxes had that nobody closed before they were garbage."""
        while not self._dropped.empty():
            nursery, number, cgroup = self._dropped.get()
            with contextlib.suppress(NurseryGone):
                nursery.kill(number)
            if cgroup is not None:
                cgroup.close()

    def _make_cgroup(self, number: int, limits: Limits) -> Cgroup | None:
        if self._cgroups is None:
            return None
        return self._cgroups.make(
            str(number),
            memory_bytes=limits.memory_bytes + limits.disk_bytes + SCRATCH_BYTES,
            num_processes=limits.num_processes + NUM_OWN_PROCESSES,
        )

    def _configuration(self, limits: Limits, cgroup: Cgroup | None) -> dict[str, object]:
        layers = self._layers
        return {
            "op": "configure",
            "memory_bytes": limits.memory_bytes,
            "cpu_s": limits.cpu_s,
            "output_bytes": limits.output_bytes,
            "num_processes": limits.num_processes,
            "file_bytes": limits.file_bytes,
            "num_open_files": limits.num_open_files,
            "readable": self._readable,
            "import_folders": self._import_folders,
            "preload": self._preload if self.launcher == "bubblewrap" else [],
            "rlimits": layers.rlimits,
            "landlock": layers.landlock,
            "seccomp": layers.seccomp,
            "deny_memfd": cgroup is None and layers.cgroup,
            "kill_all": layers.kill_all,
            "oom_score": layers.oom_score,
        }


def _find_cgroups(layers: Layers) -> tuple[CgroupParent | None, str]:
    """Where to make cgroups, or why there are none."""
    if not layers.cgroup:
        return None, "switched off"
    try:
        return CgroupParent.find(), ""
    except CgroupsUnavailable as unavailable:
        return None, str(unavailable)


def _abandon(nursery: Nursery, number: int, link: Link, cgroup: Cgroup | None) -> str:
    """Frees what a sandbox that could not be started had; what bubblewrap complained of."""
    said = ""
    with contextlib.suppress(NurseryGone):
        said = nursery.kill(number)
    link.close()
    if cgroup is not None:
        cgroup.close()
    return said


def _close_nursery(nursery: Nursery, owner: int) -> None:
    """At the end of the backend or the program, but not in a fork of the program."""
    if os.getpid() == owner:
        nursery.close()
