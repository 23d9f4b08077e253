"""The environment that docs/environments.md shows is the one that `polyturn env new` writes, and works as it stands."""

import re
import warnings
from pathlib import Path

import gymnasium
import pytest
from gymnasium.utils.env_checker import check_env

import polyturn
from polyturn.cli.env import write_package
from polyturn.envs import registry
from polyturn.envs.conformance.runner import CHECKS
from polyturn.envs.messages import AssistantMessage

DOCS = Path(__file__).parents[2] / "docs"
ENV_ID = "my_gym/Multiply-v0"


@pytest.fixture(scope="module")
def source():
    text = (DOCS / "environments.md").read_text(encoding="utf-8")
    block = re.search(r"```python\n# my_gym/environment\.py\n(.*?)```", text, re.DOTALL)
    assert block is not None
    return block[1]


@pytest.fixture
def registered(source):
    names = {"__name__": "documented_example"}
    exec(compile(source, "docs/environments.md", "exec"), names)
    names["register_environments"]()
    yield
    del gymnasium.registry[ENV_ID]
    del registry._registered[ENV_ID]


def test_it_is_what_the_command_writes_and_is_short(source, tmp_path):
    package = write_package("my-gym", tmp_path / "my-gym")
    assert source == (package / "my_gym" / "environment.py").read_text(encoding="utf-8")
    assert len(source.splitlines()) < 60
    text = (DOCS / "environments.md").read_text(encoding="utf-8")
    toml = re.search(r"```toml\n# pyproject\.toml\n(.*?)```", text, re.DOTALL)[1]
    assert toml in (package / "pyproject.toml").read_text(encoding="utf-8")


def test_it_runs(registered):
    env = polyturn.make(ENV_ID)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        check_env(env)
    env.reset(options={"task": "product-3"})
    assert env.step(AssistantMessage(content=env.task.label))[1:3] == (1.0, True)


def test_it_conforms(registered, polyturn_check_env):
    polyturn_check_env(ENV_ID, num_episodes=100)


def test_every_check_is_documented():
    rows = re.findall(r"^\| `(\w+)` \|", (DOCS / "conformance.md").read_text(encoding="utf-8"), re.MULTILINE)
    assert rows == list(CHECKS)
