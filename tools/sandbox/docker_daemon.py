"""The Docker daemon: whether it can run sandboxes (what fails is named), and whose its containers are.

A container's owner stands on its labels, so that what a dead process left behind can be told and removed.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from polyturn.tools.sandbox.sandbox import SandboxUnavailable

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


LABEL = "polyturn.sandbox"
"""On every container of ours; its value is the backend's own id."""
_OWNER, _BOOT, _NAMESPACE = "polyturn.owner", "polyturn.boot", "polyturn.pid_namespace"


@dataclass(frozen=True, kw_only=True, slots=True)
class Owner:
    """A process, told apart from any other that had or will have its number."""

    process: str
    """`PID:START`, the start in clock ticks since boot."""
    boot: str
    pid_namespace: str

    @classmethod
    def this_process(cls) -> Self:
        return cls(
            process=f"{os.getpid()}:{_start_time(os.getpid())}",
            boot=Path("/proc/sys/kernel/random/boot_id").read_text().strip(),
            pid_namespace=os.readlink("/proc/self/ns/pid"),
        )

    def labels(self, backend: str) -> dict[str, str]:
        """The labels of a container of that backend."""
        return {LABEL: backend, _OWNER: self.process, _BOOT: self.boot, _NAMESPACE: self.pid_namespace}

    def knows_dead(self, labels: Mapping[str, str], *, running: bool) -> bool:
        """Whether the container with these labels is left over.

        A running one is left over when its owner is of this boot and this pid namespace, and has ended: about owners
        elsewhere (another machine that uses the same daemon, another container that has its socket) nothing is
        known. One that ended by itself is left over when its owner is dead or of another boot of the machine.
        """
        if labels.get(_BOOT) != self.boot:
            return not running
        if labels.get(_NAMESPACE) != self.pid_namespace:
            return False
        pid, _, start = labels.get(_OWNER, "").partition(":")
        return not pid.isdigit() or _start_time(int(pid)) != start


def _start_time(pid: int) -> str:
    """When the process started; empty where there is none of that number."""
    try:
        # The second field is the program's name, which may hold spaces and parentheses.
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19]
    except (FileNotFoundError, ProcessLookupError):
        return ""


def sweep(client: Any, owner: Owner, *, backend: str | None = None) -> int:
    """Removes the containers of dead owners, and all those of `backend`; the number removed.

    `client` is a `docker.DockerClient`. Raises `docker.errors.APIError` where the daemon cannot list them.
    """
    count = 0
    for container in client.containers.list(all=True, filters={"label": LABEL}, sparse=True):
        labels = container.attrs["Labels"]
        # One that is "created" may be about to be started by an owner that lives elsewhere.
        running = container.attrs["State"] not in ("exited", "dead")
        if labels.get(LABEL) == backend or owner.knows_dead(labels, running=running):
            remove(container)
            count += 1
    return count


def remove(container: Any) -> None:
    """Kills and removes a container; one that is gone or going is no error."""
    from docker.errors import APIError, NotFound

    try:
        container.remove(force=True, v=True)
    except NotFound:
        pass
    except APIError as error:
        if error.status_code != 409:  # its removal is in progress already
            raise
