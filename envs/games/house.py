"""A house made from a seed: rooms on a grid, doors between them, a locked chest, a key and a treasure."""

from __future__ import annotations

import random
from collections import deque
from dataclasses import dataclass
from typing import Literal, get_args

Direction = Literal["north", "east", "south", "west"]
DIRECTIONS: tuple[Direction, ...] = get_args(Direction)
_MOVES: dict[Direction, tuple[int, int]] = {
    "north": (0, -1),
    "east": (1, 0),
    "south": (0, 1),
    "west": (-1, 0),
}
_ROOMS = (
    "attic",
    "bakery",
    "cellar",
    "den",
    "entry",
    "foyer",
    "gallery",
    "hall",
    "kitchen",
    "library",
    "nursery",
    "pantry",
    "studio",
    "vault",
    "winery",
    "workshop",
)
_COLOURS = ("brass", "copper", "golden", "iron", "silver", "wooden")
_TREASURES = ("amulet", "compass", "crown", "lantern", "mirror", "violin")

Cell = tuple[int, int]


@dataclass(frozen=True, kw_only=True, slots=True)
class House:
    """Rooms by cell, and where things are at the start."""

    rooms: dict[Cell, str]
    doors: dict[Cell, tuple[Direction, ...]]
    start: Cell
    chest: Cell
    keys: dict[str, Cell]
    """All keys; one of them fits."""
    fitting_key: str
    treasure: str

    def beyond(self, cell: Cell, direction: Direction) -> Cell:
        """The cell behind a door."""
        dx, dy = _MOVES[direction]
        return cell[0] + dx, cell[1] + dy

    def first_step(self, start: Cell, goal: Cell) -> Direction | None:
        """The door to take on a shortest way; None when there already."""
        first: dict[Cell, Direction | None] = {start: None}
        queue = deque([start])
        while queue:
            cell = queue.popleft()
            if cell == goal:
                return first[cell]
            for direction in self.doors[cell]:
                behind = self.beyond(cell, direction)
                if behind not in first:
                    first[behind] = first[cell] or direction
                    queue.append(behind)
        raise AssertionError("every room of a house can be reached")


def make_house(seed: str, *, width: int, height: int, num_keys: int) -> House:
    """The house of a seed. Width times height is at most 16, and there are at most 6 keys."""
    rng = random.Random(seed)
    cells = [(x, y) for y in range(height) for x in range(width)]
    names = rng.sample(_ROOMS, len(cells))
    start, chest = rng.sample(cells, 2)
    keys = rng.sample(_COLOURS, num_keys)
    return House(
        rooms=dict(zip(cells, names, strict=True)),
        doors=_make_doors(rng, cells),
        start=start,
        chest=chest,
        keys={key: rng.choice(cells) for key in keys},
        fitting_key=rng.choice(keys),
        treasure=rng.choice(_TREASURES),
    )


def _make_doors(rng: random.Random, cells: list[Cell]) -> dict[Cell, tuple[Direction, ...]]:
    """A random spanning tree of the grid, and some doors more."""
    doors: dict[Cell, set[Direction]] = {cell: set() for cell in cells}
    opposite: dict[Direction, Direction] = {
        "north": "south",
        "south": "north",
        "east": "west",
        "west": "east",
    }
    walls = [
        (cell, direction, (cell[0] + dx, cell[1] + dy))
        for cell in cells
        for direction, (dx, dy) in _MOVES.items()
        if direction in ("east", "south") and (cell[0] + dx, cell[1] + dy) in doors
    ]
    rng.shuffle(walls)
    component = {cell: number for number, cell in enumerate(cells)}
    for cell, direction, behind in walls:
        if component[cell] != component[behind] or rng.random() < 0.2:
            doors[cell].add(direction)
            doors[behind].add(opposite[direction])
            old, new = component[behind], component[cell]
            component = {c: new if number == old else number for c, number in component.items()}
    return {cell: tuple(d for d in DIRECTIONS if d in found) for cell, found in doors.items()}
