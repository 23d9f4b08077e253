"""Models beside the policy: where the config says that they are asked, and judges that nobody names."""

from __future__ import annotations

import json

import pytest

from polyturn.configs.errors import ConfigError
from polyturn.configs.loading.loader import load_config
from polyturn.configs.schema.run import RunConfig
from polyturn.envs.rewards.factory import make_reward
from polyturn.rollout.engines.groups import ServedGroups, judge_rewards, with_urls
from polyturn.trainer.run.served_checks import check_judges

BY_NAME = {"kind": "judge", "judge": "big"}
ELSEWHERE = {"kind": "judge", "urls": ["http://other/v1"]}


def config(tmp_path, **judge) -> RunConfig:
    """A judge in a rubric, in a suite and in what rows may choose."""
    tasks = tmp_path / "tasks.jsonl"
    tasks.write_text(json.dumps({"id": "t", "prompt": "?", "answer": "a"}) + "\n")
    parts = [
        {"name": "own", "reward": {"kind": "environment"}},
        {"name": "style", "reward": BY_NAME},
        {"name": "other", "reward": ELSEWHERE},
    ]
    given = load_config("quickstart").model_dump()
    given["reward"] = {"kind": "rubric", "parts": parts}
    given["evaluation"]["suites"] = [{"name": "s", "reward": BY_NAME}]
    given["environment"]["tasks"] = [{"path": str(tasks), "rewards": {"judged": BY_NAME}}]
    given["judges"] = [{"name": "big", **(judge or {"urls": ["http://one:1/", "http://two:2/v1"]})}]
    return RunConfig.model_validate(given)


def test_every_reward_that_names_a_judge_learns_where_it_is(tmp_path):
    before = config(tmp_path)
    check_judges(before)
    groups = ServedGroups(before, log_directory=tmp_path, judges_alone=True)
    assert groups.urls == {"big": ("http://one:1/", "http://two:2/v1")}
    served = with_urls(before, groups.urls)
    found = [reward.urls for reward in judge_rewards(served)]
    assert found.count(["http://one:1/v1", "http://two:2/v1"]) == 3
    assert found.count(["http://other/v1"]) == 1 and len(found) == 4
    for reward in judge_rewards(served):
        assert make_reward(reward) is make_reward(reward), "equal judges share their connections"
    # What is written of a run, and what a resume is compared with, is as it was given.
    assert all(not reward.urls for reward in judge_rewards(before) if reward.judge)
    assert with_urls(load_config("quickstart"), {}) == load_config("quickstart")


def test_names_must_be_those_of_judges_and_every_judge_must_be_asked(tmp_path):
    known = config(tmp_path)
    with pytest.raises(ConfigError, match="names 'big', which is none of `judges`; there are none"):
        check_judges(known.model_copy(update={"judges": []}))
    (judge,) = known.judges
    renamed = [judge.model_copy(update={"name": "bigger"})]
    with pytest.raises(ConfigError, match="did you mean 'bigger'"):
        check_judges(known.model_copy(update={"judges": renamed}))
    with pytest.raises(ConfigError, match="nothing names 'other'"):
        check_judges(known.model_copy(update={"judges": [judge, judge.model_copy(update={"name": "other"})]}))


def test_a_model_that_is_not_there_is_told_before_anything_starts(tmp_path):
    with pytest.raises(ValueError, match=r"judges\.0\.path: there is no directory"):
        ServedGroups(config(tmp_path, path="/nowhere"), log_directory=tmp_path)
