"""Where the groups of a run's steps come from: they are played, or read where they were stored."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from polyturn.agents.episode import Episode
from polyturn.rollout.engines.load import Loads
from polyturn.rollout.evaluation.held_out import EvaluationResult
from polyturn.rollout.scheduler import Frontier, StepGroups
from polyturn.rollout.store import TrajectoryStore
from polyturn.rollout.suites import Suite
from polyturn.rollout.waiting import Meanwhile, nothing

OnEpisode = Callable[[Episode], None]


@dataclass(frozen=True, kw_only=True, slots=True)
class RolloutStart:
    """Where rollout begins, or goes on."""

    step: int
    """Steps that are finished."""
    version: int
    """The policy version of trainer and engines."""
    frontier: Frontier
    curriculum: Mapping[str, Any] | None = None
    """The state of one that draws by results."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Standing:
    """Where rollout stands: what a checkpoint has to keep of it."""

    frontier: Frontier
    """Which prompts are done with."""
    curriculum: Mapping[str, Any] | None
    """The state of one that draws by results; None: prompts follow from their positions."""
    figures: Mapping[str, float]
    """Metrics of the curriculum."""


class StepSource(Protocol):
    """Gives a run the groups of its steps, one step after the other."""

    def begin(self, start: RolloutStart, store: TrajectoryStore) -> None:
        """Say where the run stands, and where what is played is kept."""
        ...

    def take(self, *, on_episode: OnEpisode, meanwhile: Meanwhile = nothing) -> StepGroups | None:
        """Wait for the groups of the next step; None when this was stopped before they were there.

        Args:
            on_episode: called with every attempt that ends meanwhile.
            meanwhile: called again and again, in the thread that waits.

        Raises:
            RolloutError: they cannot be had.
        """
        ...

    def advance(self, *, version: int, engine_step: int, engine_version: int) -> None:
        """A step is finished.

        Args:
            version: The policy version that the next step begins with.
            engine_step: The step after which the engines got the weights that they have.
            engine_version: The version of those.
        """
        ...

    def standing(self) -> Standing:
        """Where rollout stands, all of it at one moment."""
        ...

    def rest(self) -> None:
        """Let no further request begin; nobody's time runs until `go_on`."""
        ...

    def go_on(self) -> None:
        """End a rest."""
        ...

    def stop(self) -> None:
        """Let no further episode start. May be called from a signal handler or another thread."""
        ...

    def drain(self) -> None:
        """Wait for what is under way, so that it is kept; what takes too long is given up."""
        ...

    def halt(self, *, wait: bool) -> None:
        """End all that is under way, evaluations too; `begin` may be called again afterwards.

        Args:
            wait: Let what takes no longer than a drain end, so that it is kept.
        """
        ...

    def evaluate(
        self, suite: Suite, *, step: int, trajectories: Path, on_episode: OnEpisode | None = None
    ) -> Future[EvaluationResult | None]:
        """Begin an evaluation by the weights that the engines have, beside what else is played.

        Args:
            step: the finished step whose weights they are, for the file.
            trajectories: the file that the episodes are written to at the end.
            on_episode: called with every attempt that ends.

        Returns:
            What comes of it; None where it was stopped. Raises `RolloutError` where every episode failed.
        """
        ...

    def engine_figures(self) -> dict[str, float]:
        """Metrics of the engines since the last call."""
        ...

    def engine_loads(self) -> list[tuple[float, Loads]]:
        """Samples of the engines' loads since the last call, with their times by `time.perf_counter`."""
        ...
