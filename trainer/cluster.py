"""Whether the nodes of a Ray cluster can hold a run, before anything waits for them."""

from __future__ import annotations

import ipaddress
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Self

from polyturn.configs.addresses import without_brackets
from polyturn.configs.errors import ConfigError
from polyturn.configs.schema.run import RunConfig
from polyturn.configs.sizing.arithmetic import num_gpus


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
    if engines.device == "cuda":
        room = sum(node.num_gpus // engines.tensor_parallel for node in nodes)
        if room < engines.num_engines:
            raise ConfigError(
                f"{engines.num_engines} engine(s) with engines.tensor_parallel={engines.tensor_parallel} need so many "
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
