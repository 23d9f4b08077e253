"""The embedded sandbox backend: namespaces, landlock, seccomp, rlimits and cgroups, with nothing to install.

Its sandboxes are forks of a nursery, in namespaces of their own.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import queue
import shutil
import socket
import subprocess
import threading
import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from polyturn.tools.sandbox.cgroups import Cgroup, CgroupParent, CgroupsUnavailable
from polyturn.tools.sandbox.nursery import Layers, Nursery, NurseryGone
from polyturn.tools.sandbox.runner import kernel
from polyturn.tools.sandbox.sandbox import (
    MIB,
    Limits,
    Link,
    LinkEnded,
    Runner,
    Sandbox,
    SandboxUnavailable,
)

__all__ = ["EmbeddedBackend", "Finding", "Layers", "probe", "summary"]


class NurseryRunner(Runner):
    """A runner in a fork of a nursery."""

    def __init__(self, nursery: Nursery, number: int, link: Link, cgroup: Cgroup | None) -> None:
        super().__init__(link)
        self._nursery = nursery
        self._number = number
        self._cgroup = cgroup
        self.dropped: weakref.finalize[Any, Any] | None = None
        """What is done where nobody closes it."""

    def ran_out_of_memory(self, mark: float) -> bool:
        return self.memory_mark() > mark

    def memory_mark(self) -> float:
        """How many processes the kernel has killed for want of memory; 0 where no cgroup counts them."""
        if self._cgroup is None or self._closed:
            return 0
        try:
            return self._cgroup.num_oom_kills()
        except FileNotFoundError:
            return 0  # closed meanwhile, by another thread

    def _end(self) -> None:
        if self.dropped is not None:
            self.dropped.detach()
        with contextlib.suppress(NurseryGone):  # and with it the sandbox
            self._nursery.kill(self._number)
        with self._asking:  # which ends now
            self._link.close()
        if self._cgroup is not None:
            self._cgroup.close()


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
        self._runners: weakref.WeakSet[NurseryRunner] = weakref.WeakSet()
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

    def create(self, limits: Limits | None = None) -> Sandbox:
        """A new sandbox; see `SandboxBackend.create`."""
        return Sandbox(limits if limits is not None else Limits(), self._start_runner)

    def close(self) -> None:
        """Closes every sandbox and ends the nursery; again is harmless."""
        with self._lock:
            self._closed = True
            for runner in list(self._runners):
                runner.close()
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

    def _start_runner(self, limits: Limits) -> NurseryRunner:
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
            runner = NurseryRunner(nursery, number, link, cgroup)
            # Of a runner that nobody holds any more only this much is left; a player must not wait for locks.
            runner.dropped = weakref.finalize(runner, self._dropped.put, (nursery, number, cgroup))
            runner.dropped.atexit = False
        except (OSError, LinkEnded, NurseryGone) as error:
            said = _abandon(nursery, number, link, cgroup)
            raise SandboxUnavailable(f"start of a sandbox: {said or error}") from error
        except SandboxUnavailable:
            _abandon(nursery, number, link, cgroup)
            raise
        if "failed" in answer:
            runner.close()
            raise SandboxUnavailable(f"{answer['failed']}: {answer['message']}")
        self.landlock_abi: int = answer["landlock"]
        self._runners.add(runner)
        return runner

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
            **limits.of_an_execution,
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


@dataclass(frozen=True, kw_only=True, slots=True)
class Finding:
    """One thing that was tried."""

    name: str
    works: bool
    needed: bool
    """Whether there are no embedded sandboxes without it."""
    detail: str


def probe() -> tuple[Finding, ...]:
    """Makes a sandbox, runs code in it, and says which walls stand. Takes a fraction of a second; never raises."""
    machine = os.uname().machine
    known = machine in kernel.AUDIT_ARCHITECTURES
    abi = kernel.abi()
    bubblewrap = _bubblewrap_version()
    findings = [
        Finding(
            name="seccomp", works=known, needed=True, detail=machine if known else f"no filter for {machine}"
        ),
        Finding(
            name="landlock",
            works=abi > 0,
            needed=False,
            detail=f"ABI {abi}"
            if abi
            else "not in this kernel, or switched off: file access rests on mounts alone",
        ),
        Finding(
            name="bubblewrap",
            works=bubblewrap is not None,
            needed=False,
            detail=bubblewrap or "not installed",
        ),
    ]
    try:
        backend = EmbeddedBackend()
    except SandboxUnavailable as unavailable:
        failure = Finding(name="sandbox", works=False, needed=True, detail=str(unavailable))
        return (failure, *findings)
    try:
        sandbox = Finding(name="sandbox", works=True, needed=True, detail=f"{backend.launcher} namespaces")
        users = Finding(
            name="user namespace",
            works=backend.user_namespace,
            needed=False,
            detail=""
            if backend.user_namespace
            else "refused to users other than root; root makes the others",
        )
        cgroup = Finding(
            name="cgroup",
            works=not backend.no_cgroups,
            needed=False,
            detail=backend.no_cgroups and f"memory is limited per process only: {backend.no_cgroups}",
        )
        return (sandbox, *findings, users, cgroup)
    finally:
        backend.close()


def summary(findings: tuple[Finding, ...]) -> str:
    """One line: what works, or the first thing needed that does not."""
    for finding in findings:
        if finding.needed and not finding.works:
            return f"unavailable: {finding.name}: {finding.detail}"
    walls = [finding.name for finding in findings[1:] if finding.works and finding.name != "bubblewrap"]
    missing = [
        f"no {finding.name} ({finding.detail})"
        for finding in findings
        if not finding.works and finding.detail
    ]
    missing = [text for text in missing if not text.startswith("no bubblewrap")]
    return "; ".join([f"{findings[0].detail}, {', '.join(walls)}", *missing])


def _bubblewrap_version() -> str | None:
    program = shutil.which("bwrap")
    if program is None:
        return None
    done = subprocess.run([program, "--version"], capture_output=True, text=True, timeout=10, check=False)
    return done.stdout.strip() or None
