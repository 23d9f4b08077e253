"""What a step made of its tokens is kept as it was, and read by episode and segment."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np

from polyturn.agents.episode import Episode
from polyturn.configs.loading.loader import load_config
from polyturn.rollout.token_credit import read_all_token_credit, read_token_credit, token_credit_path
from polyturn.trainer.credit.estimates import assign_credit, make_samples
from polyturn.trainer.run.token_credit import keep_token_credit


def test_the_columns_of_a_step_are_kept_and_what_was_bounded(
    tmp_path: Path, make_episode: Callable[..., Episode]
) -> None:
    recipe = tmp_path / "trial.yaml"
    recipe.write_text("extends: [quickstart, algorithms/icepop]\nname: trial\n")
    algorithm = load_config(recipe).trainer.algorithm
    rewards = {"g0": (1.0, 0.0), "g1": (0.0, 1.0)}
    episodes = [
        make_episode(group, sample, reward, num_segments=2)
        for group, of_group in rewards.items()
        for sample, reward in enumerate(of_group)
    ]
    samples = {
        # The first sampled token of each is twelve times as likely for the trainer: it is left out.
        sample.sample_id: replace(
            sample,
            proximal_logprobs=sample.behavior_logprobs
            + np.where(np.cumsum(sample.sampled) == 1, 2.5, 0.125).astype(np.float32),
        )
        for sample in make_samples(episodes)
    }
    credit = assign_credit(episodes, samples, algorithm, version=0)
    path = token_credit_path(tmp_path, 3)
    keep_token_credit(path, episodes, credit)
    assert len(list(read_all_token_credit(path))) == len(credit.samples) == 8
    for episode in episodes:
        found = read_token_credit(path, episode.episode_id)
        assert sorted(found) == [0, 1]
        for number, columns in found.items():
            sample = samples[f"{episode.episode_id}/{number}"]
            trained = next(one for one in credit.samples if one.sample_id == sample.sample_id)
            assert np.array_equal(columns.proximal_logprobs, sample.proximal_logprobs[sample.sampled])
            assert np.array_equal(columns.advantages, trained.advantages[sample.sampled])
            assert columns.correction_weights[0] == 0 and (columns.correction_weights[1:] > 1).all()
            assert columns.reference_logprobs is None and not columns.clipped[1:].any()
    assert read_token_credit(path, "nobody") == {} == read_token_credit(tmp_path / "none", "g0.0.0")
