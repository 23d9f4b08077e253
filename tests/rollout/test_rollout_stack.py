"""Collector, player, router and engine together, on the built-in environment."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest

from polyturn.configs.schema.run import RunConfig
from polyturn.rollout.evaluation import evaluate
from polyturn.rollout.groups import PromptCursor
from polyturn.rollout.setup import build_collector, open_policy
from polyturn.rollout.store import TrajectoryStore

pytestmark = pytest.mark.stack


def run_config(model: Path) -> RunConfig:
    return RunConfig.model_validate(
        {
            "name": "test",
            "environment": {
                "id": "polyturn/TwoHopSearch-v0",
                "options": {"num_people": 20, "num_employers": 10},
                "max_turns": 3,
                "max_tokens_per_turn": 16,
                "max_tokens_per_episode": 2000,
            },
            "model": {"path": str(model), "dtype": "float32"},
            "rollout": {
                "prompts_per_step": 4,
                "samples_per_prompt": 3,
                "max_concurrent_requests": 5,
                "sampling": {"seeded": True},
            },
            "engines": {"device": "cpu"},
            "trainer": {"num_steps": 1, "global_batch_size": 12},
        }
    )


async def collect(config, model, url, on_episode=None):
    collector = build_collector(config, model_path=model, split="train", temperature=1.0)
    prompts = PromptCursor(len(collector.tasks), seed=0).take(config.rollout.prompts_per_step)
    try:
        async with open_policy(config, model_path=model, url=url) as policy:
            return await collector.collect(
                prompts,
                samples_per_prompt=config.rollout.samples_per_prompt,
                policy=policy,
                on_episode=on_episode,
            )
    finally:
        collector.close()


@pytest.mark.catalogue("B50")
async def test_a_seeded_collection_repeats_and_is_kept(engines, tiny_model, tmp_path):
    config = run_config(tiny_model)
    store = TrajectoryStore(tmp_path)
    groups = await collect(config, tiny_model, engines.url, lambda episode: store.journal(1, episode))
    again = await collect(config, tiny_model, engines.url)
    first = [episode for group in groups for episode in group.episodes]
    second = [episode for group in again for episode in group.episodes]
    assert len(first) == 12
    assert [group.num_dropped for group in groups] == [0, 0, 0, 0]
    for one, other in zip(first, second, strict=True):
        assert one.episode_id == other.episode_id
        assert one.segments[0].token_ids.tolist() == other.segments[0].token_ids.tolist()
        assert one.segments[0].logprobs == pytest.approx(other.segments[0].logprobs, abs=1e-4)
        versions = itertools.compress(one.segments[0].policy_versions, one.segments[0].sampled)
        assert set(versions) == {0}
        assert one.timings.generate_s > 0
    tokens = {episode.segments[0].token_ids.tobytes() for group in groups for episode in group.episodes}
    assert len(tokens) == 12, "samples of one prompt have seeds of their own"
    journaled = {episode.episode_id: episode for episode in store.journaled(1)}
    assert [journaled[episode.episode_id] for episode in first] == first
    store.write_step(1, first)
    assert store.read_step(1) == first


async def test_evaluation_of_a_random_model(engines, tiny_model):
    config = run_config(tiny_model)
    collector = build_collector(config, model_path=tiny_model, split="heldout", temperature=1.0)
    async with open_policy(config, model_path=tiny_model, url=engines.url) as policy:
        result = await evaluate(collector=collector, policy=policy, num_tasks=8)
    collector.close()
    assert (result.num_tasks, result.num_episodes, result.num_failed) == (8, 8, 0)
    assert result.mean == 0.0
    assert 0.0 == result.low < result.high < 0.5
