"""The engines of a run and the router in front of them."""

from __future__ import annotations

import os
import time
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from polyturn.configs.addresses import LOOPBACK
from polyturn.configs.schema.run import EnginesConfig, RunConfig
from polyturn.rollout.engines.control import EngineControl
from polyturn.rollout.engines.placement import free_port, gpus_of_engine
from polyturn.rollout.engines.server import Router, SGLangServer, engine_host


class Fleet:
    """Local SGLang servers behind one router; a context manager that starts them all and leaves none behind.

    with Fleet(config=engines, model_path=path, ...) as fleet:
        requests go to fleet.url, control calls through fleet.controls
    """

    def __init__(
        self,
        *,
        config: EnginesConfig,
        model_path: Path,
        dtype: str,
        seeded: bool,
        log_directory: Path,
        sglang: Mapping[str, Any] | None = None,
        random_seed: int = 0,
    ) -> None:
        """Choose ports and GPUs; nothing starts. Raises `ValueError` when there are none."""
        self._config = config
        self._log_directory = log_directory
        self._router: Router | None = None
        self._controls: tuple[EngineControl, ...] = ()
        host = engine_host(config.host, own_address=LOOPBACK)
        ports: list[int] = []
        for index in range(config.num_engines):
            ports.append(config.port + index if config.port else free_port(host, avoid=ports))
        self.servers = tuple(
            SGLangServer(
                config=config,
                model_path=model_path,
                sglang=sglang or {},
                dtype=dtype,
                seeded=seeded,
                log_path=log_directory / f"engine_{index}.log",
                gpus=(
                    gpus_of_engine(index, config.tensor_parallel, os.environ)
                    if config.device == "cuda"
                    else ()
                ),
                port=port,
                index=index,
                random_seed=random_seed,
            )
            for index, port in enumerate(ports)
        )

    @classmethod
    def from_config(cls, config: RunConfig, *, model_path: Path, log_directory: Path) -> Self:
        """The fleet that a run config describes, serving `model_path`."""
        return cls(
            config=config.engines,
            model_path=model_path,
            dtype=config.model.dtype,
            seeded=config.rollout.sampling.seeded,
            log_directory=log_directory,
            sglang=config.sglang,
            random_seed=config.seed,
        )

    def launch(self) -> None:
        """Start the servers without waiting for them, so that other start-up work can go on meanwhile."""
        for server in self.servers:
            server.start()
        self._launched = time.monotonic()

    def wait_ready(self) -> None:
        """Wait for the servers, then start the router and wait for it.

        Raises `EngineError` with a log's tail.
        """
        deadline = self._launched + self._config.start_timeout_s
        for server in self.servers:
            server.wait_ready(max(1.0, deadline - time.monotonic()))
        self._router = Router(
            config=self._config.router,
            worker_urls=self.engine_urls,
            request_timeout_s=self._config.request_timeout_s,
            log_path=self._log_directory / "router.log",
        )
        self._router.start()
        self._router.wait_ready()
        self._controls = tuple(EngineControl(url) for url in self.engine_urls)

    @property
    def url(self) -> str:
        """The router: where generation requests go."""
        assert self._router is not None, "the fleet is not ready"
        return self._router.url

    @property
    def engine_urls(self) -> tuple[str, ...]:
        return tuple(server.url for server in self.servers)

    @property
    def controls(self) -> tuple[EngineControl, ...]:
        """One control client per engine."""
        assert self._router is not None, "the fleet is not ready"
        return self._controls

    def check(self) -> None:
        """Raise `EngineError` with a log's tail unless every process is running."""
        for server in self.servers:
            server.process.check()
        if self._router is not None:
            self._router.process.check()

    def stop(self) -> None:
        """End every process; returns when they are gone. A second call does nothing."""
        for control in self._controls:
            control.close()
        if self._router is not None:
            self._router.stop()
        for server in self.servers:
            server.process.release()
        for server in self.servers:
            server.stop()

    def __enter__(self) -> Self:
        try:
            self.launch()
            self.wait_ready()
        except BaseException:
            self.stop()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, fault: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()
