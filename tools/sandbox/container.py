"""Containers of any image, in which commands run as on a machine of their own: tasks that bring an image, and programs
that act as agents.

The image needs nothing of ours, only `sh`. Whoever acts inside may be root there, so nothing inside is asked for the
truth: the daemon reads and writes the files, and ends the processes by ending the container.
"""

from __future__ import annotations

import contextlib
import functools
import io
import tarfile
import uuid
from collections.abc import Generator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol, runtime_checkable

from polyturn.tools.closing import Closing
from polyturn.tools.sandbox.container_command import (
    KILL_S,
    REPORT_AND_RUN,
    REPORT_AND_RUN_WITH_STDIN,
    Command,
    CommandResult,
    ContainerFailed,
    docker_errors,
)
from polyturn.tools.sandbox.docker_daemon import Owner, connect, remove, sweep
from polyturn.tools.sandbox.sandbox import MIB

NetworkMode = Literal["none", "bridge"]
RUNTIME = "runc"
"""Not gVisor, even where that is the daemon's default: it keeps files in its own memory, from where neither the daemon
nor the next start of the container gets them, and shares no network with a helper."""

CAPABILITIES = ("CHOWN", "DAC_OVERRIDE", "FOWNER", "FSETID", "KILL", "NET_BIND_SERVICE", "SETGID", "SETUID")
"""What root inside may do: to own files and processes of the container. Not to make devices, raw packets or mounts."""

_STAY = "trap 'exit 0' TERM; while :; do sleep 3600 & wait $!; done"
"""Process 1: it lives as long as the container, and reaps what others left."""
_CONFLICT = 409


class ContainerBroken(RuntimeError):
    """The container does not start any more, because of what was done in it."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ContainerLimits:
    """What a container may use, all its commands together."""

    cpus: float = 1.0
    """CPU seconds per second."""
    memory_bytes: int = 2048 * MIB
    """Memory, without swap; the kernel kills what asks for more."""
    disk_bytes: int = 10240 * MIB
    """Of the files that it adds to its image. Kept by the daemon's storage where that can; else it is looked at while
    commands run."""
    num_processes: int = 512


class Containers(Closing):
    """A connection to a daemon, and the containers that were started over it. Usable from several threads.

    Args:
        host: The daemon's address; by default what DOCKER_HOST says, or the usual socket.

    Raises SandboxUnavailable, naming the probe that failed.
    """

    def __init__(self, *, host: str | None = None) -> None:
        self.client, _ = connect(host, None)
        self._id = uuid.uuid4().hex
        self._owner = Owner.this_process()
        self._keeps_disk_limits = True
        try:
            with docker_errors("looking for containers that dead processes left"):
                sweep(self.client, self._owner)
        except BaseException:
            self.client.close()
            raise

    def start(
        self,
        image: str,
        *,
        limits: ContainerLimits,
        network: NetworkMode = "none",
        environment: Mapping[str, str] | None = None,
        workdir: str | None = None,
    ) -> Container:
        """A container of that image, which the daemon has, that waits for commands. Raises ContainerFailed."""
        options = container_options(limits, network=network, environment=environment or {}, workdir=workdir)
        with docker_errors(f"starting a container of {image}"):
            handle = self._create(image, limits, options)
            try:
                handle.start()
            except BaseException:
                remove(handle)
                raise
        return Container(handle, limits, keeps_disk_limit=self._keeps_disk_limits)

    def start_beside(self, container: Container, image: str, command: Sequence[str], **options: Any) -> Any:
        """A helper of ours in the network of another container: a `docker.models.containers.Container`."""
        with docker_errors("starting a container beside another"):
            handle = self.client.containers.create(
                image,
                entrypoint=command[:1],
                command=command[1:],
                runtime=RUNTIME,
                network_mode=f"container:{container.id}",
                labels=self._owner.labels(self._id),
                **options,
            )
            try:
                handle.start()
            except BaseException:
                remove(handle)
                raise
            return handle

    def close(self) -> None:
        """Removes every container that was started here. Again is harmless."""
        try:
            with docker_errors("removing containers"):
                sweep(self.client, self._owner, backend=self._id)
        finally:
            self.client.close()

    def _create(self, image: str, limits: ContainerLimits, options: dict[str, Any]) -> Any:
        from docker.errors import APIError

        create = functools.partial(
            self.client.containers.create,
            image,
            entrypoint=["sh", "-c", _STAY],
            command=[],
            labels=self._owner.labels(self._id),
            **options,
        )
        if not self._keeps_disk_limits:
            return create()
        try:
            return create(storage_opt={"size": str(limits.disk_bytes)})
        except APIError as error:
            # Few kinds of storage have quotas, and which is not told before.
            if "storage" not in str(error.explanation).lower():
                raise
            self._keeps_disk_limits = False
            return create()


def container_options(
    limits: ContainerLimits,
    *,
    network: NetworkMode,
    environment: Mapping[str, str],
    workdir: str | None,
) -> dict[str, Any]:
    """The keyword arguments of `client.containers.create`, beside image, command and labels."""
    from docker.types import LogConfig, Ulimit

    options: dict[str, Any] = {
        "runtime": RUNTIME,
        "hostname": "task",
        "network_mode": network,
        "environment": dict(environment),
        "nano_cpus": int(limits.cpus * 1e9),
        "mem_limit": limits.memory_bytes,
        "memswap_limit": limits.memory_bytes,
        "pids_limit": limits.num_processes,
        "oom_score_adj": 500,
        "cap_drop": ["ALL"],
        "cap_add": list(CAPABILITIES),
        "security_opt": ["no-new-privileges:true"],
        "log_config": LogConfig(type="none"),
        "healthcheck": {"test": ["NONE"]},
        "ulimits": [Ulimit(name="core", soft=0, hard=0)],
        "user": "0",
    }
    if workdir is not None:
        options["working_dir"] = workdir
    return options


class Container:
    """A container that commands run in, one after the other or side by side, until it is closed."""

    def __init__(self, handle: Any, limits: ContainerLimits, *, keeps_disk_limit: bool) -> None:
        """`handle` is a `docker.models.containers.Container` that has been started."""
        self.handle = handle
        self.limits = limits
        self._keeps_disk_limit = keeps_disk_limit
        self._api = handle.client.api
        self._closed = False
        self._image_user = handle.client.api.inspect_image(handle.attrs["Image"])["Config"].get("User") or "0"

    @property
    def id(self) -> str:
        return str(self.handle.id)

    def run(
        self,
        command: Sequence[str],
        *,
        timeout_s: float,
        max_output_bytes: int = 64 * 1024,
        user: str | None = None,
        environment: Mapping[str, str] | None = None,
    ) -> CommandResult:
        """Runs a command to its end. Raises ContainerFailed."""
        try:
            running = self.start_command(command, user=user, environment=environment)
        except ContainerBroken as broken:
            return CommandResult(
                status="broken", exit_code=None, output=str(broken), num_output_bytes=0, seconds=0.0
            )
        return running.wait(timeout_s, max_output_bytes=max_output_bytes)

    def start_command(
        self,
        command: Sequence[str],
        *,
        user: str | None = None,
        environment: Mapping[str, str] | None = None,
        stdin_path: str | None = None,
    ) -> Command:
        """Starts a command in the image's folder, as the image's user where none is named.

        `stdin_path` is a file in the container; without one the standard input is empty. Where everything in the
        container has ended (killed for want of memory, say) it is started anew, with its files.

        Raises ContainerFailed, and ContainerBroken where the container does not start any more.
        """
        wrapper = ["sh", "-c", REPORT_AND_RUN, "sh", *command]
        if stdin_path is not None:
            wrapper = ["sh", "-c", REPORT_AND_RUN_WITH_STDIN, "sh", stdin_path, *command]
        create = functools.partial(
            self._api.exec_create,
            self.id,
            wrapper,
            user=user or self._image_user,
            environment=dict(environment or {}),
        )
        with docker_errors("starting a command"):
            if not self.is_running():
                self._start()
            exec_id = create()["Id"]
            attached = self._api.exec_start(exec_id, socket=True)
            return Command(self._api, self.id, exec_id, attached, self.is_over_disk_limit)

    def is_running(self) -> bool:
        """Whether commands can run. Raises ContainerFailed."""
        with docker_errors("asking for a container"):
            return bool(self._api.inspect_container(self.id)["State"]["Running"])

    def end_processes(self) -> None:
        """Ends every process in it, whatever it is and whoever it belongs to; the files stay.

        Raises ContainerBroken where the container does not start again, and ContainerFailed.
        """
        from docker.errors import APIError

        with docker_errors("ending what runs in a container"):
            try:
                self.handle.kill()
            except APIError as error:
                if error.status_code != _CONFLICT:  # nothing runs in it
                    raise
            self.handle.wait(timeout=KILL_S)
            self._start()

    def put(self, archive: bytes) -> None:
        """Unpacks a tar at the root of the container's files. Raises ContainerFailed."""
        with docker_errors("writing files into a container"):
            self.handle.put_archive("/", archive)

    def put_tree(self, source: Path, target: str, *, executable: Sequence[str] = ()) -> None:
        """Writes a folder, or a file, of this machine there; those named may be executed. Raises ContainerFailed."""
        self.put(tree_archive(source, target, executable=executable))

    def put_bytes(self, data: bytes, target: str) -> None:
        """Writes a file that everybody in the container may read and run. Raises ContainerFailed."""
        archive = io.BytesIO()
        with tarfile.open(fileobj=archive, mode="w") as tar:
            entry = tarfile.TarInfo(target.strip("/"))
            entry.size, entry.mode = len(data), 0o755
            tar.addfile(entry, io.BytesIO(data))
        self.put(archive.getvalue())

    def make_folders(self, *folders: str) -> None:
        """Makes folders that everybody in the container may write to. Raises ContainerFailed."""
        archive = io.BytesIO()
        with tarfile.open(fileobj=archive, mode="w") as tar:
            for folder in folders:
                entry = tarfile.TarInfo(folder.strip("/"))
                entry.type, entry.mode = tarfile.DIRTYPE, 0o777
                tar.addfile(entry)
        self.put(archive.getvalue())

    def read_file(self, path: str, *, max_bytes: int) -> bytes | None:
        """The contents of a regular file; None where there is nothing of that name.

        Raises ValueError for what is no regular file, or is larger, and ContainerFailed.
        """
        archive = self.read_archive(path, max_bytes=max_bytes + 64 * 1024)
        if archive is None:
            return None
        with tarfile.open(fileobj=io.BytesIO(archive)) as tar:
            entry = tar.next()
            if entry is None or not entry.isreg():
                raise ValueError(f"{path} in the container is no regular file")
            if entry.size > max_bytes:
                raise ValueError(f"{path} in the container is larger than {max_bytes} bytes")
            content = tar.extractfile(entry)
            assert content is not None, "a regular file has contents"
            return content.read()

    def read_archive(self, path: str, *, max_bytes: int) -> bytes | None:
        """A tar of a file or folder, by its last name; None where there is nothing of that name.

        Raises ValueError for one that is larger, and ContainerFailed.
        """
        archive = bytearray()
        for piece in self._archive(path):
            archive += piece
            if len(archive) > max_bytes:
                raise ValueError(f"{path} in the container is larger than {max_bytes} bytes")
        return bytes(archive) or None

    def exists(self, path: str) -> bool:
        """Whether there is anything of that name, as the daemon sees it. Raises ContainerFailed."""
        pieces = self._archive(path)
        try:
            return next(pieces, None) is not None
        finally:
            pieces.close()

    def num_changed_programs(self) -> int:
        """Files of the image in its folders of programs and libraries that are others now, or gone."""
        with docker_errors("comparing a container with its image"):
            changes = self.handle.diff() or ()
        added = 1
        folders = (
            "/bin/",
            "/sbin/",
            "/lib/",
            "/lib64/",
            "/usr/bin/",
            "/usr/sbin/",
            "/usr/lib/",
            "/usr/local/bin/",
        )
        paths = [change["Path"] for change in changes if change["Kind"] != added]
        inner = {str(parent) for change in changes for parent in Path(change["Path"]).parents}
        return sum(path.startswith(folders) and path not in inner for path in paths)

    def num_added_bytes(self) -> int:
        """Size of the files that it has beyond its image. Raises ContainerFailed."""
        with docker_errors("asking for the size of a container"):
            found = self._api.containers(all=True, size=True, filters={"id": self.id})
        return int(found[0].get("SizeRw", 0)) if found else 0

    def is_over_disk_limit(self) -> bool:
        """Whether it fills more disk than it may, where the daemon's storage does not see to that."""
        return not self._keeps_disk_limit and self.num_added_bytes() > self.limits.disk_bytes

    def close(self) -> None:
        """Ends and removes it; what a daemon refuses is left to the next sweep. Again is harmless."""
        if self._closed:
            return
        self._closed = True
        with contextlib.suppress(ContainerFailed), docker_errors("removing a container"):
            remove(self.handle)

    def _start(self) -> None:
        from docker.errors import APIError, NotFound

        try:
            self.handle.start()
        except NotFound:
            raise
        except APIError as error:
            if "runtime" in str(error.explanation):
                raise ContainerBroken(
                    f"the container does not start any more: {error.explanation}"
                ) from error
            raise

    def _archive(self, path: str) -> Generator[bytes, None, None]:
        from docker.errors import NotFound

        with docker_errors(f"reading {path} in a container"):
            try:
                pieces, _ = self.handle.get_archive(path)
            except NotFound:
                self.handle.reload()  # it may be the container that is not found
                return
            yield from pieces


@dataclass(frozen=True, kw_only=True, slots=True)
class AgentContainer:
    """The container of an episode, where a program may act as the agent."""

    containers: Containers
    container: Container
    user: str | None
    """Who the agent is there; None: the image's user."""
    timeout_s: float
    """Seconds that the task gives it; may be infinite."""


@runtime_checkable
class OffersContainer(Protocol):
    """An environment whose tasks are done in a container."""

    def agent_container(self) -> AgentContainer:
        """That of the episode which has begun; once it is graded there is none. Raises ContainerFailed."""
        ...


def tree_archive(source: Path, target: str, *, executable: Sequence[str] = ()) -> bytes:
    """A tar with the folder or file under the name `target`, owned by root; `executable` are names within."""

    def own(entry: tarfile.TarInfo) -> tarfile.TarInfo:
        entry.uid = entry.gid = 0
        entry.uname = entry.gname = ""
        inside = entry.name.removeprefix(target.strip("/")).strip("/")
        if inside in executable:
            entry.mode |= 0o111
        entry.mode |= 0o444 if entry.isreg() else 0o555  # who runs it inside may be anybody
        return entry

    archive = io.BytesIO()
    with tarfile.open(fileobj=archive, mode="w") as tar:
        tar.add(source, arcname=target.strip("/"), filter=own)
    return archive.getvalue()
