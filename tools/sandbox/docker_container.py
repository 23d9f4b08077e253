"""What a container of the Docker backend is allowed: its options, from the limits of a sandbox."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from polyturn.tools.sandbox.docker_seccomp import seccomp_profile
from polyturn.tools.sandbox.types import MIB, Limits

WORK = "/work"
GVISOR = "runsc"
"""The usual name of gVisor's runtime."""
SCRATCH_BYTES = 16 * MIB
"""Of /tmp, and as much of /dev/shm."""
RUNNER_BYTES = 48 * MIB
PROCESSES_OF_THE_RUNNER = 4
"""The runner and a persistent interpreter, and one that is about to go of each."""

_SENTRY_PROCESSES, _SENTRY_BYTES = 256, 192 * MIB
"""gVisor's kernel is a program inside the container, with threads and memory of its own."""

_USER_IDS = range(1 << 20, 1 << 30)
"""A container gets a user id of its own: the kernel counts processes, inotify watches, pipes and keys by user, also
across containers. (Where the daemon maps users, only low ids exist.)"""
_MAPPED_USER_IDS = range(2000, 60000)


@dataclass(frozen=True, kw_only=True, slots=True)
class DockerLayers:
    """What confines a container; each can be left out by the tests, which show so that it is needed."""

    no_network: bool = True
    read_only: bool = True
    drop_capabilities: bool = True
    no_new_privileges: bool = True
    seccomp: bool = True
    pids: bool = True
    memory: bool = True
    own_user: bool = True
    sized_tmpfs: bool = True


def memory_of(limits: Limits, runtime: str | None = None) -> int:
    """Bytes of the container: what the code may have, what its files may take (they lie in memory), and the runner."""
    own = RUNNER_BYTES + (_SENTRY_BYTES if runtime == GVISOR else 0)
    return limits.memory_bytes + limits.disk_bytes + 2 * SCRATCH_BYTES + own


def user_id(*, mapped: bool) -> int:
    """The user (and group) of a new container."""
    return random.SystemRandom().choice(_MAPPED_USER_IDS if mapped else _USER_IDS)


def container_options(
    limits: Limits,
    *,
    layers: DockerLayers,
    runtime: str | None,
    cpus: float,
    labels: dict[str, str],
    uid: int,
    hidden: Sequence[str] = (),
) -> dict[str, Any]:
    """The keyword arguments of `client.containers.create`, beside image and command. `hidden` folders are empty."""
    from docker.types import LogConfig, Ulimit

    options: dict[str, Any] = {
        "stdin_open": True,
        "working_dir": WORK,
        "hostname": "sandbox",
        "labels": labels,
        "log_config": LogConfig(type="none"),
        "healthcheck": {"test": ["NONE"]},
        "nano_cpus": int(cpus * 1e9),
        "oom_score_adj": 500,
        "shm_size": SCRATCH_BYTES,
        "environment": {
            "HOME": WORK,
            "USER": "sandbox",
            "LANG": "C.UTF-8",
            "PYTHONDONTWRITEBYTECODE": "1",
            "PYTHONHASHSEED": "0",
            "MALLOC_ARENA_MAX": "2",
            "OPENBLAS_NUM_THREADS": "1",
            "OMP_NUM_THREADS": "1",
        },
        "ulimits": [
            Ulimit(name="core", soft=0, hard=0),
            Ulimit(name="memlock", soft=0, hard=0),
            Ulimit(name="nofile", soft=limits.num_open_files + 64, hard=limits.num_open_files + 64),
        ],
        "tmpfs": {
            **_tmpfs(limits, sized=layers.sized_tmpfs),
            **dict.fromkeys(hidden, "ro,size=4k,mode=0555"),
        },
        "read_only": layers.read_only,
    }
    security = []
    if layers.no_new_privileges:
        security.append("no-new-privileges:true")
    # gVisor is a kernel of its own, which takes no profile.
    if runtime != GVISOR:
        security.append(f"seccomp={seccomp_profile() if layers.seccomp else 'unconfined'}")
    options["security_opt"] = security
    if layers.no_network:
        options |= {"network_mode": "none", "network_disabled": True}
    else:
        options["network_mode"] = "host"
    if layers.drop_capabilities:
        options["cap_drop"] = ["ALL"]
    if layers.pids:
        own = PROCESSES_OF_THE_RUNNER + (_SENTRY_PROCESSES if runtime == GVISOR else 0)
        options["pids_limit"] = limits.num_processes + own
    if layers.memory:
        options |= dict.fromkeys(("mem_limit", "memswap_limit"), memory_of(limits, runtime))
    if layers.own_user:
        options["user"] = f"{uid}:{uid}"
    if runtime is not None:
        options["runtime"] = runtime
    return options


def _tmpfs(limits: Limits, *, sized: bool) -> dict[str, str]:
    """The folders that can be written. Root owns them (1777), so that code cannot lock the runner out of its own."""
    common = "rw,nosuid,nodev,mode=1777"
    if not sized:
        return dict.fromkeys((WORK, "/tmp", "/dev/shm"), f"{common},exec")
    scratch = f"{common},noexec,size={SCRATCH_BYTES},nr_inodes=1024"
    return {
        WORK: f"{common},exec,size={limits.disk_bytes},nr_inodes={limits.num_files + 1}",  # itself is one
        "/tmp": scratch,
        "/dev/shm": scratch,
    }
