"""Python that a model wrote: sandboxes from the one backend that a process shares, and tools that run code in them."""

from __future__ import annotations

import functools
import os
import threading
import weakref
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from polyturn.tools.plain import clean_text
from polyturn.tools.sandbox import BackendName, ExecResult, Limits, Sandbox, SandboxBackend, make_backend
from polyturn.tools.tool import StatefulTool, tool
from polyturn.tools.types import ToolError

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
                clean_text(code),
                stdin=clean_text(stdin),
                arguments=arguments,
                timeout_s=timeout_s,
                fresh=fresh,
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


MAX_OUTPUT_CHARS = 8_000
NO_OUTPUT = "(no output; print what you want to see)"


class _SandboxTool(StatefulTool):
    """Holds a sandbox that is made at the first call, and closed with the episode."""

    def __init__(
        self,
        sandboxes: SharedSandboxes | None = None,
        *,
        timeout_s: float = 5.0,
        limits: Limits | None = None,
    ) -> None:
        """
        Args:
            sandboxes: Where the sandbox comes from; None: from whatever backend works here, which then lives as long as
                the process. An environment that frees it in `close` passes a lease of its own.
            timeout_s: Seconds for one call.
            limits: Of the sandbox.
        """
        self._sandboxes = sandboxes or default_sandboxes()
        self._timeout_s = timeout_s
        self._limits = limits or Limits()
        self._sandbox: Sandbox | None = None

    def run(self, code: str, *, stdin: str = "", fresh: bool) -> str:
        """What the code wrote. Raises `ToolError` with the same and the reason where it did not end well."""
        if self._sandbox is None:
            self._sandbox = self._sandboxes.create(self._limits)
        result = execute(self._sandbox, code, stdin=stdin, timeout_s=self._timeout_s, fresh=fresh)
        shown = show(result)
        if result.ok:
            return shown
        raise ToolError(shown)

    def close(self) -> None:
        """Close the sandbox."""
        sandbox, self._sandbox = self._sandbox, None
        if sandbox is not None:
            sandbox.close()


class PythonTool(_SandboxTool):
    """`python(code)`: one interpreter for the episode, whose names live on from call to call (as in ReTool)."""

    @tool(max_output_chars=MAX_OUTPUT_CHARS)
    def python(self, code: str) -> str:
        """Run Python code and get what it prints. Variables and files stay from one call to the next.

        Args:
            code: Python source. Print what you want to see.
        """
        return self.run(code, fresh=False)


class RunCodeTool(_SandboxTool):
    """`run_code(code, stdin)`: a new interpreter for every call."""

    @tool(max_output_chars=MAX_OUTPUT_CHARS)
    def run_code(self, code: str, stdin: str = "") -> str:
        """Run a Python program of its own and get what it prints.

        Args:
            code: Python source of the whole program.
            stdin: What the program reads from its standard input.
        """
        return self.run(code, stdin=stdin, fresh=True)


def show(result: ExecResult) -> str:
    """A result as the model reads it: what was written, then what went wrong."""
    parts: list[Any] = [result.stdout.rstrip("\n"), result.stderr.rstrip("\n")]
    if result.status != "ok":
        parts.append(f"[{result.status}: {result.detail}]")
    elif result.exit_code != 0 and not result.stderr.strip():
        parts.append(f"[exit status {result.exit_code}]")
    if result.status == "ok" and result.detail:
        parts.append(f"[{result.detail}]")
    return "\n".join(part for part in parts if part) or NO_OUTPUT
