"""Switches for the walls around a sandbox."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True, slots=True)
class Layers:
    """Which walls stand. For tests alone, which show that without a wall some snippet gets through.

    Nothing that a user writes leads here: only the constructor of `EmbeddedBackend` takes it.
    """

    user_namespace: bool = True
    """A user namespace below each sandbox's user. Without it root makes the other namespaces."""
    uid_drop: bool = True
    """Where the owner is root: a user of its own for each sandbox, taken before anything else."""
    network_namespace: bool = True
    fresh_tmpfs: bool = True
    """The work folder, /tmp and /dev/shm in memory, with bounds, for each sandbox. Without it all share them."""
    drop_capabilities: bool = True
    cgroup: bool = True
    """A memory and a pids cgroup for each sandbox, where they can be written."""
    rlimits: bool = True
    landlock: bool = True
    seccomp: bool = True
    kill_all: bool = True
    """Killing, after each execution, all that it left behind."""
    oom_score: bool = True
    """Code is what the kernel kills first when memory runs out."""
