"""TreasureHunt: walk through a house, find the key that fits, open the chest and take the treasure.

A house is made from a seed: rooms on a grid, doors between them, a locked chest, a key and a treasure.
"""

from __future__ import annotations

import functools
import random
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

from polyturn.envs.messages import AssistantMessage, ListTasks, Message, Task, TaskSource, known_split
from polyturn.envs.tool_env import ToolEnv
from polyturn.tools.tool import tool
from polyturn.tools.types import ToolCall, ToolError, ToolSpec

Direction = Literal["north", "east", "south", "west"]
DIRECTIONS: tuple[Direction, ...] = get_args(Direction)
_MOVES = dict(zip(DIRECTIONS, ((0, -1), (1, 0), (0, 1), (-1, 0)), strict=True))
_ROOMS = (
    "attic bakery cellar den entry foyer gallery hall kitchen library nursery pantry studio vault "
    "winery workshop"
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
    names = rng.sample(_ROOMS.split(), len(cells))
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
            doors[behind].add(DIRECTIONS[DIRECTIONS.index(direction) - 2])
            old, new = component[behind], component[cell]
            component = {c: new if number == old else number for c, number in component.items()}
    return {cell: tuple(d for d in DIRECTIONS if d in found) for cell, found in doors.items()}


SPLITS = ("train", "heldout")
NUM_TASKS = 400


class TreasureHuntEnv(ToolEnv):
    """The reward is 1.0 when the treasure is taken before the turns run out, else 0.0."""

    is_replayable = True

    def __init__(
        self,
        *,
        width: int = 3,
        height: int = 3,
        num_keys: int = 2,
        split: str = "train",
        max_turns: int | None = 60,
        tasks: TaskSource | None = None,
        render_mode: str | None = None,
    ) -> None:
        """
        Args:
            width: Rooms from west to east.
            height: Rooms from north to south; width times height is from 2 to 16.
            num_keys: From 1 to 6; one of them fits the chest, which says which.
            split: `train` or `heldout`.
            max_turns: Actions.
            tasks: Take the place of the game's own; a label is a `House`.
            render_mode: None or "ansi".

        Raises:
            ValueError: an unknown split or sizes that make no house.
        """
        if min(width, height) < 1 or not 2 <= width * height <= 16 or not 1 <= num_keys <= 6:
            raise ValueError("a house has from 2 to 16 rooms and from 1 to 6 keys")
        known_split(split, SPLITS)
        self._size = (width, height, num_keys)
        super().__init__(tasks=tasks, split=split, max_turns=max_turns, render_mode=render_mode)

    def tasks(self, split: str) -> TaskSource:
        """The houses of one split, or the tasks given to the constructor."""
        if self._given_tasks is not None:
            return self._given_tasks
        return houses(*self._size, known_split(split, SPLITS))

    def begin(self, task: Task) -> Sequence[Message]:
        """The aim, and what is seen at the start."""
        self._house: House = task.label
        self._cell = self._house.start
        self._held: set[str] = set()
        self._open = self._taken = False
        aim = (
            f"Find the {self._house.treasure} and take it. It lies in a locked chest somewhere in this house."
        )
        return [{"role": "user", "content": f"{aim} {self._view()}"}]

    @tool
    def look(self) -> str:
        """Look around."""
        return f"{self._view()} You hold: {', '.join(f'the {key} key' for key in sorted(self._held)) or 'nothing'}."

    @tool
    def go(self, direction: Direction) -> str:
        """Go through a door."""
        if direction not in self._house.doors[self._cell]:
            raise ToolError(f"There is no door to the {direction}. {self._view()}")
        self._cell = self._house.beyond(self._cell, direction)
        return self._view()

    @tool
    def take(self, thing: str) -> str:
        """Take something that is here.

        Args:
            thing: What to take, for example "iron key".
        """
        name = thing.strip().lower().removeprefix("the ")
        if name == self._house.treasure and self._open and self._cell == self._house.chest:
            self._taken = True
            self.finish()
            return f"You have the {name}."
        key = name.removesuffix(" key")
        if key not in self._keys_here():
            raise ToolError(f"There is no {name} to take here.")
        self._held.add(key)
        return f"You have the {key} key."

    @tool
    def open_chest(self, key: str) -> str:
        """Open the chest that is here.

        Args:
            key: The key to use, for example "iron key".
        """
        if self._cell != self._house.chest:
            raise ToolError("There is no chest here.")
        name = key.strip().lower().removeprefix("the ").removesuffix(" key")
        if name not in self._held:
            raise ToolError(f"You do not hold a {name} key.")
        if name != self._house.fitting_key:
            raise ToolError(f"The {name} key does not fit.")
        self._open = True
        return f"The chest is open. The {self._house.treasure} is in it."

    def grade(self, message: AssistantMessage) -> Mapping[str, float]:
        """Whether the treasure was taken."""
        del message
        return {"found": float(self._taken)}

    def oracle(self, messages: Sequence[Message], tools: Sequence[ToolSpec]) -> AssistantMessage:
        """Goes the shortest way to the key that fits, then to the chest."""
        del messages, tools
        house = self._house
        has_key = house.fitting_key in self._held
        step = house.first_step(self._cell, house.chest if has_key else house.keys[house.fitting_key])
        if step is not None:
            return _call("go", direction=step)
        if not has_key:
            return _call("take", thing=f"{house.fitting_key} key")
        return (
            _call("take", thing=house.treasure) if self._open else _call("open_chest", key=house.fitting_key)
        )

    def _keys_here(self) -> list[str]:
        return [k for k, cell in self._house.keys.items() if cell == self._cell and k not in self._held]

    def _view(self) -> str:
        house = self._house
        parts = [f"You are in the {house.rooms[self._cell]}."]
        doors = [d for d in DIRECTIONS if d in house.doors[self._cell]]
        named = "There is a door" if len(doors) == 1 else "There are doors"
        parts.append(f"{named} to the {' and '.join(doors)}.")
        parts += [f"A {key} key lies here." for key in self._keys_here()]
        if self._cell == house.chest:
            lock = "open" if self._open else f"locked; its lock is of {house.fitting_key} make"
            parts.append(f"The chest is here. It is {lock}.")
        return " ".join(parts)


@functools.lru_cache(maxsize=8)
def houses(width: int, height: int, num_keys: int, split: str) -> ListTasks:
    """The houses of one split as tasks."""
    return ListTasks(
        [
            Task(
                task_id=f"{split}-{number}",
                messages=(),
                label=make_house(
                    f"treasure-hunt/{split}/{number}", width=width, height=height, num_keys=num_keys
                ),
            )
            for number in range(NUM_TASKS)
        ]
    )


def _call(name: str, **arguments: Any) -> AssistantMessage:
    return AssistantMessage(tool_calls=(ToolCall(id="call_0", name=name, arguments=arguments),))
