"""The Ray cluster of a run: joined or started, and whether its nodes can hold the run, which is asked at once."""

from __future__ import annotations

import ipaddress
import logging
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Self

import ray
from ray._private import ray_constants

from polyturn.configs.addresses import without_brackets
from polyturn.configs.errors import ConfigError, RunFailure
from polyturn.configs.schema.engines import ServersConfig
from polyturn.configs.schema.run import RunConfig
from polyturn.configs.sizing.arithmetic import num_gpus
from polyturn.configs.sizing.served import managed_models


@dataclass(frozen=True, kw_only=True, slots=True)
class Node:
    """A node and all that it has, used or not."""

    address: str
    num_cpus: int
    num_gpus: int

    @classmethod
    def of(cls, entry: Mapping[str, Any]) -> Self:
        """From an entry of `ray.nodes()`."""
        resources = entry.get("Resources", {})
        return cls(
            address=str(entry["NodeManagerAddress"]),
            num_cpus=int(resources.get("CPU", 0)),
            num_gpus=int(resources.get("GPU", 0)),
        )


def check_cluster(config: RunConfig, nodes: Sequence[Node]) -> None:
    """Whether engines and ranks find room on the nodes, and can reach one another there.

    An engine's ranks are on one node; so are, each by itself, a trainer's rank's CPU and GPU.

    Raises:
        ConfigError: they do not.
    """
    engines, trainer = config.engines, config.trainer
    shown = ", ".join(f"{node.address} ({node.num_cpus} CPUs, {node.num_gpus} GPUs)" for node in nodes)
    if engines.host is not None and len(nodes) > 1 and _is_loopback(engines.host):
        raise ConfigError(
            f"engines.host is {engines.host}, which is not reached from another of the cluster's {len(nodes)} nodes; "
            "leave it out, and each engine listens on the address of its node"
        )
    cpus = sum(node.num_cpus for node in nodes)
    if trainer.num_ranks > cpus:
        raise ConfigError(
            f"the trainer asks for {trainer.num_ranks} CPUs, one a rank, but the cluster has {shown}"
        )
    sections: list[tuple[str, ServersConfig]] = [] if config.rollout.replay else [("engines", engines)]
    sections += [(f"{model.name}'s engines", model.engines) for model in managed_models(config)]
    for name, servers in sections:
        room = sum(node.num_gpus // servers.tensor_parallel for node in nodes)
        if servers.device == "cuda" and room < servers.num_engines:
            raise ConfigError(
                f"{servers.num_engines} engine(s) with {name}.tensor_parallel={servers.tensor_parallel} need so many "
                f"GPUs each on one node, but the cluster has {shown}"
            )
    wanted, gpus = num_gpus(config), sum(node.num_gpus for node in nodes)
    if wanted > gpus:
        raise ConfigError(f"the config asks for {wanted} GPUs, but the cluster has {shown}")


def _is_loopback(host: str) -> bool:
    plain = without_brackets(host)
    try:
        return ipaddress.ip_address(plain).is_loopback
    except ValueError:
        return plain == "localhost"


def start_ray(config: RunConfig, *, num_gpus: int | None = None) -> None:
    """Join the cluster that the config names, or start a private one on this machine's loopback.

    Args:
        num_gpus: of a private one; None: those that this process sees.

    Raises:
        ConfigError: the cluster has no room for the run.
    """
    if config.cluster.address is not None:
        try:
            ray.init(address=config.cluster.address, log_to_driver=False, logging_level=logging.ERROR)
        except (ConnectionError, RuntimeError, ValueError) as error:
            raise RunFailure(
                f"cluster.address: Ray at {config.cluster.address} cannot be joined: {str(error).splitlines()[0]}"
            ) from error
        check_cluster(config, [Node.of(entry) for entry in ray.nodes() if entry["Alive"]])
        return
    # Ray takes its loopback mode, in which nothing listens beyond this machine, for Windows and macOS alone. The
    # constant is for this process, which has read the variable already; the variable is for the processes of Ray.
    os.environ["RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"] = "0"
    ray_constants.ENABLE_RAY_CLUSTER = False
    # The ranks are counted as CPUs; engines take turns with them, so they ask for none.
    num_cpus = config.trainer.num_ranks
    ray.init(
        address="local",  # else it joins what `ray start` left on this machine
        num_cpus=num_cpus,
        num_gpus=num_gpus,
        include_dashboard=False,
        log_to_driver=False,
        logging_level=logging.ERROR,
        _node_ip_address="127.0.0.1",
    )
