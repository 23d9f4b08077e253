"""`polyturn env check --all`: every environment that comes with the package keeps its promises."""

from __future__ import annotations

import re
import subprocess
import sys

import pytest

from polyturn.envs.registry import list_environments

pytestmark = pytest.mark.timeout(900)  # the first of them waits for the command, which checks all

BUILTIN = [info.env_id for info in list_environments() if info.env_id.startswith("polyturn/")]


@pytest.fixture(scope="module")
def report() -> dict[str, str]:
    """What the command printed of each environment."""
    command = [
        sys.executable,
        "-m",
        "polyturn",
        "env",
        "check",
        "--all",
        "--num-tasks",
        "2",
        "--budget-s",
        "0.25",
    ]
    done = subprocess.run(command, capture_output=True, text=True)
    *blocks, last = done.stdout.strip().split("\n\n")
    assert re.fullmatch(r"\d+ of \d+ environments pass.*", last), done
    assert (done.returncode == 0) == ("FAIL" not in done.stdout)
    return dict(block.split("\n", 1) for block in blocks)


@pytest.mark.parametrize("env_id", BUILTIN)
def test_a_built_in_environment_conforms(env_id: str, report: dict[str, str]) -> None:
    found = report[env_id]
    if "not checked here" in found:
        pytest.skip(found.strip())
    assert re.search(r"all \d+ checks passed", found), found


def test_there_are_built_in_environments() -> None:
    assert "polyturn/TwoHopSearch-v0" in BUILTIN
