"""Groups of episodes and the identities of what is in them."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

from polyturn.agents.episode import Episode
from polyturn.rollout.prompts import Prompt


@dataclass(frozen=True, kw_only=True, slots=True)
class Group:
    """The episodes of one prompt, by identity. Episodes that failed for good are counted, not contained."""

    group_id: str
    prompt: Prompt
    episodes: tuple[Episode, ...]
    """In the order of their sample indices."""
    num_expected: int
    num_dropped: int
    """Episodes that still failed after all retries."""
    num_retries: int
    """Failed attempts that were played again."""

    @property
    def num_missing(self) -> int:
        """Episodes that were not played because the collection was stopped."""
        return self.num_expected - len(self.episodes) - self.num_dropped

    @property
    def is_usable(self) -> bool:
        """Whether a baseline can be taken from the group: two survivors, where so many were asked for."""
        return len(self.episodes) >= min(2, self.num_expected)


def episode_seed(*, run_seed: int, group_id: str, sample: int, attempt: int) -> int:
    """The seed of one attempt: 48 bits of SHA-256 over its identity, so independent of order and timing."""
    identity = f"{run_seed}/{group_id}/{sample}/{attempt}".encode()
    return int.from_bytes(hashlib.sha256(identity).digest()[:6])


def episode_id(group_id: str, sample: int, attempt: int) -> str:
    """The id of one attempt; `parse_episode_id` reads it."""
    return f"{group_id}.{sample}.{attempt}"


def parse_episode_id(identity: str) -> tuple[str, int, int]:
    """Group id, sample index and attempt of an `episode_id`."""
    group_id, sample, attempt = identity.rsplit(".", 2)
    return group_id, int(sample), int(attempt)
