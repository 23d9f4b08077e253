"""Small tasks in Harbor's form, written by tests."""

from __future__ import annotations

from pathlib import Path

from tests.support.task_images import BASE

PAYS = "#!/bin/bash\necho 1 > /logs/verifier/reward.txt\n"


def write_task(
    folder: Path,
    *,
    test: str = PAYS,
    toml: str = "",
    dockerfile: str | None = None,
    solution: str | None = "#!/bin/bash\ntrue\n",
    environment: str = "",
) -> Path:
    """A task whose image is the base, or what a Dockerfile makes of it; `environment` are lines of that section."""
    (folder / "tests").mkdir(parents=True)
    (folder / "environment").mkdir()
    (folder / "instruction.md").write_text("Do it.\n")
    if dockerfile is None:
        environment = f'docker_image = "{BASE}"\n{environment}'
    else:
        (folder / "environment" / "Dockerfile").write_text(dockerfile)
    (folder / "task.toml").write_text(f"{toml}\n[environment]\n{environment}\n")
    (folder / "tests" / "test.sh").write_text(test)
    if solution is not None:
        (folder / "solution").mkdir()
        (folder / "solution" / "solve.sh").write_text(solution)
    return folder
