"""Which task is played next: a seeded order of the tasks, with a position that a checkpoint can keep."""

from __future__ import annotations

from dataclasses import dataclass

from polyturn.envs.tasks.order import DrawOrder, ShuffledOrder


@dataclass(frozen=True, kw_only=True, slots=True)
class Prompt:
    """One draw of a task. Everything in it follows from the cursor's seed and `position`."""

    task_index: int
    epoch: int
    position: int
    """How many prompts were drawn before this one, over the whole run."""
    group_id: str
    """The identity that the episodes of this prompt share."""


class PromptCursor:
    """Draws prompts without end: every task once per epoch, or the sources of a mixture by their weights.

    A cursor made with the `position` of another goes on exactly where that one stood.
    """

    def __init__(
        self, num_tasks: int, *, seed: int, position: int = 0, order: DrawOrder | None = None
    ) -> None:
        """`order`: as `draw_order` gives it for a source; None shuffles. Raises `ValueError` for an empty source."""
        self._order = order if order is not None else ShuffledOrder(num_tasks, seed=seed)
        self._position = position

    @property
    def position(self) -> int:
        """How many prompts have been drawn."""
        return self._position

    def take(self, num_prompts: int) -> list[Prompt]:
        """Draw the next prompts."""
        prompts = self.peek(num_prompts)
        self._position += num_prompts
        return prompts

    def peek(self, num_prompts: int) -> list[Prompt]:
        """The next prompts, which are drawn later."""
        return [self._at(self._position + offset) for offset in range(num_prompts)]

    def _at(self, position: int) -> Prompt:
        draw = self._order[position]
        return Prompt(
            task_index=draw.task_index, epoch=draw.epoch, position=position, group_id=f"g{position:08d}"
        )
