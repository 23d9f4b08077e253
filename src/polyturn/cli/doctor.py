"""`polyturn doctor`: what is installed and what is missing."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
import sys

import psutil
import typer

from polyturn import __version__
from polyturn.cli.outcome import table
from polyturn.configs.models import builtin_models
from polyturn.configs.sizing.arithmetic import num_cores
from polyturn.configs.sizing.memory import human_bytes
from polyturn.packages import PACKAGES
from polyturn.tools.sandbox.embedded import probe, summary


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
