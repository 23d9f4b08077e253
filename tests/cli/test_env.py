"""`polyturn env`: list, show and play, with an environment registered by the test."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence

import gymnasium
import pytest
from typer.testing import CliRunner

from polyturn.cli.main import app
from polyturn.envs import registry
from polyturn.envs.messages import AssistantMessage, ListTasks, Message, Task
from polyturn.envs.tool_env import ToolEnv
from polyturn.tools.tool import tool
from polyturn.tools.types import ToolCall, ToolSpec

ENV_ID = "tests/Adder-v0"


class Adder(ToolEnv):
    """Sums, with a tool that adds."""

    def __init__(self, *, largest: int = 9, **kwargs: object) -> None:
        super().__init__(**kwargs)  # type: ignore[arg-type]
        if largest < 1:
            raise ValueError("largest must be at least 1")
        self.largest = largest

    @tool
    def add(self, a: int, b: int) -> int:
        """Add two numbers.

        Args:
            a: The first.
            b: The second.
        """
        return a + b

    def tasks(self, split: str) -> ListTasks:
        if split not in ("train", "heldout"):
            raise ValueError(f"there is no split {split!r}")
        return ListTasks(
            [
                Task.from_prompt(f"{split}-{a}", f"What is {a} + 1?", label=str(a + 1), metadata={"a": a})
                for a in range(self.largest)
            ]
        )

    def grade(self, message: AssistantMessage) -> Mapping[str, float]:
        return {"right": float(message.content == self.task.label)}

    def oracle(self, messages: Sequence[Message], tools: Sequence[ToolSpec]) -> AssistantMessage:
        if messages[-1]["role"] == "tool":
            return AssistantMessage(content=messages[-1]["content"])
        arguments = {"a": self.task.metadata["a"], "b": 1}
        return AssistantMessage(tool_calls=(ToolCall(id="1", name="add", arguments=arguments),))


class Mute(Adder):
    """An environment without an oracle."""

    oracle = None  # type: ignore[assignment]


@pytest.fixture(autouse=True)
def registered() -> Iterator[None]:
    registry.register(ENV_ID, Adder, description="Sums for the tests.")
    registry.register("tests/Mute-v0", Mute)
    yield
    for env_id in (ENV_ID, "tests/Mute-v0"):
        del gymnasium.registry[env_id]
        del registry._registered[env_id]


def invoke(*arguments: str, stdin: str = "") -> tuple[int, str, str]:
    result = CliRunner().invoke(app, ["env", *arguments], input=stdin)
    return result.exit_code, result.stdout, result.stderr


def test_list_has_ours_and_the_built_in_ones() -> None:
    code, out, _ = invoke("list")
    assert code == 0
    lines = {line.split()[0]: line.partition(" ")[2].strip() for line in out.splitlines()}
    assert lines[ENV_ID] == "Sums for the tests."
    assert "polyturn/TwoHopSearch-v0" in lines


def test_show_has_tools_options_splits_and_an_observation() -> None:
    code, out, _ = invoke("show", ENV_ID, "largest=5")
    assert code == 0
    assert "default 9" in out
    assert "train    5" in out and "heldout  5" in out
    assert json.loads(out[out.index("{") : out.rindex("}") + 1])["name"] == "add"
    assert "[user] What is" in out


def test_a_person_plays() -> None:
    typed = 'add {"a": 2, "b": 1}\nadd {oops}\n3\n'
    code, out, err = invoke("play", ENV_ID, "--task", "train-2", stdin=typed)
    assert (code, err) == (0, "")
    assert "[user] What is 2 + 1?" in out
    assert "[tool] 3" in out
    assert "not valid JSON" in out
    assert out.splitlines()[-1] == "completed (terminated) after 3 turns: reward 1 (right 1)"


def test_a_wrong_answer_scores_nothing() -> None:
    _, out, _ = invoke("play", ENV_ID, "--task", "train-2", stdin="5\n")
    assert out.splitlines()[-1] == "completed (terminated) after 1 turns: reward 0 (right 0)"


def test_the_seed_draws_the_task() -> None:
    played = {seed: invoke("play", ENV_ID, "--seed", seed, "--oracle")[1] for seed in ("0", "1", "2", "3")}
    assert played["0"] == invoke("play", ENV_ID, "--seed", "0", "--oracle")[1]
    assert len(set(played.values())) > 1


def test_the_oracle_plays() -> None:
    code, out, _ = invoke("play", ENV_ID, "--oracle", "--split", "heldout", "--task", "heldout-4")
    assert code == 0
    assert out.splitlines() == [
        "[user] What is 4 + 1?",
        '[assistant] add {"a": 4, "b": 1}',
        "[tool] 5",
        "[assistant] 5",
        "",
        "completed (terminated) after 2 turns: reward 1 (right 1)",
    ]


def test_any_policy_plays_and_is_watched() -> None:
    code, out, _ = invoke("play", ENV_ID, "--policy", "oracle", "--task", "train-4")
    assert (code, out) == invoke("play", ENV_ID, "--oracle", "--task", "train-4")[:2]
    options = [
        text for one in ("policy=oracle", "num_samples=2", "by=grade") for text in ("--policy-option", one)
    ]
    code, out, _ = invoke("play", ENV_ID, "--policy", "best_of", *options)
    assert code == 0
    assert out.splitlines()[-1] == "completed (terminated) after 2 turns: reward 1 (right 1)"


def test_a_limit_of_turns_truncates() -> None:
    _, out, _ = invoke("play", ENV_ID, "--oracle", "--max-turns", "1")
    assert out.splitlines()[-1] == "truncated (max_turns) after 1 turns: reward 0"


@pytest.mark.parametrize("seed", ["-1", str(2**32), "x"])
def test_a_seed_out_of_range_is_bad_input(seed: str) -> None:
    code, out, err = invoke("play", ENV_ID, "--seed", seed)
    assert (code, out) == (2, "")
    assert "Invalid value for '--seed'" in err


def test_input_that_ends_early() -> None:
    code, _, err = invoke("play", ENV_ID, stdin="")
    assert code == 130
    assert "the input ended before the episode did" in err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["play", "tests/Addr-v0"],
            "there is no environment 'tests/Addr-v0'; did you mean 'tests/Adder-v0'?",
        ),
        (["play", ENV_ID, "--split", "dev"], "there is no split 'dev'"),
        (["play", ENV_ID, "--task", "train-99"], "no task 'train-99'"),
        (["play", ENV_ID, "largest"], "command line: 'largest' is not of the form key=value"),
        (["play", ENV_ID, "largest=0"], "largest must be at least 1"),
        (["show", ENV_ID, "smallest=1"], "smallest"),
        (["play", "tests/Mute-v0", "--oracle"], "tests/Mute-v0 has no scripted oracle"),
        (["play", ENV_ID, "--policy", "nobody"], "there is no policy 'nobody'"),
        (["play", ENV_ID, "--policy", "model"], "the policy 'model' is one that is served"),
        (["play", ENV_ID, "--policy", "random", "--policy-option", "x"], "'x' is not of the form key=value"),
    ],
)
def test_bad_input(arguments: list[str], message: str) -> None:
    code, out, err = invoke(*arguments)
    assert (code, out) == (2, "")
    assert err.startswith("error: ") and message in err
    assert "Traceback" not in err and len(err.splitlines()) == 1
