"""TreasureHunt: walk through a house, find the key that fits, open the chest and take the treasure."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from typing import Any

from polyturn.envs.games.house import DIRECTIONS, Direction, House, make_house
from polyturn.envs.messages import AssistantMessage, Message, known_split
from polyturn.envs.tasks import ListTasks, Task, TaskSource
from polyturn.envs.tool_env import ToolEnv
from polyturn.tools.tool import tool
from polyturn.tools.types import ToolCall, ToolError, ToolSpec

SPLITS = ("train", "heldout")
NUM_TASKS = 400


class TreasureHuntEnv(ToolEnv):
    """The reward is 1.0 when the treasure is taken before the turns run out, else 0.0."""

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
        return (
            self._given_tasks
            if self._given_tasks is not None
            else houses(*self._size, known_split(split, SPLITS))
        )

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
