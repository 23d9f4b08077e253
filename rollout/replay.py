"""A run's steps as another one has stored them, in place of playing them: train only."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from polyturn.agents.episode import Episode
from polyturn.rollout.groups import Group, Prompt, position_of
from polyturn.rollout.store import TrajectoryStore
from polyturn.rollout.unplayed import UnplayedSteps

UNKNOWN = -1
"""Which draw of a task a stored group was of: its position tells all that training needs."""


class ReplayedSteps(UnplayedSteps):
    """The `StepSource` that reads each step's groups from a run directory, in their order there."""

    def __init__(self, directory: Path, *, samples_per_prompt: int) -> None:
        super().__init__()
        self._source = TrajectoryStore(directory)
        self._samples_per_prompt = samples_per_prompt

    def groups_of(self, step: int) -> tuple[Group, ...]:
        """Raises `ValueError` where they are not as they were written."""
        return groups_of(self._source.read_step(step), samples_per_prompt=self._samples_per_prompt)


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
