"""SkyRL-Gym's environments as environments of ours."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import polyturn
from polyturn.envs.conformance.hacks import TEXTS
from polyturn.envs.faults import EnvironmentFault
from polyturn.envs.messages import AssistantMessage

skyrl_gym = pytest.importorskip("skyrl_gym", reason="needs pip install 'polyturn[skyrl-gym]'")

from polyturn.envs.adapters.skyrl_gym import SkyRLGymEnv  # noqa: E402


def make(**options: object) -> SkyRLGymEnv:
    env = polyturn.make("polyturn/SkyRLGym-v0", **options)
    assert isinstance(env, SkyRLGymEnv)
    return env


@pytest.mark.parametrize("name", ["gsm8k", "gsm8k_multi_turn", "aime"])
def test_the_oracle_is_paid_and_random_play_and_probes_are_not(name: str) -> None:
    env = make(env=name)
    for seed in range(5):
        env.reset(seed=seed)
        assert env.oracle is not None
        *_, info = env.step(env.oracle((), ()))
        assert info["reward_parts"] == {"success": 1.0}
    random_play = env.random_policy(0)
    for script in [random_play] * 3 + [
        lambda *_, text=text: AssistantMessage(content=text) for text in TEXTS.values()
    ]:
        env.reset(seed=1)
        for _ in range(6):
            _, reward, terminated, *_ = env.step(script((), ()))
            assert reward == 0.0
            if terminated:
                break
        assert terminated


def test_turns_of_the_peer_are_turns_here() -> None:
    env = make(env="gsm8k_multi_turn", reward="return")
    env.reset(seed=0)
    for turn in range(1, 6):
        observation, reward, terminated, _, info = env.step(AssistantMessage(content="#### 0"))
        assert info["metrics"]["skyrl_steps"] == turn
        assert bool(observation) == (turn < 5) == (not terminated)
    assert reward == pytest.approx(0.2), "the peer pays for a wrong answer in the right form"
    assert "#### ANSWER" in env._transcript[2]["content"]


def test_a_seed_gives_the_same_task_and_splits_differ() -> None:
    env = make()
    assert env.tasks("train")[3] == make().tasks("train")[3] == env.tasks("train").find("gsm8k/train/3")
    assert env.tasks("heldout")[3].messages != env.tasks("train")[3].messages
    with pytest.raises(ValueError, match="unknown split 'test'"):
        env.tasks("test")


def test_rows_in_the_form_of_skyrls_data_are_tasks(tmp_path: Path) -> None:
    row = {
        "prompt": [{"role": "user", "content": "2 + 2?"}],
        "env_class": "gsm8k",
        "reward_spec": {"method": "rule", "ground_truth": "4"},
        "extra_info": {"index": 0},
    }
    env = make(rows=[row])
    observation, _ = env.reset(seed=0)
    assert observation[0]["content"] == "2 + 2?"
    assert env.step(AssistantMessage(content="#### 4"))[1] == 1.0
    path = tmp_path / "tasks.jsonl"
    path.write_text(json.dumps({"prompt": "2 + 3?", "answer": "5"}) + "\n")
    env = make(path=path)
    env.reset(seed=0)
    assert env.step(AssistantMessage(content="#### 5"))[1] == 1.0
    with pytest.raises(ValueError, match="row 0 needs 'prompt' and 'reward_spec'"):
        make(rows=[{"prompt": "2 + 2?"}])


def test_what_the_peer_lacks_is_a_fault_not_a_reward() -> None:
    class Config:
        search_url, topk, timeout, log_requests = "http://127.0.0.1:9/retrieve", 1, 1, False

    row = {"prompt": "?", "reward_spec": {"ground_truth": {"target": ["Paris"]}}, "max_turns": 2}
    env = make(env="search", env_config=Config(), rows=[row])
    env.reset(seed=0)
    assert env.oracle is not None
    assert env.step(env.oracle((), ()))[1] == 1.0
    broken = make(env="search", rows=[row])  # without a configuration
    with pytest.raises(EnvironmentFault, match="begin failed"):
        broken.reset(seed=0)


def test_wrong_ids_say_what_is_right() -> None:
    with pytest.raises(ValueError, match="did you mean 'gsm8k'"):
        make(env="gsm8")
    with pytest.raises(ValueError, match="'text2sql' needs tasks"):
        make(env="text2sql")
