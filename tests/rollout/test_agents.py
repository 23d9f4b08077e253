"""A run whose config names an agent: it plays the episodes, here through a real client and the real endpoint."""

import asyncio
import json
from pathlib import Path

import httpx
import pytest
from openai import AsyncOpenAI

from polyturn.agents.episode import Outcome
from polyturn.configs.errors import ConfigError
from polyturn.configs.loading.loader import load_config
from polyturn.trainer.run.preflight import preflight
from tests.support.play import play_first

EXAMPLES = Path(__file__).parents[2] / "examples" / "agents"
"""Agents as their authors write them."""


def config_of(agent, **options):
    overrides = [f"agent.target={agent}", *(f"{key}={value}" for key, value in options.items())]
    return load_config("quickstart", overrides)


def say_right(number, task):
    if not number:
        return '<tool_call>\n{"name": "search", "arguments": {"query": "Mara Lindqvist"}}\n</tool_call>'
    return task.label


@pytest.mark.parametrize("name", ["tool_loop.py:play", "openai_client.py:play"])
def test_an_agent_of_the_config_plays(name):
    episode, policy = play_first(config_of(EXAMPLES / name), say_right)
    assert (episode.outcome, episode.reward) == (Outcome.COMPLETED, 1.0), episode.error
    (segment,) = episode.segments
    assert segment.token_ids[segment.sampled].tolist() == [*policy.written[0][1], *policy.written[1][1]]
    assert episode.tools["search"].num_calls == 1


def test_slimes_hook_after_its_edit():
    config = config_of(EXAMPLES / "custom_generate.py:custom_generate", **{"agent.options": "{max_turns: 2}"})
    episode, policy = play_first(config, lambda number, task: f"<calc>2 * {number} + 1</calc>")
    assert episode.outcome is Outcome.COMPLETED and episode.reward == 0.0
    assert [message["content"] for message in episode.messages[-3:]] == [
        "<calc>2 * 0 + 1</calc>", "Result: 1", "<calc>2 * 1 + 1</calc>"
    ]  # fmt: skip
    assert episode.num_turns == len(policy.written) == 2


async def test_a_program_outside_takes_an_episode_up_and_says_what_it_was_worth(tmp_path):
    config = config_of(
        "polyturn.agents.online:OnlineAgent", **{"agent.options": f"{{file: {tmp_path}/online.json}}"}
    )

    async def program():
        while not (tmp_path / "online.json").exists():
            await asyncio.sleep(0.01)
        assert (tmp_path / "online.json").stat().st_mode & 0o077 == 0
        told = json.loads((tmp_path / "online.json").read_text())
        own = {"Authorization": f"Bearer {told['api_key']}"}
        async with httpx.AsyncClient(base_url=told["url"]) as client:
            assert (await client.post("/episodes")).status_code == 401
            taken = (await client.post("/episodes", headers=own)).json()
            none = await client.post("/episodes", headers=own)
            assert (none.status_code, none.headers["Retry-After"]) == (429, "1")
            async with AsyncOpenAI(base_url=taken["base_url"], api_key=taken["api_key"]) as model:
                await model.chat.completions.create(model="policy", messages=taken["messages"])
            end, key = f"/sessions/{taken['session_id']}/end", {"x-api-key": taken["api_key"]}
            assert (await client.post(end, headers=own, json={"reward": 1})).status_code == 401
            assert (await client.post(end, headers=key, json={"reward": "much"})).status_code == 400
            worth = {"reward": 0.7, "metrics": {"num_clicks": 3}}
            assert (await client.post(end, headers=key, json=worth)).status_code == 200

    outside = asyncio.create_task(program())
    (episode, policy) = await asyncio.to_thread(play_first, config, lambda number, task: "Ashford")
    await outside
    assert (episode.outcome, episode.stop_reason) == (Outcome.COMPLETED, "rewarded")
    assert (episode.reward, episode.metrics["num_clicks"]) == (0.7, 3.0)
    assert episode.num_sampled_tokens == len(policy.written[0][1])


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"agent.target": f"{EXAMPLES}/tool_loop.py:plai"}, "did you mean 'play'"),
        ({"agent.target": "json:dumps"}, "async def play"),
        ({"agent.matching": "strict"}, "exact, loose, role_and_content"),
        ({"agent.policy_errors": "[json:dumps]"}, "json:dumps is no exception"),
        ({"agent.options": "{turns: 3}"}, "turns"),
        ({"model.dialect": "search_r1"}, "a dialect of tool calls"),
    ],
)
def test_what_is_wrong_with_an_agent_is_told_before_anything_starts(options, told):
    given = {"agent.target": f"{EXAMPLES}/tool_loop.py:play", **options}
    config = load_config("quickstart", [f"{key}={value}" for key, value in given.items()])
    with pytest.raises(ConfigError, match=told):
        preflight(config, dry_run=True)
