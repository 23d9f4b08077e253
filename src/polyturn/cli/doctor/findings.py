"""What facts about a machine mean for who wants to train on it: one line each, with the next step."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from enum import StrEnum

from polyturn.cli.doctor.facts import Facts
from polyturn.configs.sizing.memory import human_bytes
from polyturn.packages import PACKAGES
from polyturn.tools.sandbox.embedded import summary

GIB = 1024**3
LEAST_MEMORY = 4 * GIB
"""What the smallest run takes: an engine, a rank, Ray."""
LEAST_SHARED_MEMORY = 1 * GIB
"""Docker gives 64 MB unless it is told; NCCL, torch and Ray's object store want more."""
LEAST_DISK = 10 * GIB
LEAST_FILES = 4096
LEAST_PROCESSES = 1024
LEAST_GPU_SHARE = 0.9
"""Of a GPU's memory that is free."""
CLOCK_S = 5.0
PYTHON = (3, 11)


class Status(StrEnum):
    OK = "ok"
    WARN = "warn"
    FAIL = "fail"
    """What is wanted cannot run."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Finding:
    """One thing that was looked at."""

    name: str
    status: Status
    what: str
    next_step: str = ""
    """What to do about it; empty where all is well."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Wants:
    """What the machine is judged by."""

    gpus: bool = False
    """Whether a recipe wants them."""
    trains: bool = True


Look = Callable[[Facts, Wants], Iterator[Finding]]


def findings(facts: Facts, wants: Wants) -> list[Finding]:
    """Every look at the machine, in order."""
    return [finding for look in LOOKS for finding in look(facts, wants)]


def _ok(name: str, what: str) -> Finding:
    return Finding(name=name, status=Status.OK, what=what)


def _warn(name: str, what: str, next_step: str) -> Finding:
    return Finding(name=name, status=Status.WARN, what=what, next_step=next_step)


def _fail(name: str, what: str, next_step: str) -> Finding:
    return Finding(name=name, status=Status.FAIL, what=what, next_step=next_step)


def python(facts: Facts, wants: Wants) -> Iterator[Finding]:  # noqa: ARG001
    shown = ".".join(map(str, facts.python))
    if facts.python[:2] != PYTHON:
        wanted = ".".join(map(str, PYTHON))
        yield _fail(
            "python",
            f"{shown} ({facts.executable}); Polyturn is for {wanted}",
            f"make an environment of it: uv venv --python {wanted}, or python{wanted} -m venv",
        )
    else:
        yield _ok("python", f"{shown} ({facts.executable})")


def packages(facts: Facts, wants: Wants) -> Iterator[Finding]:
    installed = [f"{name} {version}" for name, version in facts.versions.items() if version is not None]
    yield _ok("packages", ", ".join(installed) or "none")
    for package in PACKAGES:
        name = f"package {package.distribution}"
        if facts.versions.get(package.distribution) is not None:
            continue
        if package.needed_to_train and wants.trains:
            yield _fail(name, f"missing, for {package.used_for}", package.install)
        else:
            yield _warn(name, f"missing, for {package.used_for}", package.install)
    for sentence in facts.unmet:
        yield _warn(
            "versions",
            sentence,
            "install what was tested together: pip install 'polyturn[train]', or `make setup`",
        )
    if not facts.unmet:
        yield _ok("versions", "fit together")


def gpu(facts: Facts, wants: Wants) -> Iterator[Finding]:
    if not facts.gpus:
        if wants.gpus:
            yield _fail(
                "gpu",
                f"none: {facts.gpu_problem}",
                "install NVIDIA's driver (in a container: start it with --gpus all), or set engines.device=cpu "
                "trainer.device=cpu",
            )
        else:
            yield _ok("gpu", f"none: {facts.gpu_problem}; runs go on the CPU")
        return
    for number, one in enumerate(facts.gpus):
        what = f"{one.name}, {human_bytes(one.total_bytes)}, {human_bytes(one.used_bytes)} in use"
        if one.is_split:
            yield _warn(
                f"gpu {number}", f"{what}, split into MIG devices", "NCCL takes no two ranks on one GPU"
            )
        elif one.used_bytes > (1 - LEAST_GPU_SHARE) * one.total_bytes:
            yield _warn(f"gpu {number}", what, "`nvidia-smi` says whose; end it, or set CUDA_VISIBLE_DEVICES")
        else:
            yield _ok(f"gpu {number}", what)
    yield from _driver(facts, wants)


def _driver(facts: Facts, wants: Wants) -> Iterator[Finding]:
    shown = f"driver {facts.driver}, up to CUDA {facts.driver_cuda}"
    judge = _fail if wants.gpus else _warn
    if facts.versions.get("torch") is None:
        yield _ok("driver", shown)
    elif facts.torch_cuda is None:
        yield judge(
            "driver",
            f"{shown}; torch is built for no GPU",
            "pip install torch from the index of its CUDA builds",
        )
    elif facts.driver_cuda is not None and _number(facts.torch_cuda)[:1] > _number(facts.driver_cuda)[:1]:
        yield judge(
            "driver",
            f"{shown}; torch is built for CUDA {facts.torch_cuda}",
            f"bring the driver up to CUDA {facts.torch_cuda}, or install a torch for {facts.driver_cuda}",
        )
    else:
        # Within a major release an older driver runs what was built for a newer minor one.
        yield _ok("driver", f"{shown}; torch is built for CUDA {facts.torch_cuda}")


def _number(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in text.split(".") if part.isdecimal())


def memory(facts: Facts, wants: Wants) -> Iterator[Finding]:  # noqa: ARG001
    what = f"{human_bytes(facts.memory_bytes)}, {human_bytes(facts.available_bytes)} available, {facts.cores} cores"
    room = min(facts.available_bytes, facts.limit_bytes)
    if facts.limit_bytes < facts.memory_bytes:
        what += f"; this container may have {human_bytes(facts.limit_bytes)}"
    if room < LEAST_MEMORY:
        yield _warn(
            "memory",
            what,
            f"the smallest run takes about {human_bytes(LEAST_MEMORY)}: end what else runs, or raise the limit "
            "(docker run --memory)",
        )
    else:
        yield _ok("memory", what)


def shared_memory(facts: Facts, wants: Wants) -> Iterator[Finding]:  # noqa: ARG001
    free = facts.shared_memory_bytes
    if free is None:
        yield _fail("/dev/shm", "there is none", "mount it: mount -t tmpfs tmpfs /dev/shm")
    elif free < LEAST_SHARED_MEMORY:
        yield _warn(
            "/dev/shm",
            f"{human_bytes(free)} free",
            "start the container with --shm-size=8g or --ipc=host, or mount -o remount,size=8G /dev/shm; what a dead "
            "process left there can be deleted",
        )
    else:
        yield _ok("/dev/shm", f"{human_bytes(free)} free")


def limits(facts: Facts, wants: Wants) -> Iterator[Finding]:  # noqa: ARG001
    soft, hard = facts.open_files
    shown = "no limit" if hard < 0 else f"{soft:,}, and up to {hard:,}"
    if 0 <= hard < LEAST_FILES:
        yield _warn(
            "open files",
            shown,
            f"each request and episode takes some: ulimit -Hn {LEAST_FILES * 16} as root, or nofile in "
            "/etc/security/limits.conf (docker run --ulimit nofile=65536)",
        )
    else:
        yield _ok("open files", shown)
    left = facts.processes_left
    if left is not None and left < LEAST_PROCESSES:
        yield _warn(
            "processes",
            f"{left:,} more may be started",
            "raise ulimit -u, or the limit of the cgroup (docker run --pids-limit=-1): threads count",
        )
    else:
        yield _ok("processes", "no limit that matters" if left is None else f"{left:,} more may be started")


def disk(facts: Facts, wants: Wants) -> Iterator[Finding]:  # noqa: ARG001
    found = facts.disk
    if found.problem:
        yield _fail(
            "disk", f"{found.path}: {found.problem}", "set output_dir to a directory that can be written to"
        )
    elif found.free_bytes < LEAST_DISK:
        yield _warn(
            "disk",
            f"{human_bytes(found.free_bytes)} free at {found.path}",
            "make room, or set output_dir elsewhere: checkpoints hold the weights and twice as much of the optimizer",
        )
    else:
        yield _ok("disk", f"{human_bytes(found.free_bytes)} free at {found.path}")


def sandbox(facts: Facts, wants: Wants) -> Iterator[Finding]:  # noqa: ARG001
    missing = [wall for wall in facts.sandbox if wall.needed and not wall.works]
    if missing:
        yield _warn(
            "sandbox",
            summary(facts.sandbox),
            "environments that run code need it or Docker: allow user namespaces (sysctl "
            "kernel.unprivileged_userns_clone=1, kernel.apparmor_restrict_unprivileged_userns=0)",
        )
    else:
        yield _ok("sandbox", summary(facts.sandbox))
    if facts.programs.get("bwrap") is None:
        yield _warn("bwrap", "not installed: agents' programs have no walls", "apt-get install bubblewrap")
    else:
        yield _ok("bwrap", str(facts.programs["bwrap"]))


def docker(facts: Facts, wants: Wants) -> Iterator[Finding]:  # noqa: ARG001
    found = facts.docker
    if found.problem:
        yield _warn(
            "docker",
            found.problem,
            "only for tasks with images of their own (docs/docker_sandbox.md): start dockerd, join the group docker, "
            "or set DOCKER_HOST",
        )
        return
    gvisor = "runsc" in found.runtimes
    what = f"engine {found.version}, runtimes {', '.join(found.runtimes)}"
    if gvisor or facts.programs.get("runsc") is None:
        yield _ok("docker", what)
    else:
        yield _warn("docker", f"{what}; it does not know runsc", "runsc install, and restart dockerd")


def ray(facts: Facts, wants: Wants) -> Iterator[Finding]:  # noqa: ARG001
    if facts.ray_processes:
        yield _warn(
            "ray",
            f"{facts.ray_processes} processes of Ray that no run has started",
            "a cluster of `ray start` is meant to stay (cluster.address=auto joins it); what is left over ends by "
            "`ray stop`, with every other Ray of yours",
        )
    else:
        yield _ok("ray", "nothing left over")


def clock(facts: Facts, wants: Wants) -> Iterator[Finding]:  # noqa: ARG001
    if facts.now < facts.newest_file - CLOCK_S:
        yield _warn(
            "clock", "it is before Polyturn's own files were written", "set it: timedatectl set-ntp true"
        )
    elif abs(facts.disk.clock_difference_s) > CLOCK_S:
        difference = facts.disk.clock_difference_s
        how = "ahead" if difference > 0 else "behind"
        yield _warn(
            "clock",
            f"the file system at {facts.disk.path} is {abs(difference):.0f} s {how}",
            "keep both machines by NTP: timedatectl set-ntp true",
        )
    else:
        yield _ok("clock", "agrees with the file system's")


LOOKS: tuple[Look, ...] = (
    python,
    packages,
    gpu,
    memory,
    shared_memory,
    limits,
    disk,
    sandbox,
    docker,
    ray,
    clock,
)
