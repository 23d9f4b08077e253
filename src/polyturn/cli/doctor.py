"""`polyturn doctor`: what Polyturn needs beside its own code, what of it is here, and how to get the rest."""

from __future__ import annotations

import importlib.util
import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version

import psutil
import typer

from polyturn import __version__
from polyturn.cli.outcome import table
from polyturn.configs.errors import ConfigError
from polyturn.configs.models import builtin_models
from polyturn.configs.sizing.arithmetic import num_cores
from polyturn.configs.sizing.memory import human_bytes
from polyturn.tools.sandbox.embedded import probe, summary

TRAIN_EXTRA = "pip install 'polyturn[train]'  (without a GPU: pip install --no-deps -r requirements/cpu.lock)"


@dataclass(frozen=True, kw_only=True, slots=True)
class Package:
    """A package that some command needs."""

    distribution: str
    module: str
    used_for: str
    install: str
    needed_to_train: bool = True

    def installed_version(self) -> str | None:
        """Its version; None where it is missing. Nothing is imported."""
        try:
            found = version(self.distribution)
        except PackageNotFoundError:
            return None
        return found if importlib.util.find_spec(self.module) is not None else None


def _base(distribution: str, used_for: str, module: str | None = None) -> Package:
    return Package(
        distribution=distribution,
        module=module or distribution,
        used_for=used_for,
        install="pip install polyturn",
    )


def _train(distribution: str, used_for: str, module: str | None = None) -> Package:
    return Package(
        distribution=distribution,
        module=module or distribution.replace("-", "_"),
        used_for=used_for,
        install=TRAIN_EXTRA,
    )


PACKAGES = (
    _base("gymnasium", "environments"),
    _base("pydantic", "configs"),
    _base("tantivy", "the search tool's index"),
    _base("pyarrow", "trajectories"),
    _train("torch", "training and serving"),
    _train("transformers", "tokenizers and chat templates"),
    _train("sglang", "rollout engines"),
    _train("sglang-router", "the router in front of the engines"),
    _train("megatron-core", "the trainer", "megatron"),
    _train("ray", "the processes of a run"),
    _train("tensorboardX", "TensorBoard events"),
    Package(
        distribution="uvicorn",
        module="uvicorn",
        used_for="polyturn serve search",
        install="pip install 'polyturn[search]'",
        needed_to_train=False,
    ),
    Package(
        distribution="faiss-cpu",
        module="faiss",
        used_for="dense search",
        install="pip install 'polyturn[search]'",
        needed_to_train=False,
    ),
    Package(
        distribution="matplotlib",
        module="matplotlib",
        used_for="plots of the benchmarks",
        install="pip install 'polyturn[plot]'",
        needed_to_train=False,
    ),
)
SERVING = ("torch", "transformers", "sglang", "sglang-router")
"""What an evaluation needs, beside the base."""


def require(distributions: Iterable[str] | None = None) -> None:
    """Raise ConfigError naming what is missing of these packages (None: of all that training needs)."""
    wanted = [
        p
        for p in PACKAGES
        if p.needed_to_train and (distributions is None or p.distribution in distributions)
    ]
    missing = [package for package in wanted if package.installed_version() is None]
    if missing:
        names = ", ".join(package.distribution for package in missing)
        raise ConfigError(f"not installed: {names}; install with: {missing[-1].install}")


def doctor() -> None:
    """Say what is installed and what is missing.

    Exits with 1 when something that training needs is missing.

    \b
    Example: polyturn doctor
    """
    typer.echo(f"polyturn {__version__}, Python {platform.python_version()} ({sys.executable})\n")
    rows = []
    missing = []
    for package in PACKAGES:
        found = package.installed_version()
        if found is None:
            missing.append(package)
        rows.append((package.distribution, found or "missing", package.used_for))
    typer.echo(table(rows))
    memory = psutil.virtual_memory()
    machine = [
        ("cores", str(num_cores())),
        ("memory", f"{human_bytes(memory.total)}, {human_bytes(memory.available)} available"),
        ("free disk", human_bytes(shutil.disk_usage(os.getcwd()).free)),
        ("GPUs", _gpus()),
        ("shipped models", ", ".join(builtin_models()) or "none"),
        ("sandbox", summary(probe())),
    ]
    typer.echo("\n" + table(machine))
    for install in dict.fromkeys(package.install for package in missing):
        names = ", ".join(package.distribution for package in missing if package.install == install)
        typer.echo(f"\nmissing: {names}\n  {install}")
    if any(package.needed_to_train for package in missing):
        raise typer.Exit(1)
    typer.echo("\nready to train")


def _gpus() -> str:
    """The GPUs that NVIDIA's own tool lists."""
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return "none (no nvidia-smi)"
    command = [tool, "--query-gpu=name,memory.total", "--format=csv,noheader"]
    listed = subprocess.run(command, capture_output=True, text=True, timeout=30, check=False)
    return "; ".join(listed.stdout.split("\n")).strip("; ") if listed.returncode == 0 else "none"
