"""Every environment that comes with the package keeps its promises, as `polyturn env check --all` finds."""

import subprocess
import sys

import pytest

from polyturn.envs.conformance import Unavailable
from polyturn.envs.conformance.isolated import check_isolated
from polyturn.envs.registry import list_environments

BUILTIN = [info.env_id for info in list_environments() if info.env_id.startswith("polyturn/")]


def test_there_are_built_in_environments():
    assert "polyturn/TwoHopSearch-v0" in BUILTIN


@pytest.mark.parametrize("env_id", BUILTIN)
def test_a_built_in_environment_conforms(env_id):
    try:
        findings = list(check_isolated(env_id))
    except Unavailable as reason:
        pytest.skip(str(reason))
    assert not [f"{finding.check}: {finding.message}" for finding in findings if not finding.ok]


def test_the_command_checks_them_all():
    command = [sys.executable, "-m", "polyturn", "env", "check", "--all", "--check", "splits"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout
    assert all(f"{env_id}\n" in done.stdout for env_id in BUILTIN)
    assert f" of {len(list_environments())} environments pass" in done.stdout.splitlines()[-1]
