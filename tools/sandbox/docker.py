"""Sandboxes in Docker containers: the same runner, over the stream that the daemon attaches to a container."""

from __future__ import annotations

import contextlib
import dataclasses
import math
import threading
import time
import uuid
from collections.abc import Sequence
from types import TracebackType
from typing import Any, Self

from polyturn.tools.sandbox.docker_container import WORK, DockerLayers, container_options, user_id
from polyturn.tools.sandbox.docker_image import (
    RUNNER_FOLDER,
    SandboxImage,
    ensure_derived_image,
    ensure_python_image,
)
from polyturn.tools.sandbox.docker_owner import Owner, remove, sweep
from polyturn.tools.sandbox.docker_pool import Pool
from polyturn.tools.sandbox.docker_probes import connect
from polyturn.tools.sandbox.docker_stream import AttachedStream, StreamEnded
from polyturn.tools.sandbox.types import MIB, ExecResult, Limits, Sandbox, SandboxUnavailable

_COMMAND = ["python3", "-s", "-S", "-P", f"{RUNNER_FOLDER}/runner/start.py"]
START_S = 60.0
GRACE_S = 5.0
"""How much longer than the runner the host waits: the runner keeps the deadline, unless something is wrong with it."""
FILE_S = 30.0


class Container:
    """A container with a runner that is ready."""

    def __init__(self, handle: Any, stream: AttachedStream) -> None:
        self.handle = handle
        self.stream = stream
        self.started = time.time()
        self.num_oom_kills = 0

    def was_out_of_memory(self) -> bool:
        """Whether the kernel has killed something in it for want of memory since this was asked last."""
        events = self.handle.client.events(
            since=int(self.started),
            until=math.ceil(time.time()),
            filters={"container": self.handle.id, "event": "oom"},
            decode=True,
        )
        before, self.num_oom_kills = self.num_oom_kills, sum(1 for _ in events)
        return self.num_oom_kills > before

    def discard(self) -> None:
        """Kills and removes it; what a daemon refuses is left to the next sweep."""
        from docker.errors import DockerException

        self.stream.close()
        with contextlib.suppress(DockerException):
            remove(self.handle)


class DockerBackend:
    """Hardened containers without network, with a warm pool; a container is one sandbox and is never used again.

    Args:
        image: An image that the daemon has, with Python 3.11 or later as `python3`; by default one that is made of
            this machine's own Python.
        packages: Distributions installed here (`numpy`) that the default image gets; ignored with `image`.
        preload: Modules that the runner imports before it forks.
        host: The daemon's address; by default what DOCKER_HOST says, or the usual socket.
        runtime: `runsc` runs the containers in gVisor, where the daemon knows it.
        warm: Containers kept ready for the next `create` or `reset`, for each kind of limits in use.
        cpus: CPU time of one container per second.

    Raises SandboxUnavailable, naming the probe that failed: SDK, socket, ping, daemon, image or container.
    """

    name = "docker"

    def __init__(
        self,
        *,
        image: str | None = None,
        packages: Sequence[str] = (),
        preload: Sequence[str] = (),
        host: str | None = None,
        runtime: str | None = None,
        warm: int = 1,
        cpus: float = 1.0,
        layers: DockerLayers | None = None,
        runner_layers: dict[str, bool] | None = None,
    ) -> None:
        self._client, self._maps_users = connect(host, runtime)
        self._id = uuid.uuid4().hex
        self._owner = Owner.this_process()
        self._runtime = runtime
        self._cpus = cpus
        self._layers = layers or DockerLayers()
        self._runner_layers = runner_layers or {}
        self._preload = list(preload)
        try:
            sweep(self._client, self._owner)
            self._image: SandboxImage = (
                ensure_python_image(self._client, packages)
                if image is None
                else ensure_derived_image(self._client, image)
            )
        except BaseException:
            self._client.close()
            raise
        self._pool: Pool[Limits, Container] = Pool(
            start=self._start, is_alive=lambda c: not c.stream.ended(), discard=Container.discard, size=warm
        )
        self._closed = False

    def create(self, limits: Limits = Limits()) -> Sandbox:  # noqa: B008 - a frozen value
        """A new sandbox. Raises SandboxUnavailable where the daemon starts no container, ValueError once closed."""
        return DockerSandbox(self, limits, self._take(limits))

    def close(self) -> None:
        """Removes every container of this backend, and those that dead processes left."""
        if self._closed:
            return
        self._closed = True
        self._pool.close()
        try:
            sweep(self._client, self._owner, backend=self._id)
        finally:
            self._client.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _take(self, limits: Limits) -> Container:
        if self._closed:
            raise ValueError("the sandbox backend is closed")
        # The host alone keeps this one, so it makes no other kind of container.
        return self._pool.take(dataclasses.replace(limits, wall_s=1.0))

    def _give_up(self, container: Container) -> None:
        self._pool.discard_soon(container)

    def _start(self, limits: Limits) -> Container:
        from docker.errors import DockerException

        options = container_options(
            limits,
            layers=self._layers,
            runtime=self._runtime,
            cpus=self._cpus,
            labels=self._owner.labels(self._id),
            uid=user_id(mapped=self._maps_users),
        )
        stream: AttachedStream | None = None
        handle = None
        try:
            handle = self._client.containers.create(
                self._image.tag, entrypoint=_COMMAND[:1], command=_COMMAND[1:], **options
            )
            # Attached before it starts, so that nothing it says is lost.
            attached = handle.attach_socket(params={"stdin": 1, "stdout": 1, "stderr": 1, "stream": 1})
            stream = AttachedStream(attached)
            handle.start()
            stream.ask(self._configuration(limits), within_s=START_S)
        except (DockerException, TimeoutError, StreamEnded) as error:
            said = stream.stderr[-500:] if stream is not None else ""
            if handle is not None:
                with contextlib.suppress(DockerException):
                    remove(handle)
            raise SandboxUnavailable(f"the container probe failed: {error} {said}".rstrip()) from error
        return Container(handle, stream)

    def _configuration(self, limits: Limits) -> dict[str, Any]:
        return {
            "op": "configure",
            "work": WORK,
            "memory_bytes": limits.memory_bytes,
            "cpu_s": limits.cpu_s,
            "output_bytes": limits.output_bytes,
            "num_processes": limits.num_processes,
            "file_bytes": limits.file_bytes,
            "num_open_files": limits.num_open_files,
            "readable": ["/"],  # all that there is belongs to the image
            "import_folders": list(self._image.import_folders),
            "preload": self._preload,
            **self._runner_layers,
        }


class DockerSandbox:
    """One container, replaced by `reset`. See `Sandbox`."""

    def __init__(self, backend: DockerBackend, limits: Limits, container: Container) -> None:
        self._backend = backend
        self._limits = limits
        self._container: Container | None = container
        self._lock = threading.Lock()
        self._closed = False

    def exec(
        self,
        code: str,
        *,
        stdin: str = "",
        arguments: Sequence[str] = (),
        timeout_s: float | None = None,
        fresh: bool = True,
    ) -> ExecResult:
        """See `Sandbox.exec`."""
        timeout_s = self._limits.wall_s if timeout_s is None else timeout_s
        if not timeout_s > 0:
            raise ValueError(f"timeout_s must be positive, got {timeout_s}")
        start = time.monotonic()
        question = {
            "op": "exec",
            "code": code,
            "arguments": list(arguments),
            "timeout_s": timeout_s,
            "fresh": fresh,
        }
        with self._lock:
            self._check_open()
            if self._container is None:
                return _died("the sandbox died before; it needs a reset", start)
            body = stdin.encode(errors="replace")
            container = self._container
            try:
                answer, output = container.stream.ask(
                    question,
                    body,
                    within_s=timeout_s + GRACE_S,
                    max_body_bytes=2 * self._limits.output_bytes,
                )
            except TimeoutError:
                self._drop()
                return _died(f"the sandbox did not answer within {timeout_s + GRACE_S:g} s", start)
            except StreamEnded as ended:
                reason = f"the sandbox ended: {ended} {container.stream.stderr[-300:]}".rstrip()
                self._drop()
                return _died(reason, start)
            status, detail = answer["status"], answer["detail"]
            if status == "ok" and answer["exit_code"] == -9 and container.was_out_of_memory():
                status, detail = "oom", "the sandbox ran out of memory, and the kernel killed the code"
        return ExecResult(
            status=status,
            stdout=output[: answer["stdout"]].decode(errors="replace"),
            stderr=output[answer["stdout"] :].decode(errors="replace"),
            exit_code=answer["exit_code"],
            seconds=time.monotonic() - start,
            detail=detail,
        )

    def read_file(self, path: str, *, max_bytes: int = MIB) -> bytes:
        """See `Sandbox.read_file`. Raises OSError, too, where the sandbox has died."""
        return self._ask_file({"op": "read", "path": path, "max_bytes": max_bytes}, max_body_bytes=max_bytes)

    def write_file(self, path: str, data: bytes) -> None:
        """See `Sandbox.write_file`."""
        self._ask_file({"op": "write", "path": path}, data)

    def reset(self) -> None:
        """Takes another container. Raises SandboxUnavailable where the daemon starts none."""
        with self._lock:
            self._check_open()
            self._drop()
            self._container = self._backend._take(self._limits)

    def alive(self) -> bool:
        """Whether the next `exec` can run."""
        with self._lock:
            if self._container is not None and self._container.stream.ended():
                self._drop()
            return self._container is not None

    def close(self) -> None:
        """Gives the container up; the backend removes it in the background."""
        with self._lock:
            self._closed = True
            self._drop()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _check_open(self) -> None:
        if self._closed:
            raise ValueError("the sandbox is closed")

    def _drop(self) -> None:
        if self._container is not None:
            self._backend._give_up(self._container)
            self._container = None

    def _ask_file(self, question: dict[str, Any], body: bytes = b"", *, max_body_bytes: int = 0) -> bytes:
        with self._lock:
            self._check_open()
            if self._container is None:
                raise OSError("the sandbox died before; it needs a reset")
            try:
                answer, content = self._container.stream.ask(
                    question, body, within_s=FILE_S, max_body_bytes=max_body_bytes
                )
            except (TimeoutError, StreamEnded) as error:
                self._drop()
                raise OSError(f"the sandbox died: {error}") from error
        if answer.get("error") == "value":
            raise ValueError(answer["message"])
        if answer.get("error") == "os":
            # OSError makes the subclass that belongs to the number.
            raise OSError(answer["errno"], answer["message"], question["path"])
        return content


def _died(detail: str, start: float) -> ExecResult:
    return ExecResult(
        status="sandbox_died",
        stdout="",
        stderr="",
        exit_code=None,
        seconds=time.monotonic() - start,
        detail=detail,
    )
