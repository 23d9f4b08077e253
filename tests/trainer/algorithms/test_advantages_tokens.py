"""Advantages token by token and turn by turn: closed forms, and that observations are not there."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import TypeAdapter

from polyturn.configs.schema.algorithm import Advantage
from polyturn.trainer.algorithms.advantages import RewardBatch, RewardPart, TokenColumns
from polyturn.trainer.algorithms.registry import ADVANTAGES, bind

KINDS = [entry.name for entry in ADVANTAGES if entry.name != "plugin"]


def columns(mask, *, turns=None, values=None, penalties=None):
    """One sample: `mask` as a string such as `0110011`."""
    sampled = np.array([sign == "1" for sign in mask])
    if turns is None:  # a turn is a run of sampled tokens, and what precedes it
        ends = np.append(sampled[:-1] & ~sampled[1:], False)
        turns = np.append(0, np.cumsum(ends)[:-1])

    def column(given):
        return None if given is None else np.array(given, dtype=np.float32)

    return TokenColumns(
        sampled=sampled,
        turns=np.array(turns, dtype=np.int32),
        values=column(values),
        penalties=column(penalties),
    )


def part(*samples, reward=1.0, group="a", name="p", **fields):
    return RewardPart(part_id=name, group_id=group, reward=reward, samples=samples, **fields)


def estimate(kind, *parts, **options):
    config = TypeAdapter(Advantage).validate_python({"kind": kind, **options})
    return bind(ADVANTAGES, config)(RewardBatch(parts=parts))


def first(found, number=0):
    return found.columns[number][0].tolist()


@pytest.mark.catalogue("B1")
def test_a_return_does_not_stop_at_an_observation():
    found = estimate("reinforce_plus_plus", part(columns("110011")), whiten=False)
    assert first(found) == [1, 1, 0, 0, 1, 1]
    discounted = estimate("reinforce_plus_plus", part(columns("110011")), whiten=False, gamma=0.5)
    assert first(discounted) == [0.125, 0.25, 0, 0, 0.5, 1]


def test_penalties_are_paid_token_by_token():
    sample = columns("01011", penalties=[9, 0.5, 9, 0.25, 1.0])
    found = estimate("reinforce_plus_plus", part(sample), whiten=False)
    assert first(found) == [0, 1 - 1.75, 0, 1 - 1.25, 1 - 1.0]
    lone = part(columns("01011"), reward=0.0, name="q")
    compared = estimate("reinforce_plus_plus_baseline", part(sample), lone, whiten=False)
    assert first(compared) == [0, 0.5 - 1.75, 0, 0.5 - 1.25, 0.5 - 1.0]
    # What compares whole episodes takes their sum.
    assert first(estimate("rloo", part(sample), lone)) == [0, -0.75, 0, -0.75, -0.75]


def test_reinforce_plus_plus_is_whitened_over_all_tokens():
    parts = [part(columns("01"), reward=3.0), part(columns("0111"), reward=0.0, name="q", group="b")]
    found = estimate("reinforce_plus_plus", *parts)
    tokens = np.array([3.0, 0, 0, 0])
    expected = (tokens - tokens.mean()) / tokens.std(ddof=1)
    assert first(found)[1:] + first(found, 1)[1:] == pytest.approx(expected.tolist(), abs=1e-6)
    assert found.trainable == (True, True)


def reference_gae(mask, values, rewards, gamma, decay):
    """As it is written down: backwards, and on masked tokens nothing but carry."""
    next_value, last, found = 0.0, 0.0, [0.0] * len(mask)
    for t in reversed(range(len(mask))):
        if mask[t] == "1":
            delta = rewards[t] + gamma * next_value - values[t]
            last = delta + gamma * decay * last
            next_value = values[t]
            found[t] = last
    return found


@pytest.mark.catalogue("B2")
def test_gae_does_not_see_observations():
    mask, values = "110011", [0.5, 0.6, 9.0, -9.0, 0.7, 0.8]
    options = {"gamma": 0.9, "gae_lambda": 0.8, "whiten": False}
    found = estimate("ppo_gae", part(columns(mask, values=values)), **options)
    expected = reference_gae(mask, values, [0, 0, 0, 0, 0, 1], 0.9, 0.8)
    assert first(found) == pytest.approx(expected, abs=1e-6)
    moved = [value if sign == "1" else 1e9 for sign, value in zip(mask, values, strict=True)]
    assert first(estimate("ppo_gae", part(columns(mask, values=moved)), **options)) == first(found)
    assert found.returns is not None
    targets = [a + v if sign == "1" else 0 for sign, a, v in zip(mask, expected, values, strict=True)]
    assert found.returns[0][0].tolist() == pytest.approx(targets, abs=1e-6)


def test_gae_by_turn_discounts_between_turns_only():
    values = [0, 0.5, 0.25, 0, 0.75, 0.5]
    sample = columns("011011", values=values)
    options = {"gamma": 0.5, "gae_lambda": 0.5, "whiten": False, "per": "turn"}
    found = first(estimate("ppo_gae", part(sample), **options))
    last = 1.0 - 0.5
    third = 0.5 - 0.75 + last
    second = 0.5 * 0.75 - 0.25 + 0.25 * third
    assert found == pytest.approx([0, 0.25 - 0.5 + second, second, 0, third, last], abs=1e-6)


def test_gae_pays_turns_at_their_ends_and_lambda_may_go_by_length():
    sample = columns("011011", values=[0] * 6)
    paid = part(sample, reward=1.5, turn_rewards=(0.5, 1.0))
    assert first(estimate("ppo_gae", paid, gae_lambda=1, whiten=False)) == [0, 1.5, 1.5, 0, 1, 1]
    assert first(estimate("ppo_gae", paid, gae_lambda=0, whiten=False)) == [0, 0, 0.5, 0, 0, 1]
    at_end = estimate("ppo_gae", paid, gae_lambda=0, whiten=False, pay_turns=False)
    assert first(at_end) == [0, 0, 0, 0, 0, 1.5]
    # alpha = 1/2 and four tokens: lambda is 1 - 1 / 2.
    adaptive = estimate("ppo_gae", paid, length_adaptive=0.5, whiten=False, pay_turns=False)
    assert first(adaptive) == pytest.approx([0, 1.5 / 8, 1.5 / 4, 0, 1.5 / 2, 1.5])


def test_gae_without_a_critic_is_refused():
    with pytest.raises(ValueError, match="needs a critic"):
        estimate("ppo_gae", part(columns("011")))


@pytest.mark.catalogue("B10")
def test_turns_with_all_reward_at_the_end_are_the_trajectory():
    parts = [part(columns("0110110"), reward=r, name=str(r)) for r in (1.0, 0.0, 0.25)]
    for scale, whole in (("std", "grpo"), ("none", "dr_grpo")):
        by_turn, by_episode = estimate("turn_level", *parts, scale=scale), estimate(whole, *parts)
        for left, right in zip(by_turn.columns, by_episode.columns, strict=True):
            np.testing.assert_allclose(left[0], right[0], atol=1e-6)


def test_each_turn_is_compared_with_the_same_turn_of_the_group():
    parts = [
        part(columns("0101"), reward=3.0, turn_rewards=(1.0, 2.0)),
        part(columns("0101"), reward=1.0, turn_rewards=(1.0, 0.0), name="q"),
        part(columns("01"), reward=2.0, turn_rewards=(2.0,), name="r"),
    ]
    found = estimate("turn_level", *parts, scale="none", gamma=0.5)
    # Returns of the first turn: 2, 1, 2; of the second: 2, 0.
    assert first(found) == pytest.approx([0, 1 / 3, 0, 1])
    assert first(found, 1) == pytest.approx([0, -2 / 3, 0, -1])
    assert first(found, 2) == pytest.approx([0, 1 / 3])


def test_a_turn_that_one_episode_reached_is_compared_with_the_last_shared_one():
    parts = [part(columns("010101"), reward=1.0), part(columns("01"), reward=0.0, name="q")]
    found = estimate("turn_level", *parts, scale="none")
    assert first(found) == [0, 0.5, 0, 0.5, 0, 0.5]


def test_turns_that_do_not_differ_are_a_uniform_group():
    parts = [part(columns("0101"), turn_rewards=(0.0, 1.0)), part(columns("01"), name="q")]
    found = estimate("turn_level", *parts, uniform="drop")
    assert found.trainable == (False, False) and found.metrics["group/num_uniform"] == 1


def test_gigpo_compares_steps_from_one_state():
    parts = [
        part(columns("0101"), reward=1.0, anchors=("start", "door")),
        part(columns("0101"), reward=0.0, anchors=("start", "wall"), name="q"),
        part(columns("0101"), reward=0.5, anchors=("start", "door"), name="r"),
    ]
    found = estimate("gigpo", *parts, scale="none", gamma=0.5, step_weight=2.0)
    # Episodes: +-0.5 and 0. First steps: returns 0.5, 0, 0.25. Steps at the door: 1 and 0.5.
    assert first(found) == pytest.approx([0, 0.5 + 2 * 0.25, 0, 0.5 + 2 * 0.25])
    assert first(found, 1) == pytest.approx([0, -0.5 - 2 * 0.25, 0, -0.5])
    assert first(found, 2) == pytest.approx([0, 0, 0, -2 * 0.25])
    assert found.metrics["gigpo/num_states"] == 3
    assert found.metrics["gigpo/compared_fraction"] == pytest.approx(5 / 6)


@pytest.mark.catalogue("B8")
def test_states_are_told_apart_by_their_group():
    one = [part(columns("01"), reward=r, anchors=("start",), name=str(r)) for r in (1.0, 0.0)]
    other = [part(columns("01"), reward=r, anchors=("start",), name=str(r), group="b") for r in (5.0, 9.0)]
    alone = estimate("gigpo", *one)
    together = estimate("gigpo", *one, *other)
    assert [first(together, i) for i in range(2)] == [first(alone, i) for i in range(2)]
    assert together.metrics["gigpo/num_states"] == 2


def test_gigpo_without_states_is_grpo():
    parts = [part(columns("0101"), reward=r, name=str(r)) for r in (1.0, 0.0, 0.5)]
    assert [first(estimate("gigpo", *parts), i) for i in range(3)] == [
        first(estimate("grpo", *parts), i) for i in range(3)
    ]


def test_segments_of_an_episode_are_read_in_the_order_of_their_turns():
    whole = part(columns("01111", turns=[0, 0, 1, 2, 3]))
    # Turns 1 and 2 were taken in a branch that is a segment of its own.
    split = part(columns("0101", turns=[0, 0, 3, 3]), columns("0011", turns=[0, 0, 1, 2]))
    options = {"gamma": 0.5, "whiten": False}
    left = estimate("reinforce_plus_plus", whole, **options).columns[0][0]
    one, two = estimate("reinforce_plus_plus", split, **options).columns[0]
    assert [one[1], two[2], two[3], one[3]] == left[1:].tolist()


@st.composite
def steps(draw):
    """Parts of a few groups with observations in between, and the same parts with the observations deleted."""
    whole, short = [], []
    for index in range(draw(st.integers(1, 5))):
        num_turns = draw(st.integers(1, 3))
        sampled, turns = [False], [0]
        for turn in range(num_turns):
            for sign, count in ((False, draw(st.integers(0, 3))), (True, draw(st.integers(1, 3)))):
                sampled += [sign] * count
                turns += [turn] * count
        mask = np.array(sampled)
        numbers = st.lists(st.floats(-2, 2, width=16), min_size=len(mask), max_size=len(mask))
        values, penalties = (np.array(draw(numbers), dtype=np.float32) for _ in range(2))
        garbage = draw(st.sampled_from([np.nan, 1e9, -np.inf]))
        turn_rewards = tuple(
            draw(st.lists(st.floats(-1, 1, width=16), min_size=num_turns, max_size=num_turns))
        )
        common = {
            "name": str(index),
            "group": draw(st.sampled_from("ab")),
            "reward": sum(turn_rewards),
            "turn_rewards": turn_rewards,
            "anchors": tuple(draw(st.lists(st.sampled_from("xyz"), min_size=num_turns, max_size=num_turns))),
            "reward_parts": {"x": turn_rewards[0], "y": 1.0},
        }
        for kept, parts in ((np.ones_like(mask), whole), (mask | (np.arange(len(mask)) == 0), short)):
            parts.append(
                part(
                    TokenColumns(
                        sampled=mask[kept],
                        turns=np.array(turns, dtype=np.int32)[kept],
                        values=np.where(mask, values, garbage)[kept].astype(np.float32),
                        penalties=np.where(mask, penalties, garbage)[kept].astype(np.float32),
                    ),
                    **common,
                )
            )
    return whole, short


def payable(kind, parts):
    """The parts with rewards that the kind can take."""
    if kind != "maxrl":
        return parts
    return [replace(part, reward=abs(part.reward), turn_rewards=()) for part in parts]


@pytest.mark.catalogue("B1", "B2")
@pytest.mark.parametrize("kind", KINDS)
@given(case=steps())
@settings(max_examples=12, deadline=None)
def test_deleting_masked_tokens_changes_nothing(kind, case):
    whole, short = (payable(kind, parts) for parts in case)
    left, right = estimate(kind, *whole), estimate(kind, *short)
    assert left.trainable == right.trainable
    assert dict(left.metrics) == pytest.approx(dict(right.metrics))
    pairs = [(left.columns, right.columns)]
    if left.returns is not None:
        pairs.append((left.returns, right.returns))
    for one, other in pairs:
        for i, (a, b) in enumerate(zip(one, other, strict=True)):
            np.testing.assert_array_equal(
                a[0][whole[i].samples[0].sampled], b[0][short[i].samples[0].sampled]
            )
            assert not a[0][~whole[i].samples[0].sampled].any()


@pytest.mark.catalogue("B7")
@pytest.mark.parametrize("kind", KINDS)
@given(case=steps(), order=st.randoms(use_true_random=False))
@settings(max_examples=8, deadline=None)
def test_the_order_of_episodes_changes_nothing(kind, case, order):
    parts = payable(kind, case[0])
    places = list(range(len(parts)))
    order.shuffle(places)
    left, right = estimate(kind, *parts), estimate(kind, *[parts[i] for i in places])
    for number, i in enumerate(places):
        np.testing.assert_allclose(right.columns[number][0], left.columns[i][0], atol=1e-4)


def test_a_long_step_is_worked_off_at_once():
    rng = np.random.default_rng(0)
    lengths = rng.integers(1, 3000, size=64)
    parts = [part(columns("0" + "1" * int(n)), reward=float(n), name=str(n)) for n in lengths]
    found = estimate("reinforce_plus_plus", *parts, gamma=0.999, whiten=False)
    for n, (column,) in zip(lengths, found.columns, strict=True):
        np.testing.assert_allclose(column[1:], n * 0.999 ** np.arange(n - 1, -1, -1.0), rtol=1e-5)
