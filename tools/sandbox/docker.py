"""Sandboxes in Docker containers: the same runner, over the stream that the daemon attaches to a container, from a pool
of containers that are kept ready.
"""

from __future__ import annotations

import contextlib
import dataclasses
import threading
import uuid
import weakref
from collections import OrderedDict, deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, Generic, TypeVar

from polyturn.tools.closing import Closing
from polyturn.tools.sandbox.docker_container import (
    WORK,
    AttachedLink,
    ContainerRunner,
    DockerLayers,
    container_options,
    user_id,
)
from polyturn.tools.sandbox.docker_daemon import Owner, connect, remove, sweep
from polyturn.tools.sandbox.docker_image import (
    RUNNER_FOLDER,
    SandboxImage,
    ensure_derived_image,
    ensure_python_image,
)
from polyturn.tools.sandbox.sandbox import Limits, LinkEnded, Sandbox, SandboxUnavailable

K = TypeVar("K")
T = TypeVar("T")

NUM_KINDS = 4
NUM_THREADS = 4


class Pool(Generic[K, T]):
    """Starts one thing ahead for each that is taken. Usable from many threads at a time."""

    def __init__(
        self,
        *,
        start: Callable[[K], T],
        is_alive: Callable[[T], bool],
        discard: Callable[[T], None],
        size: int,
    ) -> None:
        """`size` is how many of a kind are kept ready once one was taken; 0 keeps none."""
        if size < 0:
            raise ValueError(f"a pool cannot keep {size} ready")
        self._start, self._is_alive, self._discard, self._size = start, is_alive, discard, size
        self._lock = threading.Lock()
        self._ready: OrderedDict[K, deque[T]] = OrderedDict()
        self._num_starting: dict[K, int] = {}
        self._closed = False
        self._threads = ThreadPoolExecutor(NUM_THREADS, thread_name_prefix="sandbox-pool")

    def take(self, kind: K) -> T:
        """One that is alive, ready or started while the caller waits. Raises what `start` raises."""
        try:
            while (thing := self._pop(kind)) is not None:
                if self._is_alive(thing):
                    return thing
                self._discard(thing)
            return self._start(kind)
        finally:
            self._refill(kind)

    def discard_soon(self, thing: T) -> None:
        """Discards it in the background; at once when the pool is closed."""
        with self._lock:
            if not self._closed:
                self._threads.submit(self._discard, thing)
                return
        self._discard(thing)

    def close(self) -> None:
        """Waits for the work in the background and discards what is ready."""
        with self._lock:
            self._closed = True
        self._threads.shutdown(wait=True)
        for things in self._ready.values():
            for thing in things:
                self._discard(thing)
        self._ready.clear()

    def _pop(self, kind: K) -> T | None:
        with self._lock:
            things = self._ready.get(kind)
            return things.popleft() if things else None

    def _refill(self, kind: K) -> None:
        with self._lock:
            if self._closed:
                return
            self._ready.setdefault(kind, deque())
            self._ready.move_to_end(kind)
            while len(self._ready) > NUM_KINDS:
                for thing in self._ready.popitem(last=False)[1]:
                    self._threads.submit(self._discard, thing)
            missing = self._size - len(self._ready[kind]) - self._num_starting.get(kind, 0)
            for _ in range(missing):
                self._num_starting[kind] = self._num_starting.get(kind, 0) + 1
                self._threads.submit(self._start_one, kind).add_done_callback(_raise_unexpected)

    def _start_one(self, kind: K) -> None:
        thing: T | None = None
        try:
            thing = self._start(kind)
        except SandboxUnavailable:
            pass  # whoever needs one starts it in the foreground, and is told
        finally:
            with self._lock:
                self._num_starting[kind] -= 1
                if self._num_starting[kind] == 0:
                    del self._num_starting[kind]
                wanted = thing is not None and not self._closed and kind in self._ready
                if wanted and thing is not None:
                    self._ready[kind].append(thing)
        if thing is not None and not wanted:
            self._discard(thing)


def _raise_unexpected(future: Future[None]) -> None:
    """Logs a fault of ours (the executor would keep it to itself)."""
    future.result()


_COMMAND = ["python3", "-s", "-S", "-P", f"{RUNNER_FOLDER}/runner/start.py"]
START_S = 60.0


class DockerBackend(Closing):
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

    `layers` and `runner_layers` are for tests alone: they take walls away, to show that something gets through then.
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
        self._pool: Pool[Limits, ContainerRunner] = Pool(
            start=self._start, is_alive=ContainerRunner.alive, discard=ContainerRunner.discard, size=warm
        )
        self._runners: weakref.WeakSet[ContainerRunner] = weakref.WeakSet()
        self._lock = threading.Lock()
        self._closed = False

    def create(self, limits: Limits = Limits()) -> Sandbox:  # noqa: B008 - a frozen value
        """A new sandbox. Raises SandboxUnavailable where the daemon starts no container, ValueError once closed."""
        return Sandbox(limits, self._start_runner)

    def close(self) -> None:
        """Removes every container of this backend, and those that dead processes left; again is harmless."""
        with self._lock:
            if self._closed:
                return
            self._closed = True
        for runner in list(self._runners):
            runner.close()
        self._pool.close()
        try:
            sweep(self._client, self._owner, backend=self._id)
        finally:
            self._client.close()

    def _start_runner(self, limits: Limits) -> ContainerRunner:
        # The host alone keeps the wall clock, so it makes no other kind of container.
        kind = dataclasses.replace(limits, wall_s=1.0)
        with self._lock:
            if self._closed:
                raise ValueError("the sandbox backend is closed")
        runner = self._pool.take(kind)
        self._runners.add(runner)
        return runner

    def _start(self, limits: Limits) -> ContainerRunner:
        from docker.errors import DockerException

        options = container_options(
            limits,
            layers=self._layers,
            runtime=self._runtime,
            cpus=self._cpus,
            labels=self._owner.labels(self._id),
            uid=user_id(mapped=self._maps_users),
            hidden=self._image.hidden,
        )
        handle = None
        try:
            handle = self._client.containers.create(
                self._image.tag, entrypoint=_COMMAND[:1], command=_COMMAND[1:], **options
            )
            # Attached before it starts, so that nothing it says is lost.
            attached = handle.attach_socket(params={"stdin": 1, "stdout": 1, "stderr": 1, "stream": 1})
            link = AttachedLink(attached)
            handle.start()
            link.ask(self._configuration(limits), within_s=START_S, max_body_bytes=0)
        except (DockerException, LinkEnded) as error:
            if handle is not None:
                with contextlib.suppress(DockerException):
                    remove(handle)
            raise SandboxUnavailable(f"the container probe failed: {error}") from error
        return ContainerRunner(handle, link, self._pool.discard_soon)

    def _configuration(self, limits: Limits) -> dict[str, Any]:
        return {
            "op": "configure",
            "work": WORK,
            **limits.of_an_execution,
            "readable": ["/"],  # all that there is belongs to the image
            "import_folders": list(self._image.import_folders),
            "preload": self._preload,
            **self._runner_layers,
        }
