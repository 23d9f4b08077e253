"""How the deadlines of a run must stand to one another."""

import re

import pytest

from polyturn.configs.errors import ConfigError
from polyturn.configs.loading.loader import load_config
from polyturn.configs.schema.deadlines import check_times, hook_timeout_s, stall_timeout_s
from polyturn.configs.schema.run import EnvironmentConfig
from polyturn.tools.tool import MAX_RESULT_CHARS
from polyturn.trainer.run.preflight import check_lengths


def config_of(*overrides):
    return load_config("quickstart", overrides=list(overrides))


@pytest.mark.parametrize(
    ("overrides", "sentence"),
    [
        (
            ["engines.request_timeout_s=120"],
            r"engines.request_timeout_s \(120\) must be below environment.ep",
        ),
        (["environment.episode_timeout_s=30"], r"set engines.request_timeout_s=15, say"),
        (
            ["rollout.queue_timeout_s=60"],
            r"rollout.queue_timeout_s \(60\) must be above engines.request_timeo",
        ),
        (
            ["reward.kind=remote", "reward.url=http://localhost:1", "reward.deadline_s=120"],
            r"reward.deadline_s \(120\) must be below environment.hook_timeout_s \(120, from episode_timeout_s\)",
        ),
        (
            [
                "environment.hook_timeout_s=20",
                "reward.kind=rubric",
                'reward.parts=[{"name": "judge", "reward": {"kind": "remote", "url": "http://localhost:1"}}]',
            ],
            r"reward.parts.0.reward.deadline_s \(60\) must be below environment.hook_timeout_s \(20",
        ),
    ],
)
def test_a_deadline_that_could_never_come_is_refused(overrides, sentence):
    with pytest.raises(ConfigError, match=sentence) as caught:
        check_times(config_of(*overrides))
    assert "\n" not in str(caught.value)


def test_what_follows_from_the_deadlines_that_are_set():
    config = config_of("environment.hook_timeout_s=7")
    check_times(config)
    assert (hook_timeout_s(config), hook_timeout_s(config_of())) == (7.0, 120.0)
    waits = config.environment.episode_timeout_s + config.engines.request_timeout_s + 7.0
    assert stall_timeout_s(config) > waits


def test_the_documented_cap_of_results_is_that_of_tools():
    assert EnvironmentConfig(id="x").max_tool_result_chars == MAX_RESULT_CHARS


@pytest.mark.parametrize(
    ("sglang", "room"),
    [
        ({}, "65536 tokens (sglang.max_total_tokens, as it is on a CPU where the config says nothing)"),
        ({"max_total_tokens": 4096}, "4096 tokens (sglang.max_total_tokens)"),
        ({"context_length": 640}, "640 tokens (sglang.context_length)"),
    ],
)
def test_an_episode_that_does_not_fit_the_engine_is_refused(sglang, room):
    def of_length(length):
        config = config_of(f"environment.max_tokens_per_episode={length}")
        return config.model_copy(update={"sglang": sglang})

    most = int(room.partition(" ")[0])
    check_lengths(of_length(most))
    with pytest.raises(
        ConfigError, match=re.escape(f"is {most + 1}, but an engine has room for {room}; raise that")
    ):
        check_lengths(of_length(most + 1))
