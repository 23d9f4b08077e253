"""Which failures are the simulated user's, and not the policy's."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from polyturn.agents.episode import Episode

SUCCESS_REWARD = 1.0 - 1e-6
"""An episode that is paid as much succeeded."""
BROKE_SCRIPT = "user_broke_script"
"""The metric of an episode with a simulated user: 1 where that broke its script, else 0 (`envs/users/watch.py`)."""


def user_fault_share(episodes: Iterable[Episode]) -> float | None:
    """Of the episodes with a simulated user that did not succeed, the share in which that had broken its script.

    None where there is no such episode.
    """
    return share_of_user_faults((episode.metrics, episode.reward) for episode in episodes)


def share_of_user_faults(played: Iterable[tuple[Mapping[str, float], float | None]]) -> float | None:
    """The same of the metrics and rewards of episodes."""
    broke = [
        metrics[BROKE_SCRIPT] > 0
        for metrics, reward in played
        if BROKE_SCRIPT in metrics and reward is not None and reward < SUCCESS_REWARD
    ]
    return sum(broke) / len(broke) if broke else None
