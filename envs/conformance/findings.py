"""What the conformance kit checks, and what it finds."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from polyturn.envs.tasks import Task, TaskSource
from polyturn.envs.tool_env import ToolEnv

USUAL_SPLITS = ("train", "validation", "heldout", "test")


class Nonconforming(Exception):
    """Raised by a check; the text says what was seen and what to do about it."""


class Unavailable(Exception):
    """What the environment runs on is not there, such as a sandbox or an optional package: nothing can be said."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Finding:
    """What one check found."""

    check: str
    ok: bool
    message: str
    """What was seen, and where it is not ok what to do about it."""
    seconds: float = 0.0


@dataclass(frozen=True, kw_only=True, slots=True)
class Subject:
    """An environment to check, and how hard."""

    name: str
    make: Callable[[], ToolEnv]
    """A fresh instance each time."""
    num_tasks: int = 8
    """Tasks of each split that the oracle and the random policy play."""
    num_episodes: int = 1000
    """Episodes that are played at the same time, fewer where they would take longer than the budget."""
    budget_s: float = 5.0
    """About how long a check may go on repeating episodes."""
    answer_s: float = 5.0
    """How long one step may take to answer a message that was made to be hard."""
    form_parts: tuple[str, ...] = ("format",)
    """Reward parts that are for the form of an answer and not for what it says; a probe may earn them."""
    sabotage: tuple[Callable[[ToolEnv], None], ...] = ()
    """Functions that break what stands behind a new environment; the oracle's next episode must then be a fault."""

    @contextlib.contextmanager
    def open(self) -> Iterator[ToolEnv]:
        """A fresh instance that is closed at the end."""
        env = self.make()
        try:
            yield env
        finally:
            env.close()

    def splits(self, env: ToolEnv) -> dict[str, TaskSource]:
        """The splits that the environment has: those it names in an attribute `splits`, and the usual ones."""
        found: dict[str, TaskSource] = {}
        for split in dict.fromkeys((*getattr(env, "splits", ()), *USUAL_SPLITS)):
            try:
                source = env.tasks(split)
            except ValueError:
                continue
            except Exception as error:
                raise Nonconforming(
                    f"tasks({split!r}) raised {type(error).__name__}: {error}; "
                    "raise a ValueError that names the splits for one that does not exist"
                ) from error
            if len(source):
                found[split] = source
        if not found:
            raise Nonconforming(
                f"none of the splits {', '.join(USUAL_SPLITS)} has a task; define `tasks(split)`, "
                "and name unusual splits in an attribute `splits`"
            )
        return found

    def tasks(self, source: TaskSource) -> list[Task]:
        """`num_tasks` of a split at most, spread evenly over it."""
        count = min(self.num_tasks, len(source))
        return [source[index * len(source) // count] for index in range(count)]
