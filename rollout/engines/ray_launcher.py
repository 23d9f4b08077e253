"""Engines of a Ray cluster, started where the run's placement seats them: by one actor, or one on each of its nodes.

Actors die with the driver: Ray ends the workers of a job whose driver is gone, and a server ends with the actor that
started it.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from typing import Any

import ray

from polyturn.configs.addresses import bind_address
from polyturn.configs.sizing.nodes import Node
from polyturn.configs.sizing.placement import POLICY_ENGINES, PlacedEngine, place_further
from polyturn.rollout.engines.process import EngineError
from polyturn.rollout.engines.reservation import Reservation, free_nodes
from polyturn.rollout.engines.server import EngineSpec, NodePart, SGLangServer

logger = logging.getLogger(__name__)

STOP_TIMEOUT_S = 20.0
ENDED_TIMEOUT_S = 5.0
PLACE_TIMEOUT_S = 60.0
"""For the actors of an engine to start, beside the time that its server has: a node may be gone."""


class EngineActor:
    """One SGLang server, or what one has on the node of this actor."""

    def __init__(
        self, spec: EngineSpec, index: int, gpus: Sequence[str], *, node_rank: int = 0, num_nodes: int = 1
    ) -> None:
        self._spec = spec
        self._index = index
        self._gpus = tuple(gpus)
        self._node_rank = node_rank
        self._num_nodes = num_nodes
        self._server: SGLangServer | None = None

    def rendezvous(self) -> str:
        """Where the nodes of this engine may meet: an address and a port of this host."""
        return NodePart.find_rendezvous(bind_address(ray.util.get_node_ip_address()))

    def start(self, rendezvous: str | None) -> str:
        """Start the server, and on its first node wait until it is ready; its URL, as all nodes may use it.

        Raises as `Engine.ready` does.
        """
        part = None
        if rendezvous is not None:
            part = NodePart(node_rank=self._node_rank, num_nodes=self._num_nodes, rendezvous=rendezvous)
        self._server = SGLangServer(
            self._spec,
            index=self._index,
            gpus=self._gpus,
            own_address=bind_address(ray.util.get_node_ip_address()),
            part=part,
        )
        self._server.start()
        if self._node_rank == 0:
            self._server.wait_ready()
        return self._server.url

    def check(self) -> None:
        """Raise `EngineError` with the log's tail unless the server is running, or has not been started."""
        if self._server is not None:
            self._server.process.check()

    def ended(self) -> str | None:
        return None if self._server is None else self._server.ended()

    def stop(self) -> None:
        if self._server is not None:
            self._server.stop()


class RayEngine:
    """The `Engine` of one actor or several, seen from the driver."""

    def __init__(
        self, spec: EngineSpec, placed: PlacedEngine, reservation: Reservation, *, is_alone: bool = False
    ) -> None:
        """`is_alone`: the reservation is for this engine, and ends with it."""
        self._spec = spec
        self._own_reservation = reservation if is_alone else None
        self._index = placed.index
        # The trainer's ranks are counted as CPUs; engines take turns with them, so they ask for none.
        self._actors = [
            ray.remote(EngineActor)
            .options(num_cpus=0, scheduling_strategy=reservation.on(seat))
            .remote(
                spec,
                placed.index,
                reservation.gpus(seat),
                node_rank=node_rank,
                num_nodes=len(placed.seats),
            )
            for node_rank, seat in enumerate(placed.seats)
        ]
        self._started: list[Any] = []
        self._checks: list[Any] = []
        self._stopped: list[Any] = []
        self._url: str | None = None

    @property
    def url(self) -> str:
        assert self._url is not None, "the engine is not ready"
        return self._url

    def start(self) -> None:
        first = self._actors[0]
        # Resolved where it is used: the driver does not wait for it.
        rendezvous = first.rendezvous.remote() if len(self._actors) > 1 else None
        self._started = [actor.start.remote(rendezvous) for actor in self._actors]
        self._checks = [actor.check.remote() for actor in self._actors[1:]]
        self._deadline = time.monotonic() + self._spec.config.start_timeout_s + PLACE_TIMEOUT_S

    def ready(self) -> bool:
        done, waiting = ray.wait(self._started, num_returns=len(self._started), timeout=0)
        # What one of the nodes raised is why the first one would wait for it.
        urls = dict(zip(done, ray.get(done), strict=True))
        self._check_other_nodes()
        if not waiting:
            self._url = urls[self._started[0]]
        elif time.monotonic() > self._deadline:
            raise EngineError(
                f"SGLang server {self._index} was not ready after {self._spec.config.start_timeout_s:g} s, and the "
                "process that holds it does not answer: is its node still there?"
            )
        return self._url is not None

    def _check_other_nodes(self) -> None:
        """They answer nothing by which their end would be noticed: an engine waits for a node that has died."""
        for number, check in enumerate(self._checks):
            if ray.wait([check], timeout=0)[0]:
                ray.get(check)
                self._checks[number] = self._actors[number + 1].check.remote()

    def ended(self) -> str | None:
        calls = [actor.ended.remote() for actor in self._actors]
        done, _ = ray.wait(calls, num_returns=len(calls), timeout=ENDED_TIMEOUT_S)
        for node_rank, call in enumerate(calls):
            if call not in done:
                continue
            on_node = f" (node rank {node_rank})" if len(calls) > 1 else ""
            try:
                how: str | None = ray.get(call)
            except ray.exceptions.RayError:
                return f"the process that holds SGLang server {self._index}{on_node} has died"
            if how is not None:
                return f"{how}{on_node}"
        return None

    def release(self) -> None:
        if not self._stopped:
            self._stopped = [actor.stop.remote() for actor in self._actors]

    def stop(self) -> None:
        self.release()
        try:
            for stopped in self._stopped:
                ray.get(stopped, timeout=STOP_TIMEOUT_S)
        except ray.exceptions.RayError as fault:
            # It may have died already, which must not hide why; a server ends with its actor.
            logger.info("stopping an engine: %s", fault)
        finally:
            for actor in self._actors:
                ray.kill(actor)
            if self._own_reservation is not None:
                self._own_reservation.release()


class RayLauncher:
    """Engines are actors of the Ray cluster that this process has joined. An engine that has ended may be launched
    again: it comes where it was, or, where a node of its place has gone, on one that has room for it now. So does one
    that no plan knows."""

    def __init__(self, spec: EngineSpec, reservation: Reservation, *, group: str = POLICY_ENGINES) -> None:
        """`group`: of the placement's engines."""
        self._spec = spec
        self._reservation = reservation
        self._placed = reservation.placement.engines[group]
        self._were_launched: set[int] = set()

    def __call__(self, index: int) -> RayEngine:
        if index in self._were_launched or index >= len(self._placed):
            free = free_nodes()
            gone = self._gone(index, free)
            if index >= len(self._placed) or gone:
                return self._elsewhere(index, gone, free)
        # At the start of a run all nodes are there: the reservation has just been given on them.
        self._were_launched.add(index)
        return RayEngine(self._spec, self._placed[index], self._reservation)

    def _gone(self, index: int, living: Sequence[Node]) -> list[str]:
        """The nodes of an engine's place that the cluster does not have any more."""
        there = {node.address for node in living}
        seats = self._placed[index].seats if index < len(self._placed) else ()
        return [seat.node.address for seat in seats if seat.node.address not in there]

    def _elsewhere(self, index: int, gone: Sequence[str], free: Sequence[Node]) -> RayEngine:
        placement = place_further(self._spec.config, index, free, section=self._spec.section)
        (placed,) = placement.engines[POLICY_ENGINES]
        if gone:
            logger.warning(
                "engine %d goes to node %s: %s has gone",
                index,
                placed.seats[0].node.address,
                " and ".join(gone),
            )
        reservation = Reservation(placement, timeout_s=PLACE_TIMEOUT_S, asks_nodes=False)
        return RayEngine(self._spec, placed, reservation, is_alone=True)
