"""Steps that are read, not played: no engine is asked, and nothing goes on beside the trainer."""

from __future__ import annotations

from concurrent.futures import Future
from pathlib import Path

from polyturn.rollout.engines.load import Loads
from polyturn.rollout.evaluation.held_out import EvaluationResult
from polyturn.rollout.groups import Group
from polyturn.rollout.scheduler import Frontier, StepGroups
from polyturn.rollout.source import OnEpisode, RolloutStart, Standing
from polyturn.rollout.store import TrajectoryStore
from polyturn.rollout.suites import Suite
from polyturn.rollout.waiting import Meanwhile, nothing


class UnplayedSteps:
    """The part of a `StepSource` that is the same wherever its groups are read from."""

    def __init__(self) -> None:
        self._step = 0
        self._frontier = Frontier()
        self._is_stopped = False

    def groups_of(self, step: int) -> tuple[Group, ...]:
        """The groups of a step, counted from 1. Raises `ValueError` where they cannot be read."""
        raise NotImplementedError

    def begin(self, start: RolloutStart, store: TrajectoryStore) -> None:
        del store
        self._step, self._frontier = start.step, start.frontier

    def take(self, *, on_episode: OnEpisode, meanwhile: Meanwhile = nothing) -> StepGroups | None:
        """The groups of the next step. Raises as `groups_of`."""
        if self._is_stopped:
            return None
        del meanwhile  # nobody waits
        self._step += 1
        groups = self.groups_of(self._step)
        for group in groups:
            self._frontier = self._frontier.with_done(group.prompt.position)
            for episode in group.episodes:
                on_episode(episode)
        return StepGroups(
            groups=groups, wait_s=0.0, num_filtered={}, num_stale=0, gave_up=False, num_in_play=0
        )

    def advance(self, *, version: int, engine_step: int, engine_version: int) -> None:
        del version, engine_step, engine_version

    def standing(self) -> Standing:
        return Standing(frontier=self._frontier, curriculum=None, figures={})

    def rest(self) -> None:
        """Nothing goes on meanwhile."""

    def go_on(self) -> None:
        """Nothing rests."""

    def stop(self) -> None:
        self._is_stopped = True

    def drain(self) -> None:
        """Nothing is under way."""

    def halt(self, *, wait: bool) -> None:
        """Nothing is under way."""

    def evaluate(
        self, suite: Suite, *, step: int, trajectories: Path, on_episode: OnEpisode | None = None
    ) -> Future[EvaluationResult | None]:
        del suite, step, trajectories, on_episode
        raise AssertionError("a run without engines has no evaluations: its config is refused")

    def engine_loads(self) -> list[tuple[float, Loads]]:
        """There are none."""
        return []

    def engine_figures(self) -> dict[str, float]:
        return {}
