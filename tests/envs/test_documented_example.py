"""The environment that docs/environments.md shows works as it stands there."""

import re
import warnings
from pathlib import Path

from gymnasium.utils.env_checker import check_env

import polyturn
from polyturn.envs.messages import AssistantMessage

DOCUMENT = Path(__file__).parents[2] / "docs" / "environments.md"


def test_the_first_environment_of_the_docs_runs_and_is_short():
    source = re.search(r"```python\n(.*?)```", DOCUMENT.read_text(encoding="utf-8"), re.DOTALL)[1]
    assert len(source.splitlines()) < 60
    names: dict = {"__name__": "documented_example"}
    exec(compile(source, str(DOCUMENT), "exec"), names)
    names["register_environments"]()
    env = polyturn.make("my/Arithmetic-v0")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        check_env(env)
    env.reset(options={"task": "sum-3"})
    assert env.step(AssistantMessage(content=env.task.label))[1:3] == (1.0, True)
