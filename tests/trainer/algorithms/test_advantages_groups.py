"""Advantages of whole episodes: closed forms, stated policies, and what they must not depend on."""

from __future__ import annotations

import math
import random

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import TypeAdapter

from polyturn.configs.schema.algorithm import Advantage
from polyturn.trainer.algorithms.advantages import RewardBatch, RewardPart, TokenColumns
from polyturn.trainer.algorithms.registry import ADVANTAGES, bind

GROUPED = ("grpo", "dr_grpo", "rloo", "gpg", "opo", "maxrl", "gdpo")


def part(reward, group="a", *, length=2, name="", **fields):
    sampled = np.array([False] + [True] * length)
    columns = TokenColumns(sampled=sampled, turns=np.zeros(length + 1, dtype=np.int32))
    return RewardPart(
        part_id=name or f"{group}/{reward}",
        group_id=group,
        reward=reward,
        samples=(columns,) if length else (),
        **fields,
    )


def estimate(kind, parts, **options):
    config = TypeAdapter(Advantage).validate_python({"kind": kind, **options})
    return bind(ADVANTAGES, config)(RewardBatch(parts=tuple(parts)))


def advantages(kind, rewards, group_ids=None, *, lengths=None, **options):
    group_ids = group_ids or ["a"] * len(rewards)
    lengths = lengths or [2] * len(rewards)
    parts = [
        part(reward, group, length=length)
        for reward, group, length in zip(rewards, group_ids, lengths, strict=True)
    ]
    found = estimate(kind, parts, **options)
    return [float(columns[0][1]) if columns else 0.0 for columns in found.columns]


def test_grpo_is_the_standard_score_with_bessels_correction():
    rewards = [0.0, 1.0, 0.25, 3.0]
    values = torch.tensor(rewards, dtype=torch.float64)
    expected = (values - values.mean()) / (values.std(correction=1) + 1e-6)
    assert advantages("grpo", rewards) == pytest.approx(expected.tolist(), abs=1e-6)


def test_dr_grpo_only_centres_and_rloo_leaves_the_episode_out():
    rewards = [1.0, 0.0, 0.0, 0.5]
    assert advantages("dr_grpo", rewards) == [0.625, -0.375, -0.375, 0.125]
    others = [r - (sum(rewards) - r) / 3 for r in rewards]
    assert advantages("rloo", rewards) == pytest.approx(others, abs=1e-6)


def test_opo_weighs_the_baseline_by_length():
    found = advantages("opo", [1.0, 0.0], lengths=[1, 3])
    assert found == [0.75, -0.25]


def test_gpg_makes_up_for_uniform_groups():
    rewards, groups = [1.0, 0.0, 1.0, 1.0, 7.0], ["a", "a", "flat", "flat", "alone"]
    # Four episodes are compared with others, two of them in a group that tells something.
    assert advantages("gpg", rewards, groups) == [1.0, -1.0, 0.0, 0.0, 0.0]


def test_maxrl_divides_by_the_mean_and_has_a_guard():
    assert advantages("maxrl", [1.0, 0.0, 0.0, 0.0]) == [3.0, -1.0, -1.0, -1.0]
    found = estimate("maxrl", [part(1e-7), part(0.0), part(0.0, "b"), part(0.0, "b")])
    assert all(not column.any() for columns in found.columns for column in columns)
    assert (found.metrics["group/num_low_mean"], found.metrics["group/num_uniform"]) == (1, 1)
    with pytest.raises(ValueError, match=r"maxrl: 'a/-1\.0' of group 'a' has the reward -1\.0"):
        estimate("maxrl", [part(-1.0), part(3.0)])


def test_gdpo_normalises_each_part_of_the_reward_by_itself():
    rows = [{"right": 1.0, "style": 0.01}, {"right": 0.0, "style": 0.03}, {"right": 0.0, "style": 0.02}]
    parts = [part(0.0, reward_parts=row, name=str(i)) for i, row in enumerate(rows)]
    found = estimate("gdpo", parts, normalize_batch=False, weights={"right": 1.0, "style": 2.0})
    right = (np.array([1, 0, 0]) - 1 / 3) / np.std([1, 0, 0], ddof=1)
    style = np.array([-1.0, 1.0, 0.0])
    assert [columns[0][1] for columns in found.columns] == pytest.approx(right + 2 * style, abs=1e-3)


def test_gdpo_normalises_over_episodes_not_tokens_and_names_the_parts_there_are():
    rows = [({"right": 1.0}, 1), ({"right": 0.0}, 9), ({"right": 0.0}, 2)]
    parts = [part(0.0, reward_parts=row, length=n, name=str(i)) for i, (row, n) in enumerate(rows)]
    values = [float(columns[0][1]) for columns in estimate("gdpo", parts).columns]
    assert np.mean(values) == pytest.approx(0, abs=1e-6) and np.std(values, ddof=1) == pytest.approx(
        1, abs=1e-4
    )
    with pytest.raises(ValueError, match="did you mean 'right'"):
        estimate("gdpo", parts, weights={"rihgt": 1.0})


def test_gdpo_without_parts_takes_the_reward():
    assert advantages("gdpo", [1.0, 0.0, 0.25], normalize_batch=False) == advantages("grpo", [1.0, 0.0, 0.25])


@pytest.mark.catalogue("B3")
@pytest.mark.parametrize("kind", ["grpo", "gdpo"])
def test_noise_in_the_rewards_is_not_blown_up(kind):
    rewards = [1.0, 1.0, 1.0, 1.0 + 1e-5]
    found = estimate(kind, [part(reward) for reward in rewards], min_spread=1e-4)
    assert not any(column.any() for columns in found.columns for column in columns)
    if kind == "grpo":
        assert (found.metrics["group/num_uniform"], found.metrics["group/num_near_uniform"]) == (0, 1)
    assert max(advantages(kind, rewards, min_spread=0.0)) > 1


@pytest.mark.parametrize("reward", [0.1, 1 / 3, 1e6])
@pytest.mark.parametrize("kind", GROUPED)
def test_equal_rewards_give_exactly_zero(kind, reward):
    assert advantages(kind, [reward] * 7) == [0.0] * 7


@pytest.mark.catalogue("B4")
@pytest.mark.parametrize("kind", GROUPED)
def test_an_episode_alone_in_its_group_does_what_the_config_says(kind):
    parts = [part(1.0), part(5.0, "alone"), part(0.0)]
    for policy, trainable in (("drop", False), ("zero", True)):
        found = estimate(
            kind, parts, singletons=policy, **({"normalize_batch": False} if kind == "gdpo" else {})
        )
        assert not found.columns[1][0].any()
        assert found.trainable == (True, trainable, True)
        assert (found.metrics["group/num_compared"], found.metrics["group/num_singleton"]) == (2, 1)
        assert found.metrics["group/num_ragged"] == 1
    others = estimate(
        kind, parts, singletons="batch_mean", **({"normalize_batch": False} if kind == "gdpo" else {})
    )
    assert others.columns[1][0][1] == 4.5 and others.trainable[1]


@pytest.mark.parametrize("kind", GROUPED)
def test_a_uniform_group_may_leave_the_batch(kind):
    parts = [part(1.0), part(0.0), part(1.0, "flat"), part(1.0, "flat")]
    assert estimate(kind, parts, uniform="zero").trainable == (True,) * 4
    found = estimate(kind, parts, uniform="drop")
    assert found.trainable == (True, True, False, False)
    assert found.metrics["group/num_uniform"] == 1


@pytest.mark.catalogue("B5")
@pytest.mark.parametrize("kind", GROUPED)
def test_one_success_of_n_has_the_closed_form_and_grows_with_n(kind):
    found = []
    for n in range(2, 17):
        rewards = [1.0] + [0.0] * (n - 1)
        values = advantages(kind, rewards, **({"normalize_batch": False} if kind == "gdpo" else {}))
        success, failure = {
            "grpo": ((n - 1) / math.sqrt(n), -1 / math.sqrt(n)),
            "gdpo": ((n - 1) / math.sqrt(n), -1 / math.sqrt(n)),
            "rloo": (1.0, -1 / (n - 1)),
            "maxrl": (n - 1, -1.0),
        }.get(kind, ((n - 1) / n, -1 / n))
        assert values[:2] == pytest.approx([success, failure], abs=1e-4)
        found.append(values[0])
    assert found == sorted(found)


@pytest.mark.catalogue("B6", "B7")
@pytest.mark.parametrize("kind", [kind for kind in GROUPED if kind not in ("gpg", "gdpo")])
def test_membership_is_by_id_whatever_the_order_and_the_sizes(kind):
    rng = random.Random(3)
    groups = {"a": [0.0, 1.0, 1.0], "b": [0.0, 1.0, 1.0, 0.5, 0.0], "c": [2.0, 1.0]}
    alone = {name: advantages(kind, rewards) for name, rewards in groups.items()}
    rows = [(name, i) for name, rewards in groups.items() for i in range(len(rewards))]
    for _ in range(20):
        rng.shuffle(rows)
        found = advantages(kind, [groups[name][i] for name, i in rows], [name for name, _ in rows])
        assert found == pytest.approx([alone[name][i] for name, i in rows], abs=1e-6)


@pytest.mark.catalogue("B8")
@pytest.mark.parametrize("kind", GROUPED)
def test_every_token_has_its_episodes_advantage_in_its_own_shape(kind):
    parts = [part(1.0, length=5), part(0.0, length=1), part(0.5, length=0)]
    found = estimate(kind, parts)
    assert [[column.shape for column in columns] for columns in found.columns] == [[(6,)], [(2,)], []]
    assert found.columns[0][0][0] == 0.0 and len(set(found.columns[0][0][1:])) == 1


@pytest.mark.catalogue("B9")
@pytest.mark.parametrize("kind", [kind for kind in GROUPED if kind != "opo"])
def test_the_length_of_an_answer_does_not_change_its_advantage(kind):
    rewards = [1.0, 0.0, 0.25]
    assert advantages(kind, rewards, lengths=[1, 7, 3]) == advantages(kind, rewards)


@pytest.mark.catalogue("B11")
@pytest.mark.parametrize("kind", [kind for kind in GROUPED if kind not in ("gpg", "gdpo")])
def test_another_group_leaves_no_trace(kind):
    kept = advantages(kind, [0.0, 1.0, 1.0])
    assert advantages(kind, [0.0, 1.0, 1.0, 9.0, 8.0], ["a", "a", "a", "b", "b"])[:3] == kept


@pytest.mark.parametrize("reward", [math.nan, math.inf])
@pytest.mark.parametrize("kind", [entry.name for entry in ADVANTAGES if not entry.config.needs_critic])
def test_a_reward_that_is_not_finite_is_refused_by_its_group(kind, reward):
    with pytest.raises(ValueError, match="group 'b'"):
        advantages(kind, [0.0, 1.0, reward, 1.0], ["a", "a", "b", "b"])


@pytest.mark.parametrize("position", range(3))
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_part_or_a_turn_that_is_not_finite_is_refused_wherever_it_stands(value, position):
    numbers = [1.0, 2.0, 3.0]
    numbers[position] = value
    with pytest.raises(ValueError, match=rf"group 'g': {'abc'[position]} of 'p' is {value}"):
        RewardPart(part_id="p", group_id="g", reward=1.0, reward_parts=dict(zip("abc", numbers, strict=True)))
    with pytest.raises(ValueError, match=rf"group 'g': the reward of turn {position} of 'p' is {value}"):
        RewardPart(part_id="p", group_id="g", reward=1.0, turn_rewards=tuple(numbers))


@given(
    st.sampled_from([kind for kind in GROUPED if kind != "maxrl"]),
    st.lists(st.tuples(st.sampled_from("abc"), st.floats(-4, 4, width=16)), min_size=1, max_size=9),
    st.floats(-8, 8, width=16),
)
@settings(max_examples=60, deadline=None)
def test_groups_are_centred_and_a_constant_in_the_reward_changes_nothing(kind, rows, constant):
    groups, rewards = zip(*rows, strict=True)
    found = advantages(kind, rewards, list(groups))
    moved = advantages(kind, [reward + constant for reward in rewards], list(groups))
    assert moved == pytest.approx(found, abs=2e-2 if kind in ("grpo", "gdpo") else 1e-4)
    if kind != "gdpo":
        for group in set(groups):
            total = sum(value for value, name in zip(found, groups, strict=True) if name == group)
            assert total == pytest.approx(0, abs=1e-4)


def test_whitening_is_over_the_tokens_that_are_trained_on():
    parts = [part(1.0, length=4), part(0.0, length=2), part(50.0, "alone", length=3)]
    found = estimate("dr_grpo", parts, whiten=True)
    tokens = np.concatenate([columns[0][1:] for columns in found.columns[:2]])
    assert tokens.mean() == pytest.approx(0, abs=1e-6) and tokens.std(ddof=1) == pytest.approx(1, abs=1e-6)
    flat = estimate("dr_grpo", [part(1.0), part(1.0)], whiten=True)
    assert not any(column.any() for columns in flat.columns for column in columns)
