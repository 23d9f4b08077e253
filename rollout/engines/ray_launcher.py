"""Engines of a Ray cluster, each started by an actor on the node where Ray places it.

Actors die with the driver: Ray ends the workers of a job whose driver is gone, and a server ends with the actor that
started it.
"""

from __future__ import annotations

import logging
from typing import Any

import ray

from polyturn.configs.addresses import bind_address
from polyturn.rollout.engines.placement import assigned_gpus
from polyturn.rollout.engines.server import EngineSpec, SGLangServer

logger = logging.getLogger(__name__)

STOP_TIMEOUT_S = 20.0
ENDED_TIMEOUT_S = 5.0


class EngineActor:
    """One SGLang server on the node of this actor."""

    def __init__(self, spec: EngineSpec, index: int) -> None:
        self._spec = spec
        self._index = index
        self._server: SGLangServer | None = None

    def start(self) -> str:
        """Start the server and wait until it is ready; its URL, as all nodes of the cluster may use it.

        Raises as `Engine.ready` does.
        """
        config = self._spec.config
        on_gpu = config.device == "cuda"
        self._server = SGLangServer(
            self._spec,
            index=self._index,
            gpus=assigned_gpus(ray.get_gpu_ids(), config.tensor_parallel) if on_gpu else (),
            own_address=bind_address(ray.util.get_node_ip_address()),
        )
        self._server.start()
        self._server.wait_ready()
        return self._server.url

    def ended(self) -> str | None:
        return None if self._server is None else self._server.ended()

    def stop(self) -> None:
        if self._server is not None:
            self._server.stop()


class RayEngine:
    """The `Engine` of an actor, seen from the driver."""

    def __init__(self, spec: EngineSpec, index: int) -> None:
        config = spec.config
        self._index = index
        num_gpus = config.tensor_parallel if config.device == "cuda" else 0
        # The trainer's ranks are counted as CPUs; engines take turns with them, so they ask for none.
        self._actor = ray.remote(EngineActor).options(num_cpus=0, num_gpus=num_gpus).remote(spec, index)
        self._started: Any = None
        self._stopped: Any = None
        self._url: str | None = None

    @property
    def url(self) -> str:
        assert self._url is not None, "the engine is not ready"
        return self._url

    def start(self) -> None:
        self._started = self._actor.start.remote()

    def ready(self) -> bool:
        if ray.wait([self._started], timeout=0)[0]:
            self._url = ray.get(self._started)
        return self._url is not None

    def ended(self) -> str | None:
        try:
            how: str | None = ray.get(self._actor.ended.remote(), timeout=ENDED_TIMEOUT_S)
        except ray.exceptions.GetTimeoutError:
            return None
        except ray.exceptions.RayError:
            return f"the process that holds SGLang server {self._index} has died"
        return how

    def release(self) -> None:
        if self._stopped is None:
            self._stopped = self._actor.stop.remote()

    def stop(self) -> None:
        self.release()
        try:
            ray.get(self._stopped, timeout=STOP_TIMEOUT_S)
        except ray.exceptions.RayError as fault:
            # It may have died already, which must not hide why; a server ends with its actor.
            logger.info("stopping an engine: %s", fault)
        finally:
            ray.kill(self._actor)


class RayLauncher:
    """Engines are actors of the Ray cluster that this process has joined."""

    def __init__(self, spec: EngineSpec) -> None:
        self._spec = spec

    def __call__(self, index: int) -> RayEngine:
        return RayEngine(self._spec, index)
