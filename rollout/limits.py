"""How much happens at once (episodes, requests, environment steps, open files), and deadlines for what waits."""

from __future__ import annotations

import gc
import resource
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from polyturn.configs.schema.deadlines import hook_timeout_s, stall_timeout_s
from polyturn.configs.schema.rollout import RolloutConfig
from polyturn.configs.schema.run import RunConfig


@dataclass(frozen=True, kw_only=True, slots=True)
class RolloutLimits:
    """How much may happen at once, and how often a failed episode is played again."""

    max_concurrent_requests: int = 256
    max_concurrent_episodes: int = 256
    max_concurrent_tools: int = 32
    """Resets and steps of environments at once."""
    max_retries: int = 2
    retry_delay_s: float = 0.5
    """Wait before the first retry; doubles with each."""
    stall_timeout_s: float | None = None
    """Give up when no attempt has ended for so long."""
    max_failure_share: float = 0.5
    """Give up when a larger share of the attempts of one collection failed, once there are enough to tell."""

    max_lost_threads: int = 32
    """Give up when more threads than this are held by code of environments that was given up and never returned."""
    queue_timeout_s: float | None = None
    """An attempt fails that waits for a slot for so long."""
    environment_timeout_s: float | None = 600.0
    """For making an environment, reading a task, and group rewards; then the attempt fails."""

    @classmethod
    def from_config(cls, config: RunConfig) -> RolloutLimits:
        """The limits of a run. `stall_timeout_s` is more than an episode may wait for anything before it fails."""
        rollout = config.rollout
        return cls(
            max_concurrent_requests=rollout.max_concurrent_requests,
            max_concurrent_episodes=rollout.max_concurrent_episodes,
            max_concurrent_tools=rollout.max_concurrent_tools,
            max_retries=rollout.max_retries,
            max_failure_share=rollout.max_failure_share,
            max_lost_threads=rollout.max_lost_threads,
            queue_timeout_s=rollout.queue_timeout_s,
            environment_timeout_s=hook_timeout_s(config),
            stall_timeout_s=stall_timeout_s(config),
        )


@contextmanager
def spare_what_stays() -> Iterator[None]:
    """Let Python's garbage collector pass over all objects that there are now: modules, classes, compiled templates.

    Otherwise it looks at a million of them again and again while episodes are played, for more than a second each time
    in which nothing else happens. It looks less often, too: live episodes are millions of objects that are no garbage,
    and what ends does so without it. Entered once, when all is loaded and before anything is played; on the way out all
    is as before, so that the process ends as any other does.
    """
    thresholds = gc.get_threshold()
    gc.collect()
    gc.freeze()
    gc.set_threshold(*GC_THRESHOLDS)
    try:
        yield
    finally:
        gc.set_threshold(*thresholds)
        gc.unfreeze()


GC_THRESHOLDS = (10_000, 20, 50)
"""Objects made beyond those that ended, for a look at the newest; looks before one at those that were there then; and
before one at all. Python's own are 700, 10 and 10."""


def share_of(limit: int, num_workers: int) -> int:
    """What each of so many processes may have of a limit, at least 1."""
    return max(1, -(-limit // num_workers))


OTHERS = 128
"""Files of the process beside its requests: logs, journals, pipes of actors, shared libraries."""
PER_EPISODE = 2
"""What an environment may hold: a connection and a sandbox's pipe."""


def allow_open_files(config: RolloutConfig) -> None:
    """Raise the soft limit to what requests and episodes at once need, as far as the hard limit lets it.

    Raises:
        ValueError: the hard limit is below what the requests alone need.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    least = config.max_concurrent_requests + OTHERS
    if hard != resource.RLIM_INFINITY and hard < least:
        raise ValueError(
            f"rollout.max_concurrent_requests={config.max_concurrent_requests} needs as many connections, and this "
            f"process may have {hard} files open; raise that (ulimit -Hn), or ask for {max(1, hard - OTHERS)} at most"
        )
    wanted = least + PER_EPISODE * config.max_concurrent_episodes
    if hard != resource.RLIM_INFINITY:
        wanted = min(wanted, hard)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
