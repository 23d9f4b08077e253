"""The pytest fixture `polyturn_check_env`, there in every test as soon as Polyturn is installed.

def test_it_conforms(polyturn_check_env):
    polyturn_check_env("my/Arithmetic-v0")
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

import pytest

# A plug-in is imported by every pytest session, so what it needs is imported where it is used.
if TYPE_CHECKING:
    from polyturn.envs.conformance.subject import Finding
    from polyturn.envs.played_env import PlayedEnv

CheckEnv = Callable[..., "list[Finding]"]


@pytest.fixture
def polyturn_check_env() -> CheckEnv:
    """Checks an environment, and fails with what was found; where it cannot run, the test is skipped.

    The function takes an id, with the constructor's arguments as `options`, or a function that makes an instance. Other
    arguments are fields of `Subject`, such as `num_tasks`, and of `check_environment`: `checks`, `deadline_s`. It
    returns the findings.
    """
    from polyturn.envs.conformance.runner import DEADLINE_S, check_environment
    from polyturn.envs.conformance.subject import Subject, Unavailable
    from polyturn.envs.registry import make

    def check(
        env: str | Callable[[], PlayedEnv],
        *,
        options: dict[str, Any] | None = None,
        checks: Iterable[str] | None = None,
        deadline_s: float = DEADLINE_S,
        **fields: Any,
    ) -> list[Finding]:
        name = env if isinstance(env, str) else getattr(env, "__name__", "environment")
        if isinstance(env, str):
            env_id = env

            def build() -> PlayedEnv:
                return make(env_id, **(options or {}))
        else:
            build = env
        subject = Subject(name=name, make=build, **fields)
        try:
            findings = list(check_environment(subject, checks=checks, deadline_s=deadline_s))
        except Unavailable as reason:
            pytest.skip(str(reason))
        failed = [f"  {finding.check}: {finding.message}" for finding in findings if not finding.ok]
        if failed:
            pytest.fail(
                "\n".join([f"{name} fails {len(failed)} of {len(findings)} checks", *failed]), pytrace=False
            )
        return findings

    return check
