"""Who sits where: which node and which of its GPUs each of a run's processes has, where it listens, and under which
address the others find it.

A plan is made of the config and of what nodes have, before anything starts. The trainer's ranks come first, node by
node in the order of the nodes, then the engines, the largest first; where that leaves no room for an engine that needs
a whole node, the engines are seated before the ranks. Ports that the config leaves open are no part of it: each is
chosen on the node where it is bound.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from polyturn.configs.addresses import without_brackets
from polyturn.configs.errors import ConfigError
from polyturn.configs.schema.engines import ServersConfig
from polyturn.configs.schema.run import RunConfig
from polyturn.configs.schema.trainer import ParallelConfig
from polyturn.configs.sizing.arithmetic import num_gpus
from polyturn.configs.sizing.nodes import Node, pretended_nodes, read_hosts
from polyturn.configs.sizing.served import managed_models

POLICY_ENGINES = "engines"
"""The group of the policy's engines; those of a served model are called by its name."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Seat:
    """The place of one process."""

    node: Node
    gpus: tuple[int, ...] = ()
    """Its own, as the node numbers them; none on a CPU."""


@dataclass(frozen=True, kw_only=True, slots=True)
class PlacedEngine:
    """An engine: a process on one node, or on several, of which the first answers requests."""

    group: str
    index: int
    seats: tuple[Seat, ...]
    """One for each of its nodes, by node rank."""
    binds: tuple[str, ...]
    """Where each of them listens: numeric, or what the config says."""
    told: str
    """The address under which the others find it."""
    port: int
    """0: a free one, chosen on the node of node rank 0."""
    on_trainer_gpus: bool

    @property
    def meets_at(self) -> str | None:
        """The address of node rank 0, where the others meet it, at a port that is chosen there; None on one node."""
        return self.seats[0].node.address if len(self.seats) > 1 else None


@dataclass(frozen=True, kw_only=True, slots=True)
class Placement:
    """Where everything is."""

    nodes: tuple[Node, ...]
    policy: tuple[Seat, ...]
    """The policy's ranks; they meet at the address of rank 0."""
    critic: tuple[Seat, ...]
    """The ranks of a critic that has its own."""
    engines: Mapping[str, tuple[PlacedEngine, ...]]
    """Those that the run starts, by group."""
    urls: Mapping[str, tuple[str, ...]]
    """Of groups that others serve."""

    def on(self, node: Node) -> tuple[int, int]:
        """The CPUs and GPUs that the run takes of a node: a CPU for each rank, and each GPU that anything sits on.

        Engines take turns with the ranks and ask for no CPU.
        """
        ranks = [seat for seat in (*self.policy, *self.critic) if seat.node == node]
        gpus = {gpu for seat in self.seats() if seat.node == node for gpu in seat.gpus}
        return len(ranks), len(gpus)

    def seats(self) -> Iterator[Seat]:
        """All of them."""
        yield from self.policy
        yield from self.critic
        for engines in self.engines.values():
            for engine in engines:
                yield from engine.seats


def plan_placement(config: RunConfig, nodes: Sequence[Node], *, trains: bool = True) -> Placement:
    """Seat a run on nodes.

    Args:
        nodes: in the order in which ranks are laid over them.
        trains: whether there are ranks; where none are, no engine shares its GPUs.

    Raises:
        ConfigError: there is no room, or they could not reach one another.
    """
    wanted, gpus = num_gpus(config), sum(node.num_gpus for node in nodes)
    if trains and wanted > gpus:
        raise ConfigError(f"the config asks for {wanted} GPUs, but the cluster has {shown(nodes)}")
    _check_sharing(config)
    _check_router(config, nodes)
    try:
        return _Plan(config, nodes, trains=trains).seated(engines_first=False)
    except ConfigError as error:
        # Ranks that are spread over nodes may break up the only node that an engine fits on.
        try:
            return _Plan(config, nodes, trains=trains).seated(engines_first=True)
        except ConfigError:
            raise error from None


def place_further(servers: ServersConfig, index: int, free: Sequence[Node], *, section: str) -> Placement:
    """The place of one engine more, or of one whose node has gone, on a node that has room for it.

    Args:
        index: the engine's number.
        free: nodes with what no one holds of them.

    Raises:
        ConfigError: none has room.
    """
    gpus = servers.tensor_parallel if servers.device == "cuda" else 0
    on_one_node = servers.ranks_per_node in (None, servers.tensor_parallel)
    node = next((node for node in free if on_one_node and node.num_gpus >= gpus), None)
    if node is None:
        raise ConfigError(
            f"there is no place for one engine more: {section}.tensor_parallel={servers.tensor_parallel} needs so many "
            f"free GPUs on one node, and of the cluster are free {shown(free)}"
        )
    seats = (Seat(node=node, gpus=tuple(range(gpus))),)
    placed = PlacedEngine(
        group=POLICY_ENGINES,
        index=index,
        seats=seats,
        binds=(servers.host or node.address,),
        told=_told(servers.host, seats, free, section),
        port=servers.port + index if servers.port else 0,
        on_trainer_gpus=False,
    )
    return Placement(nodes=(node,), policy=(), critic=(), engines={POLICY_ENGINES: (placed,)}, urls={})


def planned_nodes(config: RunConfig) -> list[Node]:
    """The nodes of a plan for which nothing is joined: those of `cluster.hosts`, or as many as it takes."""
    cluster = config.cluster
    if cluster.hosts is not None:
        return [host.as_node() for host in read_hosts(cluster.hosts, default_gpus=cluster.gpus_per_node)]
    per_node = cluster.gpus_per_node
    count = max(1, -(-num_gpus(config) // per_node))
    # What does not divide evenly takes a few more; that it fits nowhere is the planner's to say.
    for more in range(count, 2 * count + 2):
        try:
            plan_placement(config, pretended_nodes(more, num_gpus=per_node))
        except ConfigError:
            continue
        return pretended_nodes(more, num_gpus=per_node)
    return pretended_nodes(count, num_gpus=per_node)


def ranks_per_node(servers: ServersConfig, *, most: int) -> int:
    """Of the ranks of one engine, how many stand on one node that has GPUs for `most`."""
    tensor = servers.tensor_parallel
    if servers.ranks_per_node is not None:
        return servers.ranks_per_node
    if servers.device == "cpu":
        return tensor
    return max(count for count in range(1, tensor + 1) if tensor % count == 0 and count <= max(most, 1))


def shown(nodes: Sequence[Node]) -> str:
    """What they have, for a sentence."""
    return ", ".join(str(node) for node in nodes)


def _check_sharing(config: RunConfig) -> None:
    engines, device = config.engines, config.trainer.device
    if engines.num_sharing and config.plays and engines.device != device:
        raise ConfigError(
            f"engines.placement: engines that take turns with the trainer run on its device, and engines.device is "
            f"{engines.device}, trainer.device {device}"
        )


def _check_router(config: RunConfig, nodes: Sequence[Node]) -> None:
    """The router is on the driver's host, and rollout workers are on any node."""
    host = config.engines.router.host
    if len(nodes) == 1 or not config.rollout.num_workers or config.asks_engines_directly:
        return
    try:
        address = ipaddress.ip_address(without_brackets(host))
        unreached = address.is_loopback or address.is_unspecified
    except ValueError:
        unreached = host == "localhost"
    if unreached:
        raise ConfigError(
            f"engines.router.host is {host}, under which rollout workers (rollout.num_workers) on other nodes do not "
            "find the router; set it to the address of the driver's machine"
        )


class _Plan:
    """A plan in the making: what of each node is free, and what sits already."""

    def __init__(self, config: RunConfig, nodes: Sequence[Node], *, trains: bool) -> None:
        self._config = config
        self._trains = trains
        self._num_sharing = config.engines.num_sharing if trains else 0
        self._nodes = tuple(nodes)
        self._free = {node.address: list(range(node.num_gpus)) for node in nodes}
        self._cpus = {node.address: node.num_cpus for node in nodes}
        self._turn = 0

    def seated(self, *, engines_first: bool) -> Placement:
        config, plays = self._config, self._config.plays
        groups: dict[str, ServersConfig] = {}
        if plays and config.engines.is_managed:
            groups[POLICY_ENGINES] = config.engines
        groups |= {model.name: model.engines for model in managed_models(config)}
        engines: dict[tuple[str, int], list[Seat]] = {}
        if engines_first:
            engines = self._own_engines(groups)
        policy: list[Seat] = []
        critic: list[Seat] = []
        if self._trains:
            policy = self._ranks(config.trainer.parallel, "trainer.parallel")
        if self._trains and config.trainer.critic_has_ranks:
            critic = self._ranks(config.trainer.critic.parallel, "trainer.critic.parallel")
        if not engines_first:
            engines = self._own_engines(groups)
        if POLICY_ENGINES in groups and self._num_sharing:
            engines |= self._sharing_engines([*policy, *critic])
        return Placement(
            nodes=self._nodes,
            policy=tuple(policy),
            critic=tuple(critic),
            engines={
                name: tuple(
                    self._placed(name, servers, index, engines[name, index])
                    for index in range(servers.num_engines)
                )
                for name, servers in groups.items()
            },
            urls={
                **({POLICY_ENGINES: tuple(config.engines.urls)} if plays and config.engines.urls else {}),
                **{model.name: tuple(model.urls) for model in config.served_models if model.urls},
            },
        )

    def _ranks(self, parallel: ParallelConfig, section: str) -> list[Seat]:
        """Ranks in their order, node after node; those of a tensor axis are on one."""
        on_gpu = self._config.trainer.device == "cuda"
        unit, missing = parallel.tensor, parallel.world_size
        room = {
            node: min(len(self._free[node.address]), self._cpus[node.address])
            if on_gpu
            else self._cpus[node.address]
            for node in self._nodes
        }
        whole = [node for node in self._nodes if room[node] >= missing]
        seats: list[Seat] = []
        for node in whole[:1] or self._nodes:
            for _ in range(min(room[node] // unit * unit, missing)):
                gpus = (self._free[node.address].pop(0),) if on_gpu else ()
                seats.append(Seat(node=node, gpus=gpus))
                self._cpus[node.address] -= 1
                missing -= 1
        if missing:
            what = "GPUs, each with a CPU" if on_gpu else "CPUs, one a rank"
            together = f", {unit} on one node (tensor)" if unit > 1 else ""
            raise ConfigError(
                f"the trainer asks for {parallel.world_size} {what}{together} ({section}), but the cluster has "
                f"{shown(self._nodes)}"
            )
        return seats

    def _own_engines(self, groups: Mapping[str, ServersConfig]) -> dict[tuple[str, int], list[Seat]]:
        """Those with GPUs of their own, or on CPUs: the largest first, so that small ones fill what they leave."""
        own = [
            (name, index, servers)
            for name, servers in groups.items()
            for index in range(servers.num_engines - (self._num_sharing if name == POLICY_ENGINES else 0))
        ]
        own.sort(key=lambda entry: -entry[2].tensor_parallel)
        return {(name, index): self._own_engine(name, servers) for name, index, servers in own}

    def _own_engine(self, name: str, servers: ServersConfig) -> list[Seat]:
        each = ranks_per_node(servers, most=max(node.num_gpus for node in self._nodes))
        count = servers.tensor_parallel // each
        if servers.device == "cpu":
            return self._on_cpus(name, servers, count)
        fitting = [node for node in self._nodes if len(self._free[node.address]) >= each]
        if len(fitting) < count:
            raise ConfigError(self._no_room(name, servers, each, count))
        return [
            Seat(node=node, gpus=tuple(self._free[node.address].pop(0) for _ in range(each)))
            for node in fitting[:count]
        ]

    def _on_cpus(self, name: str, servers: ServersConfig, count: int) -> list[Seat]:
        """On as many nodes, going round: engines on CPUs take turns with the ranks, so that any node has room."""
        if count > len(self._nodes):
            raise ConfigError(self._no_room(name, servers, servers.tensor_parallel // count, count))
        first, self._turn = self._turn, self._turn + count
        return [Seat(node=self._nodes[(first + rank) % len(self._nodes)]) for rank in range(count)]

    def _no_room(self, name: str, servers: ServersConfig, each: int, count: int) -> str:
        unit = "GPUs" if servers.device == "cuda" else "ranks"
        section = name if name == POLICY_ENGINES else f"{name}'s engines"
        on = "one node" if count == 1 else f"each of {count} nodes"
        return (
            f"{servers.num_engines} engine(s) with {section}.tensor_parallel={servers.tensor_parallel} need {each} "
            f"{unit} each on {on}, but the cluster has {shown(self._nodes)}"
        )

    def _sharing_engines(self, trainer: Sequence[Seat]) -> dict[tuple[str, int], list[Seat]]:
        """The policy's engines that take turns with the trainer, on its GPUs in the order of its ranks."""
        engines = self._config.engines
        indices = range(engines.num_engines - self._num_sharing, engines.num_engines)
        lent: dict[Node, list[int]] = {}
        for seat in trainer:
            lent.setdefault(seat.node, []).extend(seat.gpus)
        each = ranks_per_node(engines, most=max(map(len, lent.values())))
        count = engines.tensor_parallel // each
        found = {}
        for turn, index in enumerate(indices):
            if engines.device == "cpu":
                start = turn * count % len(lent)
                fitting = [*list(lent)[start:], *list(lent)[:start]]
            else:
                fitting = [node for node, gpus in lent.items() if len(gpus) >= each]
            if len(fitting) < count:
                raise ConfigError(
                    f"engines.placement: {engines.num_sharing} engine(s) with engines.tensor_parallel="
                    f"{engines.tensor_parallel} are to take turns with the trainer, and its {len(trainer)} rank(s) on "
                    f"{len(lent)} node(s) have no room for them; start fewer engines there, or lower "
                    "engines.tensor_parallel"
                )
            found[POLICY_ENGINES, index] = [
                Seat(
                    node=node,
                    gpus=tuple(lent[node].pop(0) for _ in range(each)) if engines.device == "cuda" else (),
                )
                for node in fitting[:count]
            ]
        return found

    def _placed(self, name: str, servers: ServersConfig, index: int, seats: Sequence[Seat]) -> PlacedEngine:
        section = name if name == POLICY_ENGINES else f"{name}'s engines"
        sharing = self._num_sharing if name == POLICY_ENGINES else 0
        return PlacedEngine(
            group=name,
            index=index,
            seats=tuple(seats),
            binds=tuple(servers.host or seat.node.address for seat in seats),
            told=_told(servers.host, seats, self._nodes, section),
            port=servers.port + index if servers.port else 0,
            on_trainer_gpus=index >= servers.num_engines - sharing,
        )


def _told(host: str | None, seats: Sequence[Seat], nodes: Sequence[Node], section: str) -> str:
    """The address of an engine for the others. Raises ConfigError where they could not reach it."""
    own = seats[0].node.address
    if host is None:
        return own
    try:
        address = ipaddress.ip_address(without_brackets(host))
    except ValueError:
        if host == "localhost" and len(nodes) > 1:
            raise ConfigError(_unreached(section, host, len(nodes))) from None
        return host
    if address.is_unspecified:
        return own
    if len(nodes) > 1 and address.is_loopback and str(address) != own:
        raise ConfigError(_unreached(section, host, len(nodes)))
    others = [seat.node.address for seat in seats if seat.node.address != str(address)]
    if len(nodes) > 1 and others:
        raise ConfigError(
            f"{section}.host is {host}, which is no address of {others[0]}, where an engine sits; leave it out, and "
            "each engine listens on the address of its node, or say 0.0.0.0"
        )
    return str(address)


def _unreached(section: str, host: str, count: int) -> str:
    return (
        f"{section}.host is {host}, which is not reached from another of the cluster's {count} nodes; leave it out, "
        "and each engine listens on the address of its node"
    )
