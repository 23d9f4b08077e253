"""Tasksets of verifiers as environments of ours."""

from __future__ import annotations

import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path

import pytest

import polyturn
from polyturn.envs.conformance.hacks import TEXTS
from polyturn.envs.faults import EnvironmentFault
from polyturn.envs.messages import AssistantMessage
from polyturn.tools.types import ToolCall

pytest.importorskip("verifiers.v1", reason="needs pip install 'polyturn[verifiers]'", exc_type=ImportError)

from polyturn.envs.adapters.verifiers import VerifiersEnv

OTHERS = """
import asyncio
import verifiers.v1 as vf

class Data(vf.TaskData):
    answer: str = "yes"

class Raising(vf.Task[Data]):
    @vf.reward
    async def broken(self, trace: vf.Trace) -> float:
        raise KeyError("no such thing")

class Weighted(vf.Task[Data]):
    @vf.reward(weight=0.25)
    async def polite(self, trace: vf.Trace) -> float:
        return float("please" in trace.last_reply)

    @vf.reward(weight=0.75)
    async def parts(self, trace: vf.Trace) -> dict[str, float]:
        return {"right": float(self.data.answer in trace.last_reply), "calls": 0.0}

class Hanging(vf.Task[Data]):
    @vf.reward
    async def slow(self, trace: vf.Trace) -> float:
        await asyncio.sleep(60)
        return 1.0

class Infinite(vf.Task[Data]):
    @vf.reward
    async def much(self, trace: vf.Trace) -> float:
        return float("inf")

class OnMachine(vf.Task[Data]):
    @vf.reward
    async def tests_pass(self, trace: vf.Trace, runtime: vf.Runtime) -> float:
        return 1.0

def taskset(kind):
    class Made(vf.Taskset[kind, vf.TasksetConfig]):
        def load(self):
            yield kind(Data(prompt="?", system_prompt="Be polite."), self.config.task)
            yield kind(Data(prompt=[vf.types.UserMessage(content="Really?")]), self.config.task)
    return Made

RaisingSet, WeightedSet, HangingSet, InfiniteSet, OnMachineSet = map(
    taskset, (Raising, Weighted, Hanging, Infinite, OnMachine)
)
"""


@pytest.fixture(scope="module")
def others(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A module with further tasksets."""
    folder: Path = tmp_path_factory.mktemp("tasksets")
    (folder / "verifiers_tasksets_of_the_test.py").write_text(textwrap.dedent(OTHERS))
    sys.path.insert(0, str(folder))
    yield "verifiers_tasksets_of_the_test"
    sys.path.remove(str(folder))


def make(**options: object) -> VerifiersEnv:
    env = polyturn.make("polyturn/Verifiers-v0", **options)
    assert isinstance(env, VerifiersEnv)
    return env


def test_an_episode_with_tools_is_played_and_scored_by_verifiers() -> None:
    env = make()
    (spec,) = env.tools
    assert (spec.name, spec.description) == ("add", "Add two numbers.")
    assert spec.parameters["properties"]["a"]["type"] == "integer"
    observation, _ = env.reset(seed=0)
    a, b = (
        int(word.rstrip("?")) for word in observation[0]["content"].split() if word.rstrip("?").isdecimal()
    )
    observation, *_ = env.step(
        AssistantMessage(tool_calls=(ToolCall(id="c", name="add", arguments={"a": a, "b": b}),))
    )
    *_, info = env.step(AssistantMessage(content=f"\\boxed{{{observation[0]['content']}}}"))
    assert info["reward_parts"] == {"right": 1.0}
    assert info["metrics"] == {"turns": 2.0}


def test_the_oracle_is_paid_and_random_play_and_probes_are_not() -> None:
    env = make()
    for seed in range(5):
        env.reset(seed=seed)
        assert env.oracle is not None
        assert env.step(env.oracle((), ()))[1] == 1.0
    for text in TEXTS.values():
        env.reset(seed=0)
        assert env.step(AssistantMessage(content=text))[1] == 0.0, text


def test_mistakes_with_a_tool_are_told_to_the_model() -> None:
    env = make()
    env.reset(seed=0)
    for arguments, said in (
        ({"a": 1}, "missing argument 'b'"),
        ({"a": 1, "b": 10**6}, "the adder has four digits"),
    ):
        call = ToolCall(id="c", name="add", arguments=arguments)
        observation, _, terminated, *_ = env.step(AssistantMessage(tool_calls=(call,)))
        assert said in observation[0]["content"] and not terminated


def test_all_weighted_rewards_are_parts(others: str) -> None:
    env = make(taskset=f"{others}:WeightedSet", num_heldout=1, answer="{}")
    observation, _ = env.reset(seed=0)
    assert observation == (
        {"role": "system", "content": "Be polite."},
        {"role": "user", "content": "?"},
    )
    _, reward, *_, info = env.step(AssistantMessage(content="yes please"))
    assert info["reward_parts"] == {"polite": 0.25, "right": 0.75, "calls": 0.0} and reward == 1.0
    assert env.tasks("heldout")[0].messages == ({"role": "user", "content": "Really?"},)


@pytest.mark.parametrize(
    ("name", "match"),
    [("RaisingSet", "KeyError"), ("HangingSet", "Timeout"), ("InfiniteSet", "finite")],
)
def test_scoring_that_fails_is_a_fault(others: str, name: str, match: str) -> None:
    env = make(taskset=f"{others}:{name}", num_heldout=1, deadline_s=0.5 if name == "HangingSet" else 60.0)
    env.reset(seed=0)
    with pytest.raises(EnvironmentFault, match=match):
        env.step(AssistantMessage(content="yes"))


def test_what_needs_a_runtime_is_refused(others: str) -> None:
    with pytest.raises(ValueError, match="cannot be played as a conversation: tests_pass needs the runtime"):
        make(taskset=f"{others}:OnMachineSet", num_heldout=1)


def test_wrong_names_and_options_are_refused() -> None:
    with pytest.raises(ValueError, match="must be 'module:Class'"):
        make(taskset="no_such_module:Set")
    with pytest.raises(ValueError, match="is no verifiers"):
        make(taskset="collections:Counter")
    with pytest.raises(ValueError, match="colour"):
        make(config={"colour": 3})
    with pytest.raises(ValueError, match="unknown split 'heldout'; the splits are train"):
        make(num_heldout=0, split="heldout")
