"""Sandboxes for code that a model wrote: one API, an embedded backend and a Docker backend.

What every backend promises stands here: limits, results, and the `Sandbox` that an episode holds.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from types import TracebackType
from typing import Any, Literal, Protocol, Self

__all__ = [
    "ExecResult",
    "Limits",
    "Sandbox",
    "SandboxBackend",
    "SandboxUnavailable",
    "Status",
    "make_backend",
]

Status = Literal["ok", "timeout", "oom", "output_limit", "sandbox_died", "setup_error"]
"""How an execution ended.

- `ok`: the code ran to its end, whatever its exit status (an uncaught exception is `ok` with exit code 1).
- `timeout`: the deadline, or the limit of CPU seconds, ended it.
- `oom`: the memory limit ended it (a `MemoryError` that the code itself raised and did not catch counts too).
- `output_limit`: it wrote more than it may; what came before the limit is kept.
- `sandbox_died`: the sandbox itself went away; `reset` or a new sandbox is needed when `alive()` is False.
- `setup_error`: the execution could not be set up, so the code did not run. Says nothing about the code.
"""

MIB = 1 << 20


class SandboxUnavailable(RuntimeError):
    """No isolation can be had on this machine; the message names the probe that failed and what would help."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Limits:
    """What one sandbox may use. Every value is a maximum; all are enforced outside the code's reach."""

    wall_s: float = 10.0
    """Seconds on the clock for one execution, where `exec` is not given a timeout."""
    cpu_s: int = 10
    """CPU seconds of one process."""
    memory_bytes: int = 256 * MIB
    """Memory of the code: address space per process, and of all processes together where cgroups are writable."""
    output_bytes: int = 64 * 1024
    """Bytes of stdout, and as many of stderr, that an execution may write."""
    num_processes: int = 32
    """Processes and threads of the code that live at a time."""
    file_bytes: int = 16 * MIB
    """Size of a file."""
    disk_bytes: int = 64 * MIB
    """Size of the work folder, which lives in memory."""
    num_files: int = 4096
    """Files and folders in the work folder."""
    num_open_files: int = 256
    """File descriptors of one process."""

    def __post_init__(self) -> None:
        for field in fields(self):
            if getattr(self, field.name) <= 0:
                raise ValueError(f"Limits.{field.name} must be positive, got {getattr(self, field.name)!r}")


@dataclass(frozen=True, kw_only=True, slots=True)
class ExecResult:
    """What an execution did, seen from outside the sandbox."""

    status: Status
    stdout: str
    """What the code wrote, decoded as UTF-8 with replacement characters, at most `Limits.output_bytes`."""
    stderr: str
    exit_code: int | None
    """The exit status; minus the signal's number where a signal ended the process; None where it did not end."""
    seconds: float
    """Wall-clock seconds from the request to the result, as the host measured them."""
    detail: str = ""
    """One sentence for a person (or a model) about a status other than `ok`; empty otherwise."""
    left_files: bool = False
    """Whether there is anything now in the folders that code may write to, which the next execution would find."""

    @property
    def ok(self) -> bool:
        """Whether the code ran to its end and exited with 0."""
        return self.status == "ok" and self.exit_code == 0


class Sandbox(Protocol):
    """One isolated place to run Python, with a work folder of its own that lives until `reset` or `close`.

    One execution at a time: calls from several threads wait for each other.
    """

    def exec(
        self,
        code: str,
        *,
        stdin: str = "",
        arguments: Sequence[str] = (),
        timeout_s: float | None = None,
        fresh: bool = True,
    ) -> ExecResult:
        """Runs Python source in the work folder.

        `fresh=True` takes a new interpreter process. `fresh=False` takes the sandbox's persistent interpreter, whose
        names live on from one such call to the next; when it is killed (a timeout, say) its names are lost, `detail`
        says so and the next call starts a new one. Files live on either way.

        Never raises for what the code does. Raises ValueError for a closed sandbox or arguments that make no sense.
        """

    def read_file(self, path: str, *, max_bytes: int = MIB) -> bytes:
        """The contents of a regular file, `path` relative to the work folder.

        Raises FileNotFoundError, IsADirectoryError, PermissionError (the code took the permission away), or
        ValueError where the path leaves the work folder (by `..`, an absolute path or any symbolic link), is not a
        regular file, or the file is larger than `max_bytes`.
        """

    def write_file(self, path: str, data: bytes) -> None:
        """Writes a file, making its parent folders; `path` relative to the work folder.

        Raises ValueError where the path leaves the work folder, and OSError where the file does not fit.
        """

    def reset(self) -> None:
        """Kills whatever runs, and empties the work folder; a sandbox that died is alive again afterwards.

        Raises SandboxUnavailable where a new one cannot be had.
        """

    def alive(self) -> bool:
        """Whether the next `exec` can run."""

    def close(self) -> None:
        """Kills whatever runs and frees everything; again is harmless."""

    def __enter__(self) -> Self: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...


class SandboxBackend(Protocol):
    """Makes sandboxes; usable from many threads at a time."""

    name: str

    def create(self, limits: Limits = Limits()) -> Sandbox:
        """A new sandbox with an empty work folder. Raises SandboxUnavailable where isolation cannot be had."""

    def close(self) -> None:
        """Closes every sandbox and frees what the backend holds: pool, processes, containers."""


BackendName = Literal["auto", "embedded", "docker"]


def make_backend(name: BackendName = "auto", **options: Any) -> SandboxBackend:
    """The backend of that name; `options` go to its constructor.

    `auto` takes the embedded backend where its probes pass, otherwise Docker; `options` then go to the one that is
    taken. Raises SandboxUnavailable, naming every probe that failed, where no isolation can be had: code never runs
    without it.
    """
    if name == "embedded":
        from polyturn.tools.sandbox.embedded import EmbeddedBackend

        return EmbeddedBackend(**options)
    if name == "docker":
        from polyturn.tools.sandbox.docker import DockerBackend

        return DockerBackend(**options)
    if name == "auto":
        failures = []
        for candidate in ("embedded", "docker"):
            try:
                return make_backend(candidate, **options)
            except SandboxUnavailable as unavailable:
                failures.append(f"{candidate}: {unavailable}")
        raise SandboxUnavailable("no sandbox backend works here; " + "; ".join(failures))
    raise ValueError(f"unknown sandbox backend {name!r}; there are 'auto', 'embedded' and 'docker'")
