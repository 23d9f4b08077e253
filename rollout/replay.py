"""A run's steps as another one has stored them, in place of playing them: train only."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import Future
from pathlib import Path

from polyturn.agents.episode import Episode
from polyturn.rollout.engines.load import Loads
from polyturn.rollout.evaluation.held_out import EvaluationResult
from polyturn.rollout.groups import Group, Prompt, position_of
from polyturn.rollout.scheduler import Frontier, StepGroups
from polyturn.rollout.source import OnEpisode, RolloutStart, Standing
from polyturn.rollout.store import TrajectoryStore
from polyturn.rollout.suites import Suite
from polyturn.rollout.waiting import Meanwhile, nothing

UNKNOWN = -1
"""Which draw of a task a stored group was of: its position tells all that training needs."""


class ReplayedSteps:
    """The `StepSource` that reads each step's groups from a run directory, in their order there."""

    def __init__(self, directory: Path, *, samples_per_prompt: int) -> None:
        self._source = TrajectoryStore(directory)
        self._samples_per_prompt = samples_per_prompt
        self._step = 0
        self._frontier = Frontier()
        self._is_stopped = False

    def begin(self, start: RolloutStart, store: TrajectoryStore) -> None:
        del store
        self._step, self._frontier = start.step, start.frontier

    def take(self, *, on_episode: OnEpisode, meanwhile: Meanwhile = nothing) -> StepGroups | None:
        """The groups of the next step. Raises `ValueError` where they are not as they were written."""
        if self._is_stopped:
            return None
        del meanwhile  # nobody waits
        self._step += 1
        groups = groups_of(self._source.read_step(self._step), samples_per_prompt=self._samples_per_prompt)
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


def groups_of(episodes: Sequence[Episode], *, samples_per_prompt: int) -> tuple[Group, ...]:
    """The groups of a step's stored episodes, in the order of their first ones. What a group lacks had failed."""
    by_group: dict[str, list[Episode]] = {}
    for episode in episodes:
        by_group.setdefault(episode.group_id, []).append(episode)
    return tuple(
        Group(
            group_id=group_id,
            prompt=Prompt(
                task_index=UNKNOWN, epoch=UNKNOWN, position=position_of(group_id), group_id=group_id
            ),
            episodes=tuple(of_group),
            num_expected=samples_per_prompt,
            num_dropped=samples_per_prompt - len(of_group),
            num_retries=0,
        )
        for group_id, of_group in by_group.items()
    )
