"""The Ray cluster of a run: joined or started, its nodes, and whether they can hold the run, which is asked at once."""

from __future__ import annotations

import ipaddress
import logging
import os
import socket
import time
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

import ray
from ray._private import ray_constants

from polyturn.configs.addresses import LOOPBACK, bind_address, bracketed
from polyturn.configs.errors import ConfigError, RunFailure
from polyturn.configs.schema.run import RunConfig
from polyturn.configs.sizing.nodes import Host, Node, read_hosts, resolve
from polyturn.configs.sizing.placement import plan_placement
from polyturn.rollout.engines.reservation import Reservation, SharedPath

CONNECT_TIMEOUT_S = 10.0
POLL_S = 0.5


def start_ray(config: RunConfig, *, num_gpus: int | None = None) -> None:
    """Join the cluster that the config names, or start a private one on this machine's loopback.

    Args:
        num_gpus: of a private one; None: those that this process sees.

    Raises:
        RunFailure: it cannot be joined.
    """
    if config.cluster.address is not None:
        _join(config.cluster.address)
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
        _node_ip_address=LOOPBACK,
    )


def reserve(
    config: RunConfig, *, shared_paths: Sequence[SharedPath] = (), trains: bool = True
) -> Reservation:
    """What the run takes of the cluster that `start_ray` has joined, by a plan for its nodes.

    Args:
        shared_paths: which all nodes must see.
        trains: whether the trainer's ranks start, too.

    Raises:
        ConfigError: the cluster has no room for the run.
        RunFailure: hosts of `cluster.hosts` are not there in time, or nodes do not give what they have.
    """
    placement = plan_placement(config, _nodes_of(config), trains=trains)
    return Reservation(
        placement,
        timeout_s=config.cluster.start_timeout_s,
        asks_nodes=config.cluster.address is not None,
        shared_paths=shared_paths,
    )


def _join(address: str) -> None:
    _check_answers(address)
    try:
        ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR)
    except (ConnectionError, RuntimeError, ValueError) as error:
        raise RunFailure(
            f"cluster.address: Ray at {address} cannot be joined: {str(error).splitlines()[0]}"
        ) from error


def _check_answers(address: str) -> None:
    """Whether anything answers at host:port: Ray itself would wait for minutes, and say nothing.

    Raises:
        RunFailure: nothing does.
    """
    host, colon, port = address.rpartition(":")
    if not colon or not port.isdecimal() or "/" in host:
        return
    try:
        bound = bind_address(host)
    except ValueError as error:
        raise RunFailure(f"cluster.address: {error}") from error
    because = ""
    if ipaddress.ip_address(bound).is_loopback and bound == LOOPBACK:
        bound = ray.util.get_node_ip_address()
        because = f" (Ray takes {host} for this machine's own address; start its head with --node-ip-address)"
    try:
        socket.create_connection((bound, int(port)), timeout=CONNECT_TIMEOUT_S).close()
    except OSError as error:
        raise RunFailure(
            f"cluster.address: no Ray answers at {bracketed(bound)}:{port}{because}: {error.strerror or error}"
        ) from error


def alive_nodes(entries: Sequence[Mapping[str, Any]]) -> list[Node]:
    """The nodes of `ray.nodes()` that are alive, by their addresses: the order in which they are listed means nothing.

    Raises:
        ConfigError: two of them have one address, so that nothing could be told which is meant.
    """
    nodes = sorted((Node.of(entry) for entry in entries if entry["Alive"]), key=_by_address)
    for first, second in pairwise(nodes):
        if first.address == second.address:
            raise ConfigError(
                f"cluster.address: two nodes of the cluster have the address {first.address}; start each with a "
                "--node-ip-address of its own"
            )
    return nodes


def _by_address(node: Node) -> tuple[int, int, str]:
    try:
        address = ipaddress.ip_address(node.address)
    except ValueError:
        return 0, 0, node.address
    return address.version, int(address), node.address


def _nodes_of(config: RunConfig) -> list[Node]:
    """Of the cluster that was joined, those that the run keeps to."""
    cluster = config.cluster
    if cluster.hosts is None:
        return alive_nodes(ray.nodes())
    hosts = read_hosts(cluster.hosts, default_gpus=cluster.gpus_per_node)
    hosts = resolve(hosts, {host.name: _address_of(host) for host in hosts})
    deadline = time.monotonic() + cluster.start_timeout_s
    while True:
        there = {node.address: node for node in alive_nodes(ray.nodes())}
        missing = [host for host in hosts if host.name not in there]
        if not missing:
            return [kept_to(host, there[host.name]) for host in hosts]
        if time.monotonic() > deadline:
            first = missing[0]
            more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
            raise RunFailure(
                f"{first.where}: {first.name}{more} has not joined the Ray cluster after {cluster.start_timeout_s:g} s "
                f"(cluster.start_timeout_s); it has {', '.join(there) or 'no node'}"
            )
        time.sleep(POLL_S)


def _address_of(host: Host) -> str:
    try:
        return bind_address(host.name)
    except ValueError as error:
        raise ConfigError(f"{host.where}: {error}") from error


def kept_to(host: Host, node: Node) -> Node:
    """A node with no more GPUs than a host file says. Raises ConfigError where it has fewer."""
    if node.num_gpus < host.num_gpus:
        raise ConfigError(
            f"{host.where}: {host.name} is said to have {host.num_gpus} GPU(s), and in the Ray cluster it has "
            f"{node.num_gpus}"
        )
    return Node(address=node.address, num_cpus=node.num_cpus, num_gpus=host.num_gpus)
