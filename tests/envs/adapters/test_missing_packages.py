"""Without their packages, the adapters say what to install, and harm nobody."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from polyturn.envs.adapters.peer import MissingPackage, require, require_installed

PROGRAM = """
import json, sys

class Without:
    def __init__(self, finder): self.finder = finder
    def __getattr__(self, name): return getattr(self.finder, name)
    def find_spec(self, name, path=None, target=None):
        gone = ("reasoning_gym", "gem", "skyrl_gym", "openenv", "verifiers", "mcp")
        return None if name.partition(".")[0] in gone else self.finder.find_spec(name, path, target)

sys.meta_path[:] = [Without(finder) for finder in sys.meta_path]
from polyturn.envs.conformance.runner import is_unavailable
from polyturn.envs.registry import list_environments, make
said = {}
for name in ("ReasoningGym", "GEM", "SkyRLGym", "OpenEnv", "Verifiers"):
    assert any(info.env_id == f"polyturn/{name}-v0" for info in list_environments())
    try:
        make(f"polyturn/{name}-v0")
    except ValueError as error:
        assert is_unavailable(error)
        said[name] = str(error)
from polyturn.tools.mcp import McpTools, StdioServer
try:
    McpTools(StdioServer(command=["true"]))
except ImportError as error:
    said["mcp"] = str(error)
print(json.dumps(said))
"""


def test_what_is_missing_is_named_with_the_command_that_installs_it() -> None:
    done = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, check=True)
    said = json.loads(done.stdout)
    extras = {
        "ReasoningGym": "reasoning-gym",
        "GEM": "gem",
        "SkyRLGym": "skyrl-gym",
        "OpenEnv": "openenv",
        "Verifiers": "verifiers",
        "mcp": "mcp",
    }
    assert said.keys() == extras.keys()
    for name, extra in extras.items():
        assert said[name].endswith(f"pip install 'polyturn[{extra}]'"), said[name]


def test_a_missing_package_is_an_import_error_and_an_error_of_the_user() -> None:
    for function in (require, require_installed):
        with pytest.raises(
            MissingPackage, match=r"'no_such_package' is not installed; .* 'polyturn\[extra\]'"
        ) as caught:
            function("no_such_package", extra="extra")
        assert isinstance(caught.value, ImportError) and isinstance(caught.value, ValueError)
    assert require("json", extra="extra") is json
