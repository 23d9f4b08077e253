"""Sandboxes from the one backend that a process shares, and what is done when one breaks."""

from __future__ import annotations

import functools
import os
import threading
import weakref
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

from polyturn.tools.sandbox import ExecResult, Limits, Sandbox, SandboxBackend, make_backend

BackendName = Literal["auto", "embedded", "docker"]
NUM_ATTEMPTS = 3
DEFAULT_LIMITS = Limits()


class SandboxFailed(RuntimeError):
    """A sandbox could not run code, and the code is not to blame. Never the model's mistake."""


class SharedSandboxes:
    """A lease on the process's backend of one name: started at the first use, freed with the last lease.

    Safe in threads; in a forked process it begins a lease of that process. A lease that is garbage counts as closed.
    """

    def __init__(self, name: BackendName = "auto") -> None:
        self.name = name
        self._lock = threading.Lock()
        self._release: weakref.finalize[[], SharedSandboxes] | None = None
        self._backend: SandboxBackend | None = None
        self._pid = 0

    def create(self, limits: Limits = DEFAULT_LIMITS) -> Sandbox:
        """A new sandbox. Raises `SandboxUnavailable` where isolation cannot be had."""
        with self._lock:
            if self._backend is None or self._pid != os.getpid():
                shared = _shared(self.name)
                self._backend, self._pid = shared.lease(), shared.pid
                self._release = weakref.finalize(self, shared.release)
            backend = self._backend
        return backend.create(limits)

    def close(self) -> None:
        """End the lease; `create` begins a new one. Calling it again does nothing."""
        with self._lock:
            release, self._release, self._backend = self._release, None, None
        if release is not None:
            release()


@functools.cache
def default_sandboxes() -> SharedSandboxes:
    """A lease on whatever backend works here that lasts as long as the process."""
    return SharedSandboxes()


@dataclass(slots=True)
class _Shared:
    """The backend of one process and name, and how many leases there are on it."""

    name: BackendName
    pid: int
    lock: threading.Lock = field(default_factory=threading.Lock)
    backend: SandboxBackend | None = None
    num_leases: int = 0

    def lease(self) -> SandboxBackend:
        with self.lock:
            if self.backend is None:
                self.backend = make_backend(self.name)
            self.num_leases += 1
            return self.backend

    def release(self) -> None:
        if self.pid != os.getpid():
            return  # a fork must not end what belongs to its parent
        with self.lock:
            self.num_leases -= 1
            if self.num_leases > 0:
                return
            backend, self.backend = self.backend, None
        if backend is not None:
            backend.close()


_all_shared: dict[tuple[int, str], _Shared] = {}
_all_lock = threading.Lock()


def _shared(name: BackendName) -> _Shared:
    pid = os.getpid()
    with _all_lock:
        return _all_shared.setdefault((pid, name), _Shared(name, pid))


def execute(
    sandbox: Sandbox,
    code: str,
    *,
    stdin: str = "",
    arguments: Sequence[str] = (),
    timeout_s: float | None = None,
    fresh: bool = True,
) -> ExecResult:
    """Run code, and tell code that kills sandboxes from sandboxes that fail.

    What could not be set up is tried again.

    A deadline on the clock means little where more runs at once than there are cores, so as many executions as cores
    run at a time in this process. Each ends by its deadline, so nobody waits for ever.

    A result whose status is `sandbox_died` is the code's doing: after it, the sandbox was made anew and works. Names
    and files of before are lost then.

    Raises:
        SandboxFailed: the sandbox does not work, whatever runs in it.
    """
    for _ in range(NUM_ATTEMPTS):
        with _cores():
            result = sandbox.exec(
                printable(code), stdin=printable(stdin), arguments=arguments, timeout_s=timeout_s, fresh=fresh
            )
        if result.status == "sandbox_died":
            sandbox.reset()
            if not sandbox.exec("print('alive')").ok:
                raise SandboxFailed(f"the sandbox died and does not come back: {result.detail}")
            return result
        if result.status != "setup_error":
            return result
        if not sandbox.alive():
            sandbox.reset()
    raise SandboxFailed(f"no code could be started in {NUM_ATTEMPTS} attempts: {result.detail}")


@functools.cache
def _cores() -> threading.Semaphore:
    return threading.Semaphore(max(2, len(os.sched_getaffinity(0))))


os.register_at_fork(after_in_child=_cores.cache_clear)


def printable(text: str) -> str:
    """Text that can be encoded: half a surrogate pair becomes a question mark, as a model may write anything."""
    return text.encode("utf-8", "replace").decode("utf-8")
