"""Functions and classes as rewards, by import path or file path; a wrong signature is told with the right one."""

import sys

import pytest

from polyturn.configs.schema.tasks import GroupRewardConfig
from polyturn.envs.messages import AssistantMessage, EpisodeView, Task, is_async
from polyturn.envs.plugins import load_object, load_plugin
from polyturn.envs.rewards.factory import GROUP_REWARD, REWARD, make_group_rewards, read_reward

SOURCE = """
from __future__ import annotations
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from polyturn.envs.messages import EpisodeView

def length(episode):
    return float(len(episode.answer))

def scaled(episode: EpisodeView, *, factor: float = 1.0) -> float:
    return factor * len(episode.answer)

async def later(episode) -> Mapping[str, float]:
    return {"later": 1.0}

@dataclass
class Judge:
    strict: bool = False
    def __call__(self, episode: EpisodeView) -> dict[str, float]:
        return {"strict": float(self.strict)}

class AsyncJudge:
    async def __call__(self, episode):
        return 0.5

class NoCall:
    pass

class ThreeArguments:
    def __call__(self, prompt, answer, label):
        return 1.0

def three(prompt, answer, label): return 1.0
def nothing(): return 1.0
def text(episode) -> str: return "1.0"
def several(episode) -> list[float]: return [1.0]
def keyword(*, episode): return 1.0
def together(episodes: Sequence[EpisodeView]) -> list[float]: return [1.0 for _ in episodes]
def one_for_all(episodes) -> float: return 1.0
NUMBER = 3
"""


@pytest.fixture
def rewards(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "my_rewards.py").write_text(SOURCE)
    return "my_rewards.py:"


VIEW = EpisodeView(task=Task.from_prompt("t", "p"), message=AssistantMessage(content="four"), messages=())


def test_functions_and_classes_are_loaded_with_their_options(rewards):
    assert load_plugin(REWARD, rewards + "length")(VIEW) == 4.0
    assert load_plugin(REWARD, rewards + "scaled", {"factor": 0.5})(VIEW) == 2.0
    assert load_plugin(REWARD, rewards + "Judge", {"strict": True})(VIEW) == {"strict": 1.0}
    assert not is_async(load_plugin(REWARD, rewards + "Judge"))
    assert is_async(load_plugin(REWARD, rewards + "later"))
    assert is_async(load_plugin(REWARD, rewards + "AsyncJudge"))
    row = {"kind": "function", "target": rewards + "scaled", "options": {"factor": 2}}
    assert read_reward(row)(VIEW) == 8.0
    assert load_plugin(REWARD, "polyturn.envs.rewards.rules:ExactMatch", {"answer": "tag"}).answer == "tag"


RIGHT = (
    r"`def reward\(episode: EpisodeView\) -> float \| Mapping\[str, float\]`, or the same with `async def`"
)
RIGHT_METHOD = rf"{RIGHT}, in a class as the method __call__\(self, episode\)"


@pytest.mark.parametrize(
    ("name", "options", "words"),
    [
        (
            "three",
            {},
            rf"three\(prompt, answer, label\) cannot be called as a reward: missing .*; a reward is {RIGHT}",
        ),
        ("nothing", {}, rf"too many positional arguments; a reward is {RIGHT}"),
        ("keyword", {}, rf"too many positional arguments; a reward is {RIGHT}"),
        ("text", {}, rf"returns str, which is no reward; a reward is {RIGHT}"),
        ("several", {}, rf"returns list\[float\], which is no reward; a reward is {RIGHT}"),
        ("NUMBER", {}, rf"is of type int, not a function or a class; a reward is {RIGHT}"),
        ("NoCall", {}, rf"its objects cannot be called; a reward is {RIGHT_METHOD}"),
        ("ThreeArguments", {}, rf"missing a required argument: 'answer'; a reward is {RIGHT_METHOD}"),
        ("scaled", {"facter": 2}, r"unexpected keyword argument 'facter'"),
        ("Judge", {"strickt": True}, r"my_rewards\.py:Judge has no option 'strickt'; did you mean 'strict'"),
        ("lenght", {}, r"my_rewards\.py has no 'lenght', did you mean 'length'"),
    ],
)
def test_what_cannot_be_a_reward_is_told_with_the_right_signature(rewards, name, options, words):
    with pytest.raises(ValueError, match=words):
        load_plugin(REWARD, rewards + name, options)


def test_group_rewards_have_a_signature_of_their_own(rewards):
    assert load_plugin(GROUP_REWARD, rewards + "together")([VIEW, VIEW]) == [1.0, 1.0]
    with pytest.raises(
        ValueError, match=r"returns float, which is no group reward; .*`def reward\(episodes: Seq"
    ):
        load_plugin(GROUP_REWARD, rewards + "one_for_all")
    with pytest.raises(ValueError, match="no group reward 'rnk', did you mean 'rank'"):
        make_group_rewards([GroupRewardConfig(name="a", target="rnk")])
    with pytest.raises(ValueError, match="unexpected keyword argument 'bye'"):
        make_group_rewards([GroupRewardConfig(name="a", target="rank", options={"bye": "reward"})])
    with pytest.raises(ValueError, match="two group rewards have the name 'a'"):
        make_group_rewards([GroupRewardConfig(name="a", target=t) for t in ("rank", "diversity")])


def test_files_and_modules_that_cannot_be_loaded(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "broken.py").write_text("1 / 0\n")
    for target, words in (
        ("broken.py:f", r"cannot import broken\.py: ZeroDivisionError"),
        ("missing.py:f", r"missing\.py: no such file"),
        ("missing_module:f", r"cannot import 'missing_module': .*; for a file, write its path with \.py"),
        ("f", "not of the form module:name"),
        ("module:", "not of the form module:name"),
    ):
        with pytest.raises(ValueError, match=words):
            load_object(target)


def test_two_files_of_one_name_do_not_meet(tmp_path):
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "rewards.py").write_text(f"NAME = {folder!r}\n")
    names = [load_object(f"{tmp_path}/{folder}/rewards.py:NAME") for folder in ("a", "b", "a")]
    assert names == ["a", "b", "a"]
    assert str(tmp_path / "a") not in sys.path
