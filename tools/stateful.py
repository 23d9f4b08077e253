"""Tools with a state of their own for every episode."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np


class StatefulTool:
    """A class of tools whose instance lives for one episode.

        class Notebook(StatefulTool):
            def __init__(self, size: int = 10) -> None:
                self.size, self.pages = size, []

            @tool
            def write(self, text: str) -> str:
                "Write a page."
                if len(self.pages) == self.size:
                    raise ToolError("the notebook is full")
                self.pages.append(text)
                return f"page {len(self.pages)}"

        MyEnv(tools=[Notebook])                 # or Notebook.using(size=3)

    The environment makes an instance at every reset and calls `setup`; it calls `close` at the next reset, or when it
    is closed itself. `env.state_of(Notebook)` is the instance of the episode, for the grade. The class, not an
    instance, is what environments are given, so episodes never share one. `setup` and `close` are plain functions;
    an exception in them is an infrastructure fault.
    """

    def setup(self, task: Any, rng: np.random.Generator) -> None:
        """Prepare for an episode of `task`; draw random numbers from `rng` only."""

    def close(self) -> None:
        """Free what the instance holds; also called after a `setup` that failed."""

    @classmethod
    def using(cls, **options: Any) -> StateFactory:
        """The class with options for its constructor, to be given to an environment."""
        return StateFactory(cls, options)


@dataclass(frozen=True, slots=True)
class StateFactory:
    """Makes instances of one `StatefulTool` class with given options.

    Raises:
        ValueError: options that its constructor does not take, or lacks.
    """

    state_class: type[StatefulTool]
    options: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        try:
            inspect.signature(self.state_class).bind(**self.options)
        except TypeError as error:
            raise ValueError(
                f"{self.state_class.__name__} cannot be made with these options: {error}"
            ) from error

    def __call__(self) -> StatefulTool:
        return self.state_class(**self.options)


def as_state_factory(item: object) -> StateFactory | None:
    """The factory behind a `StatefulTool` class or `using(...)`; None for anything else."""
    if isinstance(item, StateFactory):
        return item
    if isinstance(item, type) and issubclass(item, StatefulTool):
        return StateFactory(item)
    return None
