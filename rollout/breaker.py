"""Which part of the infrastructure fails, how often, and when that is too often to go on.

A failed attempt is played again and never scored, so that a part which fails for good costs no reward: it takes the
samples of its tasks away, step after step, and a mixture trains on without them. The breaker looks at each environment
by itself, over the steps, and ends the run in a sentence that names the part.
"""

from __future__ import annotations

import itertools
from collections import Counter, deque
from dataclasses import dataclass, field

from polyturn.agents.episode import (
    NO_ENGINE,
    POLICY_FAULT,
    UNEXPECTED_ERROR,
    USER_FAULT,
    Episode,
    Outcome,
    sentence_of,
)

MIN_FAILURES = 32
"""Fewer are too few to tell."""


def part_of(episode: Episode) -> str:
    """What failed an attempt, for people."""
    environment = f"the environment {episode.env_id}" if episode.env_id else "the environments"
    if episode.stop_reason in (NO_ENGINE, POLICY_FAULT):
        return "the engines"
    if episode.stop_reason == USER_FAULT:
        return f"the simulated users of {environment}"
    if episode.failed_part:
        return f"{episode.failed_part} of {environment}"
    return f"the code that plays {environment}" if episode.stop_reason == UNEXPECTED_ERROR else environment


@dataclass(kw_only=True, slots=True)
class Failures:
    """Attempts that failed, by what failed them."""

    by_part: Counter[str] = field(default_factory=Counter)
    newest: dict[str, str] = field(default_factory=dict)
    """By part, the sentence of the newest."""

    def note(self, part: str, sentence: str) -> None:
        """One more."""
        self.by_part[part] += 1
        self.newest[part] = sentence

    @property
    def worst(self) -> str:
        """The part that failed most often, with its count and its newest sentence."""
        part, count = self.by_part.most_common(1)[0]
        return f"{count} by {part}, the newest of them with: {self.newest[part]}"


class Breaker:
    """Follows the attempts of each environment. Used on one event loop."""

    def __init__(self, *, max_failure_share: float, max_concurrent_episodes: int) -> None:
        """Where more than that share of an environment's newest attempts failed, it does not go on.

        `max_concurrent_episodes` may all fail at once, by one fault that passes.
        """
        self._most = max_failure_share
        self._window = 2 * max(MIN_FAILURES, max_concurrent_episodes)
        self._recent: dict[str, deque[str]] = {}
        """By environment, what failed its newest attempts; empty for those that survived."""
        self._newest: dict[str, str] = {}

    def note(self, episode: Episode) -> None:
        """An attempt has ended."""
        failed = episode.outcome is Outcome.FAILED
        part = part_of(episode) if failed else ""
        self._recent.setdefault(episode.env_id, deque(maxlen=self._window)).append(part)
        if failed:
            self._newest[part] = sentence_of(episode.error or episode.stop_reason)

    def complaint(self, env_id: str, *, num_live: int) -> str | None:
        """Why not to go on, for an environment of which an attempt has ended; None: it may go on.

        Args:
            num_live: Attempts that may fail at once, by one fault that passes. More than those must have failed, and
                where none survived, all of them twice: it may be about to begin.
        """
        least = max(MIN_FAILURES, num_live)
        recent = self._recent[env_id]
        looked_at = list(itertools.islice(reversed(recent), 2 * least))
        failed = Counter(part for part in looked_at if part)
        enough = 2 * least if failed.total() == len(looked_at) else least + 1
        if failed.total() < enough or failed.total() <= self._most * len(looked_at):
            return None
        worst = Failures(by_part=failed, newest=self._newest).worst
        name = f"the environment {env_id}" if env_id else "tasks that could not be read"
        return (
            f"{failed.total()} of the newest {len(looked_at)} attempts of {name} failed, and rollout.max_failure_share "
            f"allows {self._most:.0%}: {worst}"
        )
