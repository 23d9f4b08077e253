"""What a placement takes of a Ray cluster, reserved: a bundle on each of its nodes, with all the GPUs and CPUs there.

Ray numbers the GPUs that it assigns in the order of asking, and binds none of them to a bundle's index; bundles have no
order among the nodes either. So a run takes one bundle of each node, which the node's address pins, asks once which
GPUs it got there, and hands them to its processes itself: a process that Ray started has the GPUs that the plan says,
also where two of them take turns on one, and again when it is started anew.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray
from ray.util.placement_group import PlacementGroup, placement_group, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from polyturn.configs.addresses import bind_address
from polyturn.configs.errors import RunFailure
from polyturn.configs.sizing.nodes import Node
from polyturn.configs.sizing.placement import Placement, Seat
from polyturn.rollout.engines.placement import assigned_gpus

logger = logging.getLogger(__name__)

ASK_TIMEOUT_S = 120.0
"""For a worker process of a node to start, and to look at paths on a slow file system."""


@dataclass(frozen=True, kw_only=True, slots=True)
class SharedPath:
    """A path that all nodes must see alike."""

    what: str
    """What it is, or the option that names it."""
    path: Path
    probe: Path
    """What is looked for: the path itself, or a file in it."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Sight:
    """What a node says of itself."""

    address: str
    gpus: tuple[str | int, ...]
    """Those of the bundle, as `ray.get_gpu_ids` names them."""
    unseen: tuple[int, ...]
    """By number, the probes that are not there."""


class Reservation:
    """A placement's share of the cluster that this process has joined, until `release`."""

    def __init__(
        self,
        placement: Placement,
        *,
        timeout_s: float = 600.0,
        asks_nodes: bool = True,
        shared_paths: Sequence[SharedPath] = (),
    ) -> None:
        """Reserve it and compare what came with the plan.

        Args:
            timeout_s: how long the cluster may take to give it.
            asks_nodes: whether nodes without GPUs are asked at all: in a cluster that was started here there is one,
                which is this machine, and a process to ask it takes a second to start.

        Raises:
            RunFailure: a resource is short, or a node does not see one of the paths.
        """
        self.placement = placement
        self._nodes = [
            node for node in placement.nodes if any(seat.node == node for seat in placement.seats())
        ]
        bundles = [_bundle(node, *placement.on(node)) for node in self._nodes]
        self._group: PlacementGroup | None = None
        self._gpus: dict[str, tuple[str, ...]] = {node.address: () for node in self._nodes}
        if not bundles:
            return
        self._group = placement_group(bundles, strategy="PACK")
        try:
            if not self._group.wait(timeout_seconds=math.ceil(timeout_s)):
                raise RunFailure(
                    f"the Ray cluster has not given the run what it takes after {timeout_s:g} s: "
                    f"{_what_is_short(self._nodes, bundles)} (cluster.start_timeout_s)"
                )
            if asks_nodes or any(placement.on(node)[1] for node in self._nodes):
                self._ask(shared_paths)
        except BaseException:
            self.release()
            raise

    def gpus(self, seat: Seat) -> tuple[str, ...]:
        """The GPUs of a seat as `CUDA_VISIBLE_DEVICES` names them on its node."""
        there = self._gpus[seat.node.address]
        return tuple(there[self._number(seat.node, gpu)] for gpu in seat.gpus)

    def on(self, seat: Seat) -> PlacementGroupSchedulingStrategy:
        """Where an actor goes that sits there; it asks for CPUs, and never for GPUs."""
        assert self._group is not None, "a placement with seats has a bundle for each of their nodes"
        return PlacementGroupSchedulingStrategy(
            self._group, placement_group_bundle_index=self._nodes.index(seat.node)
        )

    def release(self) -> None:
        """Give it back, and end what still sits there. A second call does nothing."""
        if self._group is not None:
            remove_placement_group(self._group)
            self._group = None

    def _number(self, node: Node, gpu: int) -> int:
        """A plan may leave GPUs of a node out; the bundle has those that it takes, in order."""
        taken = sorted({g for seat in self.placement.seats() if seat.node == node for g in seat.gpus})
        return taken.index(gpu)

    def _ask(self, shared_paths: Sequence[SharedPath]) -> None:
        probes = [str(path.probe) for path in shared_paths]
        # Each asks for all GPUs of its node's bundle, and gives them back when it has answered.
        calls = [
            ray.remote(_look)
            .options(
                num_cpus=0,
                num_gpus=self.placement.on(node)[1],
                scheduling_strategy=self.on(Seat(node=node)),
            )
            .remote(probes)
            for node in self._nodes
        ]
        try:
            sights: list[Sight] = ray.get(calls, timeout=ASK_TIMEOUT_S)
        except ray.exceptions.GetTimeoutError as error:
            _, waiting = ray.wait(calls, num_returns=len(calls), timeout=0)
            silent = [node.address for node, call in zip(self._nodes, calls, strict=True) if call in waiting]
            raise RunFailure(
                f"after {ASK_TIMEOUT_S:g} s no process of the run answers on {', '.join(silent)}"
            ) from error
        for node, sight in zip(self._nodes, sights, strict=True):
            if bind_address(sight.address) != bind_address(node.address):
                raise RunFailure(
                    f"Ray placed on {sight.address} what was planned for {node.address}; do two of its nodes share an "
                    "address?"
                )
            self._gpus[node.address] = assigned_gpus(sight.gpus, self.placement.on(node)[1])
            for number in sight.unseen:
                shared = shared_paths[number]
                raise RunFailure(
                    f"{shared.what}: {shared.path} is not seen on node {node.address}; it must lie on a file system "
                    "that all nodes of the cluster share"
                )
            logger.info("%s: GPUs %s", node.address, ",".join(self._gpus[node.address]) or "none")


def _look(probes: Sequence[str]) -> Sight:
    return Sight(
        address=ray.util.get_node_ip_address(),
        gpus=tuple(ray.get_gpu_ids()),
        unseen=tuple(number for number, probe in enumerate(probes) if not Path(probe).exists()),
    )


def _bundle(node: Node, num_cpus: int, num_gpus: int) -> dict[str, float]:
    """What the run takes of a node; of the resource that stands for its address next to nothing, which pins it."""
    wanted = {"CPU": float(num_cpus), "GPU": float(num_gpus), f"node:{node.address}": 0.001}
    return {name: amount for name, amount in wanted.items() if amount}


def _what_is_short(nodes: Sequence[Node], bundles: Sequence[Mapping[str, float]]) -> str:
    """By node, what is wanted and not free."""
    free = _free_by_address()
    short = []
    for node, bundle in zip(nodes, bundles, strict=True):
        if node.address not in free:
            short.append(f"{node.address} is gone")
            continue
        for name in ("GPU", "CPU"):
            wanted, there = bundle.get(name, 0.0), free[node.address].get(name, 0.0)
            if wanted > there:
                short.append(
                    f"{node.address} has {there:g} of the {wanted:g} {name}s free that the run takes there"
                )
    return "; ".join(short) or "its nodes have it, and Ray has not answered"


def free_nodes() -> list[Node]:
    """The living nodes with what no one holds of them."""
    return [
        Node(address=address, num_cpus=int(free.get("CPU", 0)), num_gpus=int(free.get("GPU", 0)))
        for address, free in sorted(_free_by_address().items())
    ]


def _free_by_address() -> dict[str, Mapping[str, Any]]:
    """What no one holds, by the address of a living node."""
    free = ray._private.state.available_resources_per_node()
    return {
        str(entry["NodeManagerAddress"]): free.get(entry["NodeID"], {})
        for entry in ray.nodes()
        if entry["Alive"]
    }
