"""Sandboxes for code that a model wrote: one API, an embedded backend and a Docker backend."""

from __future__ import annotations

from typing import Any, Literal, Protocol

from polyturn.tools.sandbox.docker import DockerBackend
from polyturn.tools.sandbox.embedded import EmbeddedBackend
from polyturn.tools.sandbox.sandbox import ExecResult, Limits, Sandbox, SandboxUnavailable, Status

__all__ = [
    "BackendName",
    "ExecResult",
    "Limits",
    "Sandbox",
    "SandboxBackend",
    "SandboxUnavailable",
    "Status",
    "make_backend",
]

BackendName = Literal["auto", "embedded", "docker"]


class SandboxBackend(Protocol):
    """Makes sandboxes; usable from many threads at a time."""

    name: str

    def create(self, limits: Limits = Limits()) -> Sandbox:  # noqa: B008 - a frozen value
        """A new sandbox with an empty work folder. Raises SandboxUnavailable where isolation cannot be had."""

    def close(self) -> None:
        """Closes every sandbox and frees what the backend holds: pool, processes, containers."""


def make_backend(name: BackendName = "auto", **options: Any) -> SandboxBackend:
    """The backend of that name; `options` go to its constructor.

    `auto` takes the embedded backend where its probes pass, otherwise Docker; `options` then go to the one that is
    taken. Raises SandboxUnavailable, naming every probe that failed, where no isolation can be had: code never runs
    without it.
    """
    if name == "embedded":
        return EmbeddedBackend(**options)
    if name == "docker":
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
