"""What a config asks of this machine, or of a cluster in its place: cores, GPUs, hosts, addresses and ports."""

from __future__ import annotations

import importlib.util

from polyturn.configs.addresses import LOOPBACK
from polyturn.configs.errors import ConfigError, as_config_error
from polyturn.configs.schema.run import RunConfig
from polyturn.configs.sizing.arithmetic import num_cores, num_gpus
from polyturn.configs.sizing.nodes import pretended_nodes, read_hosts
from polyturn.configs.sizing.placement import plan_placement
from polyturn.rollout.engines.placement import claim_port


def check_cores(config: RunConfig) -> None:
    """Ranks against this machine's cores, where no Ray cluster with its own is joined."""
    if config.cluster.address is not None or config.trainer.device != "cpu":
        return
    parallel, cores = config.trainer.parallel, num_cores()
    if parallel.world_size > cores:
        raise ConfigError(
            f"trainer.parallel asks for {parallel.world_size} ranks ({parallel.describe()}), but this machine has "
            f"{cores} core(s); lower one of them"
        )
    if config.trainer.num_ranks > cores:
        raise ConfigError(
            f"the policy and the critic ask for {config.trainer.num_ranks} ranks, but this machine has {cores} "
            "core(s); set trainer.critic.placement=shared, or lower one of them"
        )


def check_hosts(config: RunConfig) -> None:
    """The host file of a run, and, where no cluster is joined, whether the run can do with one node."""
    cluster = config.cluster
    if cluster.hosts is not None:
        read_hosts(cluster.hosts, default_gpus=cluster.gpus_per_node)
        if cluster.address is None:
            raise ConfigError(
                "cluster.hosts names the nodes of a Ray cluster, and cluster.address says how to join it; without, "
                "only --dry-run can plan for them"
            )
    elif cluster.address is None:
        plan_placement(config, pretended_nodes(1, num_gpus=num_gpus(config)))


def check_gpus(config: RunConfig, *, trains: bool) -> None:
    """What the config asks for against this machine's GPUs; a run may join a Ray cluster with its own."""
    engines = config.engines
    if trains:
        wanted = 0 if config.cluster.address is not None else num_gpus(config)
        lower = "trainer.parallel or engines.num_engines"
    else:
        wanted = engines.num_engines * engines.tensor_parallel if engines.device == "cuda" else 0
        lower = "engines.num_engines or engines.tensor_parallel"
    # Without torch there is nothing to count GPUs with, and nothing that could use them.
    if not wanted or importlib.util.find_spec("torch") is None:
        return
    import torch

    visible = torch.cuda.device_count()
    if wanted > visible:
        why = "" if visible else " (`polyturn doctor` says why)"
        raise ConfigError(
            f"the config asks for {wanted} GPU(s), and {visible} can be seen{why}; lower {lower}, or set "
            "engines.device and trainer.device to cpu"
        )


def check_ports(config: RunConfig) -> None:
    """Addresses and ports of this machine; the engines of a Ray cluster that is joined may be on others."""
    engines, router = config.engines, config.engines.router
    ports = [engines.port + i for i in range(engines.num_engines)] if engines.port else [0]
    if ports[-1] > 65535:
        raise ConfigError(
            f"engines.port: {engines.num_engines} engines from port {engines.port} go beyond port 65535"
        )
    if router.port and router.port in ports:
        raise ConfigError(
            f"engines.router.port: port {router.port} is also one of engines.port; choose another, or 0 for a free one"
        )
    with as_config_error():
        claim_port(router.host, router.port, section="engines.router")
        if config.cluster.address is None:
            for port in ports:
                claim_port(engines.host or LOOPBACK, port, section="engines")
