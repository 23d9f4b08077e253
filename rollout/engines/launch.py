"""The engines of a run, and the router that may stand in front of them: brought up alike, wherever they run."""

from __future__ import annotations

import os
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from types import TracebackType
from typing import Protocol, Self

import httpx

from polyturn.configs.schema.engines import RouterConfig
from polyturn.rollout.engines.placement import gpus_of_engine
from polyturn.rollout.engines.process import EngineError
from polyturn.rollout.engines.server import EngineSpec, Router, SGLangServer, bootstrap_port

POLL_S = 0.1


class Engine(Protocol):
    """One engine in a place of its own: a process of this host (`SGLangServer`), or of a node of a Ray cluster."""

    @property
    def url(self) -> str:
        """Where it is reached, once it is ready."""
        ...

    def start(self) -> None:
        """Begin to start it; returns at once."""
        ...

    def ready(self) -> bool:
        """Whether it has generated a token.

        Raises:
            EngineError: it has ended, or its time to start is over.
            ValueError: its place does not give it its port, or its GPUs.
        """
        ...

    def ended(self) -> str | None:
        """How it ended by itself, as a sentence; None while it runs, and where nobody can tell."""
        ...

    def release(self) -> None:
        """Begin to end it; returns at once."""
        ...

    def stop(self) -> None:
        """End it; returns when it is gone. A second call does nothing."""
        ...


Launcher = Callable[[int], Engine]
"""Makes the engine of a number, which has not been started. Raises `ValueError` where there is no place for it."""


class LocalLauncher:
    """Engines are processes of this host: they share out its free ports, and the GPUs that this process sees."""

    def __init__(self, spec: EngineSpec, *, first_gpu: int = 0) -> None:
        """`first_gpu`: how many of the GPUs that are seen are others'.

        Raises `ValueError` where an engine is to stand on several nodes: here is one.
        """
        each = spec.config.ranks_per_node
        if each is not None and each < spec.config.tensor_parallel:
            raise ValueError(
                f"{spec.section}.ranks_per_node is {each}, which spreads an engine over nodes of a Ray cluster; here "
                "engines run on this machine alone, so leave it out"
            )
        self._spec = spec
        self._first_gpu = first_gpu
        self._ports: set[int] = set()

    def __call__(self, index: int) -> SGLangServer:
        config = self._spec.config
        on_gpu = config.device == "cuda"
        server = SGLangServer(
            self._spec,
            index=index,
            gpus=gpus_of_engine(index, config.tensor_parallel, os.environ, first_gpu=self._first_gpu)
            if on_gpu
            else (),
            avoid_ports=self._ports,
        )
        self._ports.add(server.port)
        return server


class ExternalEngine:
    """An engine that others started: it is waited for, and left running."""

    def __init__(self, url: str, *, timeout_s: float) -> None:
        self.url = url.rstrip("/")
        self._timeout_s = timeout_s

    def start(self) -> None:
        self._deadline = time.monotonic() + self._timeout_s

    def ready(self) -> bool:
        try:
            # Plain HTTP, or a certificate that is the cluster's own.
            reply = httpx.get(f"{self.url}/health", timeout=5.0, trust_env=False, verify=False)
            why = f"it answers {reply.status_code}"
            if reply.status_code == 200:
                return True
        except httpx.TransportError as error:
            why = str(error) or type(error).__name__
        if time.monotonic() > self._deadline:
            raise EngineError(
                f"engines.urls: no engine was ready at {self.url} after {self._timeout_s:g} s: {why}"
            )
        return False

    def ended(self) -> str | None:
        return None

    def release(self) -> None: ...

    def stop(self) -> None: ...


class ExternalLauncher:
    """Engines are others', and have URLs already."""

    def __init__(self, spec: EngineSpec, urls: Sequence[str]) -> None:
        self._spec = spec
        self._urls = tuple(urls)

    def __call__(self, index: int) -> ExternalEngine:
        return ExternalEngine(self._urls[index], timeout_s=self._spec.config.start_timeout_s)


class BroughtUp(ABC):
    """What is started, waited for and stopped as one; a context manager that leaves nothing behind."""

    @abstractmethod
    def start(self) -> None:
        """Begin to start it; returns at once."""

    @abstractmethod
    def wait_ready(self) -> None:
        """Wait until it is of use. Raises as `Engine.ready` does."""

    @abstractmethod
    def stop(self) -> None:
        """End it; returns when it is gone. A second call does nothing."""

    def __enter__(self) -> Self:
        try:
            self.start()
            self.wait_ready()
        except BaseException:
            self.stop()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, fault: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()


class Engines(BroughtUp):
    """All engines of a run; a context manager that starts them and leaves none behind.

    with Engines(spec, LocalLauncher(spec)) as engines:
        generation requests go to engines.request_urls, control calls to each of engines.engine_urls
    """

    def __init__(self, spec: EngineSpec, launcher: Launcher) -> None:
        """Choose places; nothing starts. Raises `ValueError` where there are none."""
        self._spec = spec
        self._launcher = launcher
        self._engines = {index: launcher(index) for index in range(spec.config.num_engines)}
        self._stopped = False
        self._router: Router | None = None

    def start(self) -> None:
        """Begin to start the engines, so that other start-up work can go on meanwhile."""
        for engine in self._engines.values():
            engine.start()

    def wait_ready(self) -> None:
        """Wait for the engines, then start their router and wait for it. Raises as `Engine.ready` does."""
        waiting = list(self._engines.values())
        while waiting := [engine for engine in waiting if not engine.ready()]:
            time.sleep(POLL_S)
        if self._spec.router is not None:
            self._router = self._make_router(self._spec.router, self.engine_urls)
            self._router.wait_ready()

    def _make_router(self, config: RouterConfig, worker_urls: Sequence[str]) -> Router:
        reading = {
            self._engines[number].url for number in range(self._spec.num_prefill) if number in self._engines
        }
        router = Router(
            config=config,
            worker_urls=[url for url in worker_urls if url not in reading],
            prefill={url: bootstrap_port(url) for url in worker_urls if url in reading}
            if self._spec.num_prefill
            else None,
            request_timeout_s=self._spec.request_timeout_s,
            log_path=self._spec.log_directory / "router.log",
        )
        router.start()
        return router

    def replace(self, number: int) -> Engine:
        """End the engine of a number, if there is one, and begin to start another; a new number is one engine more.

        Raises:
            ValueError: there is no place for it.
        """
        self.remove(number)
        engine = self._launcher(number)
        self._engines[number] = engine
        if not self._stopped:
            engine.start()
        return engine

    def remove(self, number: int) -> None:
        """End the engine of a number for good."""
        engine = self._engines.pop(number, None)
        if engine is not None:
            engine.stop()

    @property
    def has_router(self) -> bool:
        """Whether a router stands in front of them."""
        return self._router is not None

    def router_answers(self) -> bool:
        """Whether the router says that it is ready."""
        return self._router is not None and self._router.answers()

    def keep_router(self, worker_urls: Sequence[str], *, is_hung: bool = False) -> str | None:
        """See to it that the router is there, and sends requests to these engines and no others.

        One that has ended, or hangs, is started again at its address: what was the matter, as a sentence; else None.
        """
        assert self._router is not None, "the engines have no router"
        how = self._router.process.ended()
        if how is None and is_hung:
            self._router.stop()
            how = "sglang-router answered nothing"
        if how is not None:
            config = self._router.config.model_copy(update={"port": self._router.port})
            self._router = self._make_router(config, worker_urls)
        elif not is_hung:
            self._router.set_workers(worker_urls)
        return how

    @property
    def url(self) -> str:
        """The router."""
        assert self._router is not None, "the engines are not ready, or have no router"
        return self._router.url

    @property
    def request_urls(self) -> str | list[str]:
        """Where generation requests go: to the router, or to the engines themselves."""
        return self.engine_urls if self._spec.router is None else self.url

    @property
    def engine_urls(self) -> list[str]:
        """Each engine itself, in the order of their numbers."""
        return [engine.url for _, engine in sorted(self._engines.items())]

    @property
    def by_number(self) -> dict[int, Engine]:
        """The engines by their numbers."""
        return dict(sorted(self._engines.items()))

    def ended(self) -> list[str]:
        """Sentences of what has ended by itself, of the router and the engines that were ready."""
        found = [] if self._router is None else [self._router.process.ended()]
        found += [engine.ended() for engine in self._engines.values()]
        return [how for how in found if how is not None]

    def stop(self) -> None:
        """End every process; returns when they are gone. A second call does nothing."""
        self._stopped = True
        if self._router is not None:
            self._router.stop()
        engines = list(self._engines.values())
        for engine in engines:
            engine.release()
        for engine in engines:
            engine.stop()
