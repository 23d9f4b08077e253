"""How many files and connections this process may have open, made as many as a run needs."""

from __future__ import annotations

import resource

from polyturn.configs.schema.run import RolloutConfig

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
