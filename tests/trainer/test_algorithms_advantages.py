"""Advantages against closed forms, and their independence of order, raggedness and other groups."""

import math
import random

import pytest
import torch

from polyturn.trainer.algorithms.advantages import group_advantages


def test_grpo_is_the_standard_score_with_bessels_correction():
    rewards = [0.0, 1.0, 0.25, 3.0]
    result = group_advantages(rewards, ["a"] * 4, kind="grpo", epsilon=1e-6)
    values = torch.tensor(rewards, dtype=torch.float64)
    expected = (values - values.mean()) / (values.std(correction=1) + 1e-6)
    assert result.advantages == pytest.approx(expected.tolist(), abs=1e-12)
    assert result.trainable == (True,) * 4


def test_dr_grpo_only_centres():
    result = group_advantages([1.0, 0.0, 0.0, 0.0], ["a"] * 4, kind="dr_grpo")
    assert result.advantages == (0.75, -0.25, -0.25, -0.25)


@pytest.mark.catalogue("B3")
def test_noise_in_the_rewards_is_not_blown_up():
    rewards = [1.0, 1.0, 1.0, 1.0 + 1e-5]
    quiet = group_advantages(rewards, ["a"] * 4, kind="grpo", min_spread=1e-4)
    assert quiet.advantages == (0.0,) * 4 and quiet.num_uniform_groups == 1
    loud = group_advantages(rewards, ["a"] * 4, kind="grpo", min_spread=0.0)
    assert max(loud.advantages) > 1


@pytest.mark.parametrize("reward", [0.1, 1 / 3, 1e6])
@pytest.mark.parametrize("kind", ["grpo", "dr_grpo"])
def test_equal_rewards_give_exactly_zero(kind, reward):
    assert group_advantages([reward] * 7, ["a"] * 7, kind=kind).advantages == (0.0,) * 7


@pytest.mark.catalogue("B4")
@pytest.mark.parametrize("kind", ["grpo", "dr_grpo"])
def test_an_episode_alone_in_its_group_is_excluded_and_counted(kind):
    result = group_advantages([1.0, 5.0, 0.0], ["a", "alone", "a"], kind=kind)
    assert result.advantages[1] == 0.0
    assert result.trainable == (True, False, True)
    assert (result.num_groups, result.num_singleton_groups, result.num_uniform_groups) == (2, 1, 0)


@pytest.mark.catalogue("B5")
def test_one_success_of_n_has_the_closed_form_and_grows_with_n():
    found = []
    for n in range(2, 17):
        result = group_advantages([1.0] + [0.0] * (n - 1), ["a"] * n, kind="grpo", epsilon=1e-9)
        found.append(result.advantages[0])
        assert result.advantages[0] == pytest.approx((n - 1) / math.sqrt(n), abs=1e-6)
        assert result.advantages[1] == pytest.approx(-1 / math.sqrt(n), abs=1e-6)
    assert found == sorted(found)


@pytest.mark.catalogue("B6", "B7")
@pytest.mark.parametrize("kind", ["grpo", "dr_grpo"])
def test_membership_is_by_id_whatever_the_order_and_the_sizes(kind):
    rng = random.Random(3)
    groups = {"a": [0.0, 1.0, 1.0], "b": [0.0, 1.0, 1.0, 0.5, 0.0], "c": [2.0, 1.0]}
    alone = {
        name: group_advantages(rewards, [name] * len(rewards), kind=kind).advantages
        for name, rewards in groups.items()
    }
    rows = [(name, i) for name, rewards in groups.items() for i in range(len(rewards))]
    for _ in range(20):
        rng.shuffle(rows)
        result = group_advantages(
            [groups[name][i] for name, i in rows], [name for name, _ in rows], kind=kind
        )
        assert result.advantages == pytest.approx([alone[name][i] for name, i in rows], abs=1e-12)


@pytest.mark.catalogue("B11")
def test_a_filtered_episode_leaves_no_trace():
    kept = group_advantages([0.0, 1.0, 1.0], ["a"] * 3)
    never = group_advantages([0.0, 1.0, 1.0, 9.0, 8.0], ["a", "a", "a", "gone", "gone"])
    assert never.advantages[:3] == kept.advantages


@pytest.mark.parametrize("reward", [math.nan, math.inf])
def test_a_reward_that_is_not_finite_is_refused_by_its_group(reward):
    with pytest.raises(ValueError, match="group 'b'"):
        group_advantages([0.0, 1.0, reward, 1.0], ["a", "a", "b", "b"])
