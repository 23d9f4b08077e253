"""The Ray actors of a run: one per trainer rank, one per engine.

Actors die with the driver: Ray ends the workers of a job whose driver is gone, and an engine's server ends with the
actor that started it.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import ray

from polyturn.configs.addresses import bind_address
from polyturn.configs.schema.run import RunConfig
from polyturn.rollout.engines.placement import assigned_gpus
from polyturn.rollout.engines.server import SGLangServer
from polyturn.trainer.ranks.group import (
    CLOSE_TIMEOUT_S,
)


class EngineHost:
    """One SGLang server, started on the host where Ray places this actor."""

    def __init__(self, *, config: RunConfig, model_path: str, log_path: str, port: int, index: int) -> None:
        self._config = config
        self._model_path = Path(model_path)
        self._log_path = Path(log_path)
        self._port = port
        self._index = index
        self._server: SGLangServer | None = None

    def start(self, timeout_s: float) -> str:
        """Start the server and wait until it is healthy; its URL, as all nodes of the cluster may use it.

        Raises:
            ValueError: it cannot have its port, or its GPUs.
            EngineError: it ended, or was not healthy in time.
        """
        config, engines = self._config, self._config.engines
        on_gpu = engines.device == "cuda"
        self._server = SGLangServer(
            config=engines,
            model_path=self._model_path,
            sglang=config.sglang,
            dtype=config.model.dtype,
            seeded=config.rollout.sampling.seeded,
            gpus=assigned_gpus(ray.get_gpu_ids(), engines.tensor_parallel) if on_gpu else (),
            port=self._port,
            log_path=self._log_path,
            index=self._index,
            random_seed=config.seed,
            own_address=bind_address(ray.util.get_node_ip_address()),
        )
        self._server.start()
        self._server.wait_ready(timeout_s)
        return self._server.url

    def alive(self) -> bool:
        return self._server is not None and self._server.alive()

    def stop(self) -> None:
        if self._server is not None:
            self._server.stop()


class EngineGroup:
    """All SGLang servers of a run, each in an actor of its own."""

    def __init__(self, config: RunConfig, *, model_path: Path, logs: Path) -> None:
        engines = config.engines
        on_gpu = engines.device == "cuda"
        actor = ray.remote(EngineHost)
        self._config = config
        self._hosts = [
            actor.options(num_cpus=0, num_gpus=engines.tensor_parallel if on_gpu else 0).remote(
                config=config,
                model_path=str(model_path),
                log_path=str(logs / f"engine_{index}.log"),
                port=engines.port + index if engines.port else 0,
                index=index,
            )
            for index in range(engines.num_engines)
        ]

    def start(self) -> list[Any]:
        """Begin to start all servers; the references whose values are their URLs."""
        return [host.start.remote(self._config.engines.start_timeout_s) for host in self._hosts]

    def close(self) -> None:
        """End the servers and the actors. A server whose actor does not answer ends with the actor."""
        try:
            ray.get([host.stop.remote() for host in self._hosts], timeout=CLOSE_TIMEOUT_S)
        finally:
            for host in self._hosts:
                ray.kill(host)
