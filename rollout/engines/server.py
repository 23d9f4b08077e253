"""An SGLang server, and the sglang-router in front of several, each as a local process."""

from __future__ import annotations

import json
import os
import sys
import tempfile
import time
import uuid
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
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
from polyturn.configs.loading.upstream import find_problems
from polyturn.configs.schema.engines import RouterConfig, ServersConfig
from polyturn.configs.schema.run import RunConfig
from polyturn.configs.schema.trainer import LoraConfig
from polyturn.configs.sizing.hardware import SHARED_MEM_FRACTION
from polyturn.rollout.engines.placement import claim_port, free_port, gpu_environment
from polyturn.rollout.engines.process import EngineError, SupervisedProcess

CPU_DEFAULTS: Mapping[str, Any] = {
    # Without a limit the KV pool takes the machine's free memory.
    "max_total_tokens": 65536,
    "max_running_requests": 128,
    # Without it an idle server burns a core.
    "sleep_on_idle": True,
}
"""What a server has on a CPU where the `sglang:` section says nothing."""

CPU_ENVIRONMENT: Mapping[str, str] = {
    "SGLANG_USE_CPU_ENGINE": "1",
    # Decoding small batches with more threads was an order of magnitude slower.
    "OMP_NUM_THREADS": "1",
    "TORCHDYNAMO_DISABLE": "1",
}

ENVIRONMENT: Mapping[str, str] = {
    "HF_HUB_OFFLINE": "1",
    # /health answers whenever the server process does: while generation is paused for a weight update it must
    # not count as sick, and an idle engine need not generate a token every few seconds.
    "SGLANG_ENABLE_HEALTH_ENDPOINT_GENERATION": "0",
}


@dataclass(frozen=True, kw_only=True, slots=True)
class EngineSpec:
    """What engines that serve one model have in common."""

    config: ServersConfig
    model_path: Path
    """The Hugging Face directory that they serve."""
    dtype: str
    """Of its weights there."""
    seeded: bool
    """Whether a request's seed counts."""
    log_directory: Path
    sglang: Mapping[str, Any] = field(default_factory=dict)
    """Further server arguments in snake case, as a user wrote them."""
    seed: int = 0
    section: str = "engines"
    """Which of the config they are of, for messages and the names of their logs."""
    router: RouterConfig | None = None
    """What stands in front of them; its policy is then one of sglang-router's. None: they are asked directly."""
    request_timeout_s: float = 300.0
    """How long that waits for an answer."""
    records_routing: bool = False
    """Whether they record the experts that each token was sent to."""
    num_sharing: int = 0
    """Of how many, the last ones, the GPUs are somebody else's by turns."""
    largest_support: int | None = None
    """The most tokens of one support that they tell; None: SGLang's own limit."""
    lora: LoraConfig | None = None
    """What adapters they can be given; None: none."""

    @classmethod
    def from_config(cls, config: RunConfig, *, model_path: Path, log_directory: Path) -> Self:
        """As a run config describes them."""
        return cls(
            router=None if config.asks_engines_directly else config.engines.router,
            request_timeout_s=config.engines.request_timeout_s,
            records_routing=config.engines.routing_replay,
            config=config.engines,
            model_path=model_path,
            dtype=config.model.dtype,
            seeded=config.rollout.sampling.seeded,
            log_directory=log_directory,
            sglang=config.sglang,
            seed=config.seed,
            num_sharing=config.engines.num_sharing,
            largest_support=config.rollout.sampling.largest_support,
            lora=config.trainer.lora if config.serves_adapters else None,
        )


class SGLangServer:
    """One server: `start`, `wait_ready`, use `url`, `stop`."""

    def __init__(
        self,
        spec: EngineSpec,
        *,
        index: int = 0,
        gpus: Sequence[str] = (),
        own_address: str = LOOPBACK,
        avoid_ports: Collection[int] = (),
    ) -> None:
        """Choose the port; nothing starts.

        Args:
            index: The engine's number in the run: it seeds the engine, and follows the first engine's port.
            gpus: Those that are the engine's own, as `gpus_of_engine` and `assigned_gpus` name them; none on a CPU.
            own_address: This host's, as those who call the engine know it.
            avoid_ports: Free ones that are promised to others.

        Raises `ValueError` when the port is taken or the spec sets an argument that we own.
        """
        config = spec.config
        host = own_address if config.host is None else config.host
        self.host = advertised_address(bind_address(host), own=own_address)
        port = config.port + index if config.port else 0
        self.port = claim_port(host, port, section=spec.section, avoid=avoid_ports)
        self._timeout_s = config.start_timeout_s
        self._rendezvous = Path(tempfile.gettempdir()) / f"polyturn-rendezvous-{uuid.uuid4().hex}"
        arguments = server_arguments(spec, host=bind_address(host), port=self.port, index=index)
        on_cpu = config.device == "cpu"
        self.process = SupervisedProcess(
            [sys.executable, "-m", "polyturn.rollout.engines.sglang_main", *arguments],
            name=f"SGLang server {index}"
            if spec.section == "engines"
            else f"SGLang server {index} of {spec.section}",
            log_path=spec.log_directory / f"engine_{index}.log",
            environment={
                **ENVIRONMENT,
                **(cpu_environment(config.tensor_parallel) if on_cpu else gpu_environment(gpus)),
                # Its ranks meet in a file: the store of a TCP rendezvous would listen on every interface.
                "SGLANG_DISTRIBUTED_INIT_METHOD_OVERRIDE": f"file://{self._rendezvous}",
            },
        )

    @property
    def url(self) -> str:
        """Where the engine is reached, also from other hosts if it listens there."""
        return http_url(self.host, self.port)

    def start(self) -> None:
        """Start the process; returns at once."""
        self.process.start()

    def ready(self) -> bool:
        """Whether the server has generated a token.

        Raises `EngineError` with the log's tail when it has ended, or its time to start is over.
        """
        return self.process.answers(f"{self.url}/health_generate", timeout_s=self._timeout_s)

    def wait_ready(self) -> None:
        """Wait until the server has generated a token. Raises as `ready` does."""
        self.process.wait_until(f"{self.url}/health_generate", timeout_s=self._timeout_s)

    def ended(self) -> str | None:
        """How the server ended by itself, as a sentence; None while it runs."""
        return self.process.ended()

    def release(self) -> None:
        """Begin to end the server; returns at once."""
        self.process.release()

    def stop(self) -> None:
        """End the server and all of its processes."""
        self.process.stop()
        self._rendezvous.unlink(missing_ok=True)

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, fault: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()


def cpu_environment(tensor_parallel: int) -> dict[str, str]:
    """The environment of a server on the CPU. Several ranks are given a core each: SGLang wants to be told which."""
    cores = sorted(os.sched_getaffinity(0))
    binding = "|".join(str(cores[rank % len(cores)]) for rank in range(tensor_parallel))
    return {**CPU_ENVIRONMENT, **({"SGLANG_CPU_OMP_THREADS_BIND": binding} if tensor_parallel > 1 else {})}


def server_arguments(spec: EngineSpec, *, port: int, host: str = LOOPBACK, index: int = 0) -> list[str]:
    """The command line of one server: `set_by_polyturn`, and what the spec's user wrote.

    Raises `ValueError` when that sets an option of ours.
    """
    config = spec.config
    for _, problem in find_problems("sglang", spec.sglang, device=config.device):
        raise ValueError(problem)
    shares = index >= config.num_engines - spec.num_sharing
    ours: dict[str, Any] = {
        "model_path": str(spec.model_path),
        "weight_version": "0",
        "host": host,
        "port": port,
        "device": config.device,
        # The process sees its own GPUs alone.
        "base_gpu_id": 0,
        "tp_size": config.tensor_parallel,
        # Said explicitly: `auto` turns float32 into float16.
        "dtype": spec.dtype,
        # Every engine samples its own stream when requests carry no seed.
        "random_seed": (spec.seed + index) % 2**31,
        "enable_deterministic_inference": spec.seeded,
        "enable_memory_saver": shares and config.device == "cuda",
        "enable_return_routed_experts": spec.records_routing,
        "sampling_mask_max_tokens": spec.largest_support,
        "skip_server_warmup": True,
        "log_level_http": "warning",
    }
    if spec.lora is not None:
        ours |= lora_arguments(spec.lora)
    if config.device == "cpu":
        ours |= {
            **CPU_DEFAULTS,
            "attention_backend": "torch_native",
            "cuda_graph_backend_decode": "disabled",
            "cuda_graph_backend_prefill": "disabled",
            # The others are Triton kernels.
            "lora_backend": None if spec.lora is None else "torch_native",
        }
    elif shares:
        ours["mem_fraction_static"] = SHARED_MEM_FRACTION
    return command_line(ours | dict(spec.sglang))


ALL_LINEAR = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
"""What SGLang can give adapters in a dense model."""
ADAPTERS_AT_ONCE = 4
"""Versions that may be in one batch: the newest, and those of requests that were begun before it."""


def lora_arguments(lora: LoraConfig) -> dict[str, Any]:
    """What a server is started with that is to be given adapters of this shape."""
    return {
        "enable_lora": True,
        "max_lora_rank": lora.rank,
        "lora_target_modules": list(lora.target_modules or ALL_LINEAR),
        "max_loras_per_batch": ADAPTERS_AT_ONCE,
    }


def command_line(arguments: Mapping[str, Any]) -> list[str]:
    """Snake-case arguments as flags.

    True is a bare flag, False and None are left out, a list is several values, a dict is JSON.
    """
    words: list[str] = []
    for name, value in arguments.items():
        if value is None or value is False:
            continue
        words.append("--" + name.replace("_", "-"))
        if value is True:
            continue
        if isinstance(value, Mapping):
            words.append(json.dumps(value))
        elif isinstance(value, Sequence) and not isinstance(value, str):
            words.extend(str(item) for item in value)
        else:
            words.append(str(value))
    return words


ROUTER_START_TIMEOUT_S = 180.0


class Router:
    """The router: `start`, `wait_ready`, use `url`, `stop`. It forwards requests, never control calls."""

    def __init__(
        self, *, config: RouterConfig, worker_urls: Sequence[str], request_timeout_s: float, log_path: Path
    ) -> None:
        """`worker_urls` are the engines, which must be ready. Raises `ValueError` when the port is taken."""
        self.config = config
        bound = bind_address(config.host)
        self.host = advertised_address(bound)
        self.port = claim_port(bound, config.port, section="engines.router")
        self._num_workers = len(worker_urls)
        self._known = set(worker_urls)
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

    def wait_ready(self, timeout_s: float = ROUTER_START_TIMEOUT_S) -> None:
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
        return sum(bool(worker["is_healthy"]) for worker in self._workers())

    def answers(self) -> bool:
        """Whether it says that it is ready."""
        try:
            reply = httpx.get(f"{self.url}/readiness", timeout=5.0, trust_env=False, verify=False)
        except httpx.HTTPError:
            return False
        return reply.status_code == 200

    def set_workers(self, urls: Sequence[str]) -> bool:
        """Send requests to these engines, and to no others; False where it could not be told."""
        if set(urls) == self._known:
            return True
        try:
            with httpx.Client(base_url=self.url, timeout=10.0, trust_env=False, verify=False) as client:
                listed = {str(worker["url"]): str(worker["id"]) for worker in self._workers()}
                for url in set(urls) - listed.keys():
                    client.post("/workers", json={"url": url}).raise_for_status()
                for url in listed.keys() - set(urls):
                    client.delete(f"/workers/{listed[url]}").raise_for_status()
        except httpx.HTTPError:
            return False
        self._known = set(urls)
        return True

    def _workers(self) -> list[dict[str, Any]]:
        reply = httpx.get(f"{self.url}/workers", timeout=10.0, trust_env=False, verify=False)
        workers: list[dict[str, Any]] = reply.json()["workers"]
        return workers

    def stop(self) -> None:
        """End the router."""
        self.process.stop()
