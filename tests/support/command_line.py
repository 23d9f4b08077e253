"""`polyturn ARGUMENTS...`, as a process of its own or in this one."""

from __future__ import annotations

import contextlib
import io
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

Done = subprocess.CompletedProcess[str]
Run = Callable[..., Done]


def command_line(folder: Path) -> Run:
    """What runs `polyturn` with the arguments it is given, in a folder: `run("train", "recipe.yaml")`."""

    def run(*arguments: str) -> Done:
        command = [sys.executable, "-m", "polyturn", *arguments]
        return subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=120)

    return run


def in_this_process(*arguments: str) -> Done:
    """The same in the working directory, without the second that a process takes to start: for what is refused."""
    from polyturn.cli.main import app

    output, errors = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(output), contextlib.redirect_stderr(errors):
        try:
            app(args=list(arguments))
        except SystemExit as end:
            code = end.code
    assert isinstance(code, int)
    return subprocess.CompletedProcess(arguments, code, output.getvalue(), errors.getvalue())
