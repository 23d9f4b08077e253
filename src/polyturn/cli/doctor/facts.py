"""What there is on this machine, read and not judged."""

from __future__ import annotations

import contextlib
import importlib.util
import os
import re
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, requires, version
from pathlib import Path

import psutil
from packaging.requirements import InvalidRequirement, Requirement

from polyturn.configs.sizing.arithmetic import num_cores
from polyturn.configs.sizing.hardware import host_memory
from polyturn.packages import PACKAGES
from polyturn.tools.sandbox.docker_daemon import connect
from polyturn.tools.sandbox.embedded import Finding as Wall
from polyturn.tools.sandbox.embedded import probe
from polyturn.tools.sandbox.sandbox import SandboxUnavailable

SHARED_MEMORY = Path("/dev/shm")
CGROUPS = Path("/sys/fs/cgroup")
COMMAND_S = 20.0
GPU_FIELDS = ("name", "memory.total", "memory.used", "driver_version", "mig.mode.current")
BOUND_TO_EACH_OTHER = ("sglang", "sglang-router", "megatron-core", "ray", "transformers")
"""Packages whose wishes about each other and about torch are looked at."""
CPU_BUILD = "+cpu"
"""Ends the version of a torch without CUDA, of which SGLang's own pin has none: the lock file says which is tested."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Gpu:
    """One GPU as NVIDIA's tool tells of it."""

    name: str
    total_bytes: int
    used_bytes: int
    is_split: bool = False
    """Whether it is cut into MIG devices."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Disk:
    """Where runs are written."""

    path: Path
    free_bytes: int
    problem: str = ""
    """Why nothing can be written there."""
    clock_difference_s: float = 0.0
    """What the file system's clock is ahead of this machine's."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Docker:
    """The Docker engine."""

    version: str = ""
    runtimes: tuple[str, ...] = ()
    problem: str = ""


@dataclass(frozen=True, kw_only=True, slots=True)
class Facts:
    """Everything that findings are made of."""

    python: tuple[int, int, int]
    executable: str
    versions: Mapping[str, str | None]
    """Of `PACKAGES`, by distribution; None: missing."""
    unmet: tuple[str, ...] = ()
    """What one installed package wants of another, in sentences."""
    torch_cuda: str | None = None
    """Of the CUDA that torch was built for; None: for none, or there is no torch."""
    gpus: tuple[Gpu, ...] = ()
    driver: str | None = None
    driver_cuda: str | None = None
    """The newest CUDA that the driver runs."""
    gpu_problem: str = ""
    cores: int = 1
    memory_bytes: int = 0
    limit_bytes: int = 0
    """What this process's container may have of it."""
    available_bytes: int = 0
    shared_memory_bytes: int | None = None
    """Free in /dev/shm; None: there is none."""
    open_files: tuple[int, int] = (1024, 4096)
    """The soft and the hard limit; -1: none."""
    processes_left: int | None = None
    """How many more processes may be started, by the limits of the user and of the cgroup; None: no limit."""
    disk: Disk
    sandbox: tuple[Wall, ...] = ()
    programs: Mapping[str, str | None] = field(default_factory=dict)
    """bwrap and runsc: where they are."""
    docker: Docker = Docker()
    ray_processes: int = 0
    """Of Ray, of this user, whose parent is gone, or that `ray start` detached."""
    now: float = 0.0
    newest_file: float = 0.0
    """When the newest of Polyturn's own files was written: the clock cannot be before it."""


def read_facts(output: Path) -> Facts:
    """Look at this machine. Takes a second or two; nothing is changed but for a file in `output` that is removed."""
    memory = psutil.virtual_memory()
    gpus, driver, problem = _gpus()
    return Facts(
        python=(sys.version_info.major, sys.version_info.minor, sys.version_info.micro),
        executable=sys.executable,
        versions={package.distribution: package.installed_version() for package in PACKAGES},
        unmet=tuple(unmet_wishes(BOUND_TO_EACH_OTHER)),
        torch_cuda=_torch_cuda(),
        gpus=gpus,
        driver=driver,
        driver_cuda=_driver_cuda() if gpus else None,
        gpu_problem=problem,
        cores=num_cores(),
        memory_bytes=int(memory.total),
        limit_bytes=host_memory(),
        available_bytes=int(memory.available),
        shared_memory_bytes=shutil.disk_usage(SHARED_MEMORY).free if SHARED_MEMORY.is_dir() else None,
        open_files=resource.getrlimit(resource.RLIMIT_NOFILE),
        processes_left=_processes_left(),
        disk=read_disk(output),
        sandbox=probe(),
        programs={name: shutil.which(name) for name in ("bwrap", "runsc")},
        docker=_docker(),
        ray_processes=_ray_processes(),
        now=time.time(),
        newest_file=Path(__file__).stat().st_mtime,
    )


def unmet_wishes(distributions: Iterable[str]) -> list[str]:
    """What Polyturn and these packages want of each other's and torch's versions, and do not have."""
    looked_at = {*distributions, "torch"}
    found = []
    for owner in ("polyturn", *distributions):
        with contextlib.suppress(PackageNotFoundError):
            for text in requires(owner) or ():
                wish = _wish(text)
                if wish is None or wish.name.lower() not in looked_at:
                    continue
                with contextlib.suppress(PackageNotFoundError):
                    installed = version(wish.name)
                    if installed.endswith(CPU_BUILD):
                        continue
                    if not wish.specifier.contains(installed, prereleases=True):
                        found.append(
                            f"{owner} wants {wish.name}{wish.specifier}, and {installed} is installed"
                        )
    return found


def _wish(text: str) -> Requirement | None:
    """A requirement that holds here; of the extras only `train` is looked at."""
    try:
        wish = Requirement(text)
    except InvalidRequirement:
        return None
    holds = wish.marker is None or any(wish.marker.evaluate({"extra": extra}) for extra in ("", "train"))
    return wish if holds else None


def read_disk(output: Path) -> Disk:
    """The disk of a directory that may not be there yet."""
    there = output.absolute()
    while not there.exists():
        there = there.parent
    try:
        free = shutil.disk_usage(there).free
        before = time.time()
        with tempfile.NamedTemporaryFile(dir=there, prefix=".polyturn-doctor-") as file:
            written = os.fstat(file.fileno()).st_mtime
        after = time.time()
    except OSError as error:
        return Disk(path=there, free_bytes=0, problem=error.strerror or str(error))
    # A file system may round down to its own grain.
    difference = written - after if written > after else min(0.0, written + 2.0 - before)
    return Disk(path=there, free_bytes=free, clock_difference_s=difference)


def _gpus() -> tuple[tuple[Gpu, ...], str | None, str]:
    """The GPUs, the driver, and why none can be told."""
    text = _run("nvidia-smi", f"--query-gpu={','.join(GPU_FIELDS)}", "--format=csv,noheader,nounits")
    if text is None:
        return (
            (),
            None,
            "there is no nvidia-smi" if shutil.which("nvidia-smi") is None else "nvidia-smi fails",
        )
    gpus, driver = [], None
    for line in text.splitlines():
        cells = [cell.strip() for cell in line.split(",")]
        if len(cells) == len(GPU_FIELDS) and cells[1].isdecimal() and cells[2].isdecimal():
            total, used = (int(cell) * 1024 * 1024 for cell in cells[1:3])
            gpus.append(
                Gpu(name=cells[0], total_bytes=total, used_bytes=used, is_split=cells[4] == "Enabled")
            )
            driver = cells[3]
    return tuple(gpus), driver, "" if gpus else "nvidia-smi lists none"


def _driver_cuda() -> str | None:
    found = re.search(r"CUDA Version:\s*([0-9.]+)", _run("nvidia-smi") or "")
    return found[1] if found else None


def _run(*command: str) -> str | None:
    """What a program prints; None where it is not there or fails."""
    if shutil.which(command[0]) is None:
        return None
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=COMMAND_S, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout if done.returncode == 0 else None


def _torch_cuda() -> str | None:
    """Read from torch's own file, without importing it."""
    found = importlib.util.find_spec("torch")
    if found is None or found.origin is None:
        return None
    with contextlib.suppress(OSError):
        text = Path(found.origin).with_name("version.py").read_text(encoding="utf-8")
        cuda = re.search(r"^cuda[^=\n]*=\s*['\"]([0-9.]+)['\"]", text, flags=re.MULTILINE)
        return cuda[1] if cuda else None
    return None


def _processes_left() -> int | None:
    left = []
    soft, _ = resource.getrlimit(resource.RLIMIT_NPROC)
    if soft != resource.RLIM_INFINITY:
        mine = sum(1 for process in psutil.process_iter(["uids"]) if _is_mine(process))
        left.append(soft - mine)
    for limit, now in (
        (CGROUPS / "pids.max", "pids.current"),
        (CGROUPS / "pids" / "pids.max", "pids.current"),
    ):
        with contextlib.suppress(OSError, ValueError):
            left.append(int(limit.read_text()) - int(limit.with_name(now).read_text()))
    return min(left) if left else None


def _is_mine(process: psutil.Process) -> bool:
    uids = process.info["uids"]
    return uids is not None and uids.real == os.getuid()


def _docker() -> Docker:
    try:
        client, _ = connect(None, None)
    except SandboxUnavailable as error:
        return Docker(problem=str(error))
    with contextlib.closing(client):
        info = client.info()
    return Docker(
        version=str(info.get("ServerVersion", "")), runtimes=tuple(sorted(info.get("Runtimes") or {}))
    )


def _ray_processes() -> int:
    """Raylets and control services that no driver has as children."""
    count = 0
    for process in psutil.process_iter(["name", "ppid", "uids"]):
        name = process.info["name"] or ""
        count += name in ("raylet", "gcs_server") and process.info["ppid"] == 1 and _is_mine(process)
    return count
