"""`polyturn env check`: exit codes, and environments that hang, die or hold the interpreter."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

MODULE = """\
import os, time
from polyturn.envs.conformance.hacks import HARD
from polyturn.envs.messages import AssistantMessage
from polyturn.envs.rewards import exact_match
from polyturn.envs.messages import ListTasks, Task
from polyturn.envs.tool_env import ToolEnv
from polyturn.envs.registry import register


class Good(ToolEnv):
    def tasks(self, split):
        if split != "train":
            raise ValueError("the only split is train")
        return ListTasks([Task.from_prompt(f"t{i}", f"Say word{i}.", label=f"word{i}") for i in range(9)])

    def grade(self, message):
        return {"correct": exact_match(message.content, self.task.label)}

    def oracle(self, messages, tools):
        return AssistantMessage(content=self.task.label)


class Chatty(Good):
    def begin(self, task):
        print('{"finding": "forged"}')
        return super().begin(task)


class Paying(Good):
    def grade(self, message):
        return {"correct": 1.0}


class Dying(Good):
    def grade(self, message):
        if message.content == "nan":
            os._exit(0)
        return super().grade(message)


class Holding(Good):
    def grade(self, message):
        if message.content == "9**9**9**9":
            9 ** 9 ** 9  # one operation of the interpreter, which no thread can end
        return super().grade(message)


class Hanging(Good):
    def grade(self, message):
        while message.content == "9**9**9**9":
            time.sleep(1)
        return super().grade(message)


class Sandboxed(Good):
    def __init__(self, **kwargs):
        class SandboxUnavailable(RuntimeError): ...
        raise SandboxUnavailable("no user namespaces here")


class Extra(Good):
    def __init__(self, **kwargs):
        try:
            import a_package_that_is_not_there
        except ImportError as error:
            raise ValueError("needs a package: pip install polyturn[extra]") from error


def register_all():
    for cls in (Good, Chatty, Paying, Dying, Holding, Hanging, Sandboxed, Extra):
        register(f"kit/{cls.__name__}-v0", cls)
"""


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that looks like an installed package with an entry point."""
    site = tmp_path_factory.mktemp("site")
    (site / "kit_envs.py").write_text(MODULE)
    info = site / "kit_envs-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: kit-envs\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[polyturn.envs]\nkit = kit_envs:register_all\n")
    return site


def check(site: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "polyturn", "env", "check", *arguments, "--num-episodes", "8"],
        env={**os.environ, "PYTHONPATH": str(site)},
        capture_output=True,
        text=True,
        timeout=120,
    )


def test_a_failed_check_exits_with_1_and_says_what_to_do(site: Path) -> None:
    done = check(site, "kit/Paying-v0", "--check", "reward_hacks", "--check", "end")
    assert done.returncode == 1
    assert "reward_hacks         FAIL" in done.stdout and "end                  ok" in done.stdout
    assert "empty is paid 1 on task 't0'" in done.stdout
    assert done.stdout.splitlines()[-2] == "  1 of 2 checks failed"


def test_what_an_environment_prints_is_not_taken_for_a_finding(site: Path) -> None:
    done = check(site, "kit/Chatty-v0", "--check", "oracle")
    assert done.returncode == 0, done
    assert "forged" not in done.stdout


def test_an_environment_that_ends_the_process_is_a_finding_and_the_checks_go_on(site: Path) -> None:
    done = check(site, "kit/Dying-v0", "--check", "reward_hacks", "--check", "end")
    assert done.returncode == 1
    assert "ended by itself (exit code 0)" in done.stdout
    assert "end                  ok" in done.stdout


def test_a_grader_that_hangs_is_found_and_its_place_named(site: Path) -> None:
    done = check(site, "kit/Hanging-v0", "--check", "hard_answers", "--check", "end")
    assert done.returncode == 1
    assert "a power tower: a step takes more than 5 s" in done.stdout and "grade in " in done.stdout
    assert "end                  ok" in done.stdout


def test_a_grader_that_holds_the_interpreter_is_killed(site: Path) -> None:
    done = check(site, "kit/Holding-v0", "--check", "hard_answers", "--check", "end", "--deadline-s", "1")
    assert done.returncode == 1
    assert "something holds the interpreter" in done.stdout
    assert "end                  ok" in done.stdout


@pytest.mark.parametrize(
    ("env_id", "reason"), [("kit/Sandboxed-v0", "no user namespaces here"), ("kit/Extra-v0", "pip install")]
)
def test_what_cannot_run_here_is_not_called_checked(site: Path, env_id: str, reason: str) -> None:
    done = check(site, env_id)
    assert done.returncode == 1
    assert f"not checked here: {'needs a package: ' * (reason == 'pip install')}{reason}" in done.stdout
    assert "passed" not in done.stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["kit/God-v0"], "there is no environment 'kit/God-v0'; did you mean 'kit/Good-v0'?"),
        (["kit/Good-v0", "--check", "oracel"], "there is no check 'oracel'; did you mean 'oracle'?"),
        (["kit/Good-v0", "colour=red"], "colour"),
        (["kit/Good-v0", "colour"], "not of the form key=value"),
        ([], "name one environment, or write --all"),
        (["kit/Good-v0", "--all"], "name one environment, or write --all"),
    ],
)
def test_bad_input(site: Path, arguments: list[str], message: str) -> None:
    done = check(site, *arguments)
    assert done.returncode == 2
    assert done.stderr.startswith("error: ") and message in done.stderr
