"""Whether there is a Docker daemon that can run sandboxes; what fails is named."""

from __future__ import annotations

import os
import socket
from typing import Any

from polyturn.tools.sandbox.types import SandboxUnavailable

DEFAULT_HOST = "unix:///var/run/docker.sock"
CALL_S = 60


def connect(host: str | None, runtime: str | None) -> tuple[Any, bool]:
    """A `docker.DockerClient`, and whether the daemon maps user ids (rootless, or userns-remap).

    `host` None means what DOCKER_HOST says, or the usual socket. Raises SandboxUnavailable.
    """
    try:
        import docker
        from docker.errors import DockerException
    except ImportError:
        raise SandboxUnavailable(
            "the SDK probe failed: the docker package is missing (pip install polyturn[sandbox])"
        ) from None
    # The variables that the docker program itself reads; they say where the user's daemon is.
    address = host or os.environ.get("DOCKER_HOST") or DEFAULT_HOST
    if address.startswith("unix://"):
        _probe_socket(address.removeprefix("unix://"))
    try:
        client = (
            docker.DockerClient(base_url=host, timeout=CALL_S) if host else docker.from_env(timeout=CALL_S)
        )
    except DockerException as error:
        raise SandboxUnavailable(f"the ping probe failed: {address} does not answer ({error})") from error
    try:
        client.ping()
        maps_users = _probe_daemon(client.info(), runtime)
    except DockerException as error:
        client.close()
        raise SandboxUnavailable(f"the ping probe failed: {address}: {error}") from error
    except SandboxUnavailable:
        client.close()
        raise
    return client, maps_users


def _probe_socket(path: str) -> None:
    with socket.socket(socket.AF_UNIX) as probe:
        probe.settimeout(CALL_S)
        try:
            probe.connect(path)
        except OSError as error:
            raise SandboxUnavailable(
                f"the socket probe failed: {path}: {error.strerror or error} (is dockerd installed and running?)"
            ) from error


def _probe_daemon(info: dict[str, Any], runtime: str | None) -> bool:
    """Refuses a daemon that cannot confine a container as it should; whether it maps user ids."""
    if info.get("OSType") != "linux":
        raise SandboxUnavailable(
            f"the daemon probe failed: it runs {info.get('OSType')} containers, not linux"
        )
    known = sorted(info.get("Runtimes") or {})
    if runtime is not None and runtime not in known:
        raise SandboxUnavailable(
            f"the runtime probe failed: the daemon does not know {runtime!r}, only {', '.join(known)}"
        )
    missing = [name for name in ("MemoryLimit", "PidsLimit") if not info.get(name)]
    if missing:
        raise SandboxUnavailable(f"the daemon probe failed: it cannot set {' and '.join(missing)} (cgroups)")
    security = info.get("SecurityOptions") or []
    if runtime != "runsc" and not any("seccomp" in option for option in security):
        raise SandboxUnavailable("the daemon probe failed: it has no seccomp")
    return any(f"name={kind}" in option for kind in ("userns", "rootless") for option in security)
