"""sglang-router in front of the engines, as a local process."""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import httpx

from polyturn.configs.addresses import (
    LOOPBACK,
    advertised_address,
    bind_address,
    bracketed,
    http_url,
)
from polyturn.configs.schema import RouterConfig
from polyturn.rollout.engines.ports import claim_port, free_port
from polyturn.rollout.engines.process import EngineError, SupervisedProcess
from polyturn.rollout.engines.server import command_line

START_TIMEOUT_S = 60.0


class Router:
    """The router: `start`, `wait_ready`, use `url`, `stop`. It forwards requests, never control calls."""

    def __init__(
        self, *, config: RouterConfig, worker_urls: Sequence[str], request_timeout_s: float, log_path: Path
    ) -> None:
        """`worker_urls` are the engines, which must be ready. Raises `ValueError` when the port is taken."""
        bound = bind_address(config.host)
        self.host = advertised_address(bound)
        self.port = claim_port(bound, config.port, section="engines.router")
        self._num_workers = len(worker_urls)
        arguments: dict[str, Any] = {
            # It reads host and port as one text, which names and bare IPv6 addresses are not.
            "host": bracketed(bound),
            "port": self.port,
            "worker_urls": list(worker_urls),
            "policy": config.policy,
            # By default metrics listen on every interface, at a port that two routers would share.
            "prometheus_host": LOOPBACK,
            "prometheus_port": free_port(LOOPBACK, avoid=(self.port,)),
            "health_check_endpoint": "/health",
            "health_check_interval_secs": 2,
            "health_failure_threshold": 2,
            "health_success_threshold": 1,
            "cb_failure_threshold": 3,
            "cb_success_threshold": 1,
            "cb_timeout_duration_secs": 5,
            "worker_startup_check_interval": 1,
            "request_timeout_secs": max(1, round(request_timeout_s)),
            "shutdown_grace_period_secs": 1,
            "log_level": "warn",
        }
        self.process = SupervisedProcess(
            [sys.executable, "-m", "sglang_router.launch_router", *command_line(arguments)],
            name="sglang-router",
            log_path=log_path,
            # A proxy in the environment must not come between the router and its engines.
            environment={"NO_PROXY": "*", "no_proxy": "*"},
        )

    @property
    def url(self) -> str:
        """Where this host, the only one that asks the router, reaches it."""
        return http_url(self.host, self.port)

    def start(self) -> None:
        """Start the process; returns at once."""
        self.process.start()

    def wait_ready(self, timeout_s: float = START_TIMEOUT_S) -> None:
        """Wait until every engine is registered and healthy. Raises `EngineError` if that does not happen."""
        started = time.monotonic()
        self.process.wait_until(f"{self.url}/readiness", timeout_s=timeout_s)
        while self.num_healthy() < self._num_workers:
            self.process.check()
            if time.monotonic() - started > timeout_s:
                raise EngineError(
                    f"sglang-router sees {self.num_healthy()} of {self._num_workers} healthy engines after "
                    f"{timeout_s:g} s; its log is {self.process.log_path}"
                )
            time.sleep(0.1)

    def num_healthy(self) -> int:
        """How many engines the router sends requests to."""
        reply = httpx.get(f"{self.url}/workers", timeout=10.0, trust_env=False)
        return sum(bool(worker["is_healthy"]) for worker in reply.json()["workers"])

    def alive(self) -> bool:
        """Whether the process is running."""
        return self.process.alive()

    def stop(self) -> None:
        """End the router."""
        self.process.stop()

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, fault: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()
