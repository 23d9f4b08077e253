"""`polyturn ARGUMENTS...` as a process of its own."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

Run = Callable[..., "subprocess.CompletedProcess[str]"]


def command_line(folder: Path) -> Run:
    """What runs `polyturn` with the arguments it is given, in a folder: `run("train", "recipe.yaml", stdin="")`."""

    def run(*arguments: str, stdin: str = "") -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "polyturn", *arguments]
        return subprocess.run(command, cwd=folder, input=stdin, capture_output=True, text=True, timeout=120)

    return run
