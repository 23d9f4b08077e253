"""Nothing hangs on the wall clock, which jumps: what waits or measures reads a monotonic one."""

from __future__ import annotations

import ast
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
FOLDERS = ("configs", "tools", "envs", "agents", "rollout", "trainer", "viewer", "src/polyturn/cli")
CLOCKS = {
    "time": {"time", "time_ns", "localtime", "gmtime", "ctime", "asctime", "strftime"},
    "datetime": {"now", "utcnow", "today"},
    "date": {"today"},
}
READERS = {
    "agents/chat_template.py": "a template is told the day, which a run pins",
    "agents/sessions/server.py": "an answer of OpenAI's says when it was made",
    "agents/sessions/socket_folders.py": "the age of a folder that somebody else made",
    "rollout/engines/engine_log.py": "an event in the log of engines says when it was",
    "tools/retries.py": "a server names the date from which it may be asked again",
    "tools/sandbox/docker_container.py": "Docker's events are asked for by its clock",
    "rollout/evaluation/export/inspect_log.py": "inspect's format says when something was",
    "rollout/evaluation/conduct.py": "the plan of an evaluation says when it was made",
    "rollout/evaluation/control.py": "the log of what was changed in an evaluation says when",
    "src/polyturn/cli/doctor/facts.py": "whether the clock runs as the monotonic one does, and is in a likely year",
    "trainer/sinks/tensorboard.py": "TensorBoard's events carry the time, which it shows",
    "trainer/run/resume.py": "the day that a run pins for its template is that of its beginning",
    "viewer/catalogue.py": "how long ago a run's files were written",
    "trainer/run/directory.py": "the name of a run directory that was given none",
}
"""Who reads it, and what for: to show it, or because another program speaks of it. No wait ends by it."""


def wall_clock_reads(path: Path) -> list[str]:
    """The calls in a module that read the wall clock."""
    found = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module == "time":
            found += [f"from time import {name.name}" for name in node.names if name.name in CLOCKS["time"]]
        if isinstance(node, ast.Attribute):
            owner = ast.unparse(node.value).rpartition(".")[2]
            if node.attr in CLOCKS.get(owner, ()):
                found.append(ast.unparse(node))
    return found


def test_only_what_shows_it_reads_the_wall_clock() -> None:
    found = {
        str(path.relative_to(ROOT)): reads
        for folder in FOLDERS
        for path in sorted((ROOT / folder).rglob("*.py"))
        if (reads := wall_clock_reads(path))
    }
    assert found.keys() == READERS.keys(), found
