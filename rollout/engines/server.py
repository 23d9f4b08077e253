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
from polyturn.configs.loading.router_options import ROUTER_DEFAULTS
from polyturn.configs.loading.sglang_options import attention_parts
from polyturn.configs.loading.upstream import ROUTER, find_problems
from polyturn.configs.schema.engines import RouterConfig, ServersConfig
from polyturn.configs.schema.run import RunConfig
from polyturn.configs.schema.trainer import LoraConfig
from polyturn.configs.sizing.hardware import SHARED_MEM_FRACTION
from polyturn.rollout.engines.placement import claim_port, free_port, free_ports, gpu_environment
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

    num_prefill: int = 0
    """So many of the engines, the first ones, only read prompts; the others then only generate."""

    @property
    def attention_parts(self) -> int:
        """Data-parallel parts of its attention."""
        return attention_parts(self.sglang)

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
            num_prefill=config.engines.num_prefill,
            log_directory=log_directory,
            sglang=config.sglang,
            seed=config.seed,
            num_sharing=config.engines.num_sharing,
            largest_support=config.rollout.sampling.largest_support,
            lora=config.trainer.lora if config.serves_adapters else None,
        )


RENDEZVOUS_PORTS = 8
"""In a row: SGLang derives six for data-parallel attention from the rendezvous; the last is `bootstrap_port`."""


@dataclass(frozen=True, kw_only=True, slots=True)
class NodePart:
    """What an engine has on one of several nodes."""

    node_rank: int
    """0: the node that answers requests."""
    num_nodes: int
    rendezvous: str
    """`address:port` on the node of node rank 0. The port listens on every interface of that node, whatever the
    address: it is torch's store, which knows no other way."""

    @property
    def bootstrap_port(self) -> int:
        """Where engines that decode meet one that reads prompts: on node rank 0, and known to all of its nodes."""
        return int(self.rendezvous.rpartition(":")[2]) + RENDEZVOUS_PORTS - 1

    @staticmethod
    def find_rendezvous(address: str) -> str:
        """One on this host, which has the address."""
        return f"{bracketed(address)}:{free_ports(address, RENDEZVOUS_PORTS)}"


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
        part: NodePart | None = None,
    ) -> None:
        """Choose the port; nothing starts.

        Args:
            index: The engine's number in the run: it seeds the engine, and follows the first engine's port.
            gpus: Those that are the engine's own, as `gpus_of_engine` and `assigned_gpus` name them; none on a CPU.
            own_address: This host's, as those who call the engine know it.
            avoid_ports: Free ones that are promised to others.
            part: Of an engine on several nodes, that of this one. Nothing but node rank 0 answers requests.

        Raises `ValueError` when the port is taken or the spec sets an argument that we own.
        """
        config = spec.config
        host = own_address if config.host is None else config.host
        self.host = advertised_address(bind_address(host), own=own_address)
        port = config.port + index if config.port else 0
        self.port = claim_port(host, port, section=spec.section, avoid=avoid_ports)
        bootstrap_port = None
        if index < spec.num_prefill:
            taken = {self.port, *avoid_ports}
            bootstrap_port = part.bootstrap_port if part else free_port(bind_address(host), avoid=taken)
        self._timeout_s = config.start_timeout_s
        self._rendezvous = Path(tempfile.gettempdir()) / f"polyturn-rendezvous-{uuid.uuid4().hex}"
        if part is None and spec.attention_parts > 1:
            rendezvous: str | None = NodePart.find_rendezvous(LOOPBACK)
        else:
            rendezvous = None if part is None else part.rendezvous
        arguments = server_arguments(
            spec,
            host=bind_address(host),
            port=self.port,
            index=index,
            part=part,
            rendezvous=rendezvous,
            bootstrap_port=bootstrap_port,
        )
        on_cpu = config.device == "cpu"
        where = "" if part is None else f" (node rank {part.node_rank})"
        log = (
            f"engine_{index}"
            if part is None or part.node_rank == 0
            else f"engine_{index}_node_{part.node_rank}"
        )
        self.process = SupervisedProcess(
            [sys.executable, "-m", "polyturn.rollout.engines.sglang_main", *arguments],
            name=f"SGLang server {index}{where}"
            if spec.section == "engines"
            else f"SGLang server {index}{where} of {spec.section}",
            log_path=spec.log_directory / f"{log}.log",
            environment={
                **ENVIRONMENT,
                **(cpu_environment(config.tensor_parallel) if on_cpu else gpu_environment(gpus)),
                # Ranks of one node meet in a file: the store of a TCP rendezvous would listen on every interface.
                **(
                    {"SGLANG_DISTRIBUTED_INIT_METHOD_OVERRIDE": f"file://{self._rendezvous}"}
                    if part is None
                    else {}
                ),
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


def server_arguments(
    spec: EngineSpec,
    *,
    port: int,
    host: str = LOOPBACK,
    index: int = 0,
    part: NodePart | None = None,
    rendezvous: str | None = None,
    bootstrap_port: int | None = None,
) -> list[str]:
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
        "nnodes": None if part is None else part.num_nodes,
        "node_rank": None if part is None else part.node_rank,
        "dist_init_addr": rendezvous,
        "disaggregation_mode": _disaggregation_mode(spec, index),
        "disaggregation_bootstrap_port": bootstrap_port,
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


def _disaggregation_mode(spec: EngineSpec, index: int) -> str | None:
    if not spec.num_prefill:
        return None
    return "prefill" if index < spec.num_prefill else "decode"


def bootstrap_port(url: str) -> int:
    """The port at which the decoding engines meet an engine that reads prompts, as that says itself."""
    reply = httpx.get(f"{url}/server_info", timeout=30.0, trust_env=False, verify=False)
    return int(reply.raise_for_status().json()["disaggregation_bootstrap_port"])


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
        self,
        *,
        config: RouterConfig,
        worker_urls: Sequence[str],
        request_timeout_s: float,
        log_path: Path,
        prefill: Mapping[str, int] | None = None,
    ) -> None:
        """Choose the port; nothing starts.

        Args:
            worker_urls: The engines, which must be ready.
            prefill: Engines that only read prompts, by URL with their bootstrap ports; those in `worker_urls` then only
                generate.

        Raises `ValueError` when the port is taken, or the config sets an option of ours.
        """
        for _, problem in find_problems(ROUTER, config.options, device="cpu"):
            raise ValueError(problem)
        self.config = config
        bound = bind_address(config.host)
        self.host = advertised_address(bound)
        self.port = claim_port(bound, config.port, section="engines.router")
        self._num_workers = len(worker_urls) + len(prefill or {})
        self._known = {*worker_urls, *(prefill or ())}
        self._pairs = prefill is not None
        arguments: dict[str, Any] = {
            # It reads host and port as one text, which names and bare IPv6 addresses are not.
            "host": bracketed(bound),
            "port": self.port,
            "policy": config.policy,
            # By default metrics listen on every interface, at a port that two routers would share.
            "prometheus_host": LOOPBACK,
            "prometheus_port": free_port(LOOPBACK, avoid=(self.port,)),
            "health_check_endpoint": "/health",
            "request_timeout_secs": max(1, round(request_timeout_s)),
            "shutdown_grace_period_secs": 1,
            **ROUTER_DEFAULTS,
            **config.options,
        }
        words = command_line(arguments)
        if prefill is None:
            words += ["--worker-urls", *worker_urls]
        else:
            words.append("--pd-disaggregation")
            for url, port in prefill.items():
                words += ["--prefill", url, str(port)]
            for url in worker_urls:
                words += ["--decode", url]
        self.process = SupervisedProcess(
            [sys.executable, "-m", "polyturn.rollout.engines.router_main", *words],
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
        if self._pairs:
            # It is told at its start which engines read prompts.
            return False
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
