"""A placement as people read it: what is on each node, ranks and engines of a kind in one line."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from polyturn.configs.schema.run import RunConfig
from polyturn.configs.schema.trainer import ParallelConfig
from polyturn.configs.sizing.nodes import Node
from polyturn.configs.sizing.placement import POLICY_ENGINES, PlacedEngine, Placement, Seat


@dataclass(frozen=True, kw_only=True, slots=True)
class PlacedLine:
    """What is on a node, of one kind."""

    node: str
    device: str
    name: str
    note: str


def placement_lines(config: RunConfig, placement: Placement) -> list[PlacedLine]:
    """The processes of a run, node by node; those that are the driver's, or others', last."""
    trainer = config.trainer
    threads = f", {trainer.threads_per_rank} thread(s) each" if trainer.device == "cpu" else ""
    lines: list[PlacedLine] = []
    for node in placement.nodes:
        lines += _rank_lines(node, "trainer", placement.policy, trainer.parallel, threads)
        lines += _rank_lines(node, "critic", placement.critic, trainer.critic.parallel, "")
        for engines in placement.engines.values():
            for engine in engines:
                lines += _engine_lines(node, engine)
    if not config.asks_engines_directly and config.plays:
        router = config.engines.router
        lines.append(
            PlacedLine(node="driver", device="cpu", name="router", note=f"{router.host}:{_port(router.port)}")
        )
    for name, urls in placement.urls.items():
        label = "engine" if name == POLICY_ENGINES else f"{name} engine"
        lines += [
            PlacedLine(node="elsewhere", device="", name=f"{label} {index}", note=url)
            for index, url in enumerate(urls)
        ]
    return lines


def meeting_lines(placement: Placement) -> list[str]:
    """Where processes of several nodes meet, a sentence each; none where all is on one node."""
    found = []
    for name, seats in (("trainer", placement.policy), ("critic", placement.critic)):
        if len({seat.node for seat in seats}) > 1:
            found.append(
                f"{name} ranks meet at {seats[0].node.address}, at a port that rank 0 finds free there"
            )
    for engines in placement.engines.values():
        for engine in engines:
            if engine.meets_at is not None:
                found.append(
                    f"the {len(engine.seats)} nodes of {_name(engine)} meet at {engine.meets_at}, and requests go there"
                )
    return found


def _rank_lines(
    node: Node, name: str, seats: Sequence[Seat], parallel: ParallelConfig, note: str
) -> Iterator[PlacedLine]:
    ranks = [rank for rank, seat in enumerate(seats) if seat.node == node]
    if not ranks:
        return
    gpus = tuple(gpu for rank in ranks for gpu in seats[rank].gpus)
    yield PlacedLine(
        node=node.address,
        device=_devices(gpus),
        name=f"{name} rank{_numbers(ranks)}",
        note=_places(parallel, ranks) + note,
    )


def _engine_lines(node: Node, engine: PlacedEngine) -> Iterator[PlacedLine]:
    for node_rank, (seat, bound) in enumerate(zip(engine.seats, engine.binds, strict=True)):
        if seat.node != node:
            continue
        notes = [f"listens on {bound}:{_port(engine.port)}"]
        if len(engine.seats) > 1:
            notes.insert(0, f"node rank {node_rank} of {len(engine.seats)}")
        if engine.on_trainer_gpus:
            notes.append("by turns with the trainer")
        yield PlacedLine(
            node=node.address, device=_devices(seat.gpus), name=_name(engine), note=", ".join(notes)
        )


def _name(engine: PlacedEngine) -> str:
    prefix = "" if engine.group == POLICY_ENGINES else f"{engine.group} "
    return f"{prefix}engine {engine.index}"


def _port(port: int) -> str:
    return str(port) if port else "a free port"


def _devices(gpus: Sequence[int]) -> str:
    return f"GPU{_numbers(gpus)}" if gpus else "cpu"


def _numbers(numbers: Sequence[int]) -> str:
    """` 3`, or `s 0-3,6` where there are several."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and runs[-1][-1] == number - 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    shown = ",".join(str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs)
    return f"{'s' if len(numbers) > 1 else ''} {shown}"


def _places(parallel: ParallelConfig, ranks: Sequence[int]) -> str:
    """Where ranks stand on the axes of tensor and data, and on every other axis that there is."""
    places = [parallel.place(rank) for rank in ranks]
    axes = [
        "tensor",
        "data",
        *(axis for axis in ("context", "pipeline", "expert") if getattr(parallel, axis) > 1),
    ]
    words = []
    for axis in axes:
        numbers = sorted({getattr(place, axis) for place in places})
        words.append(f"{axis}{_numbers(numbers).removeprefix('s')}")
    return ", ".join(words)
