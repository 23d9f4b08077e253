"""Episodes that branch: each sampled token is worth the mean of the leaves that contain it."""

from __future__ import annotations

import statistics
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from polyturn.configs.schema.algorithm import GroupAdvantage, TreeAdvantage
from polyturn.trainer.algorithms.advantages import RewardBatch, RewardPart, TokenColumns
from polyturn.trainer.algorithms.group_advantages import grpo
from polyturn.trainer.algorithms.tree_advantages import tree_grpo
from polyturn.trainer.battery import steps
from polyturn.trainer.battery.rewards import trained

CONFIG = TreeAdvantage(kind="tree_grpo")


def part(name, reward, turns, *, parent="", branch_turn=0, group="g"):
    """Two tokens of each turn from `branch_turn` on, behind three that were not sampled."""
    own = [turn for turn in range(branch_turn, turns) for _ in range(2)]
    columns = TokenColumns(
        sampled=np.array([False] * 3 + [True] * len(own)),
        turns=np.array([0] * 3 + own, dtype=np.int16),
    )
    return RewardPart(
        part_id=name,
        group_id=group,
        reward=reward,
        samples=(columns,),
        parent_id=parent,
        branch_turn=branch_turn,
    )


def by_turn(step, config=CONFIG):
    """The advantage of each turn of each part; the tokens of a turn have the same."""
    found = {}
    for each, values in zip(step.parts, trained(step, tree_grpo(step, config)), strict=True):
        (sample,) = each.samples
        turns = sample.turns[sample.sampled]
        for turn in np.unique(turns):
            (value,) = np.unique(values[turns == turn])
            found[each.part_id, int(turn)] = float(value)
    return found


def test_the_worked_example():
    """Two trees of two leaves and one leaf alone, by hand."""
    step = RewardBatch(
        parts=(
            part("a", 1.0, 3),
            part("b", 0.0, 4, parent="a", branch_turn=2),
            part("c", 0.0, 2),
            part("d", 0.0, 3, parent="c", branch_turn=1),
            part("e", 1.0, 1),
        )
    )
    std = statistics.stdev([1, 0, 0, 0, 1])
    high, low, within = 0.6 / std, -0.4 / std, 0.5 / statistics.stdev([1, 0])
    found = by_turn(step)
    shared = (high + within + low - within) / 2
    assert found["a", 0] == found["a", 1] == pytest.approx(shared, abs=1e-5)
    assert found["a", 2] == pytest.approx(high + within, abs=1e-5)
    assert found["b", 2] == found["b", 3] == pytest.approx(low - within, abs=1e-5)
    assert found["c", 0] == found["c", 1] == found["d", 2] == pytest.approx(low, abs=1e-5), (
        "leaves that agree"
    )
    assert found["e", 0] == pytest.approx(high, abs=1e-5)
    assert ("b", 0) not in found and ("d", 0) not in found, "what is the trunk's is trained on there"
    metrics = tree_grpo(step, CONFIG).metrics
    assert (metrics["tree/num"], metrics["tree/num_branches"], metrics["tree/leaves_max"]) == (3, 2, 2)
    assert metrics["tree/num_uniform"] == 1
    halved = by_turn(step, CONFIG.model_copy(update={"tree_weight": 0.5}))
    assert halved["a", 2] == pytest.approx(high + within / 2, abs=1e-5)


@st.composite
def groups(draw):
    """Groups of random trees, branches of branches among them, in any order."""
    parts = []
    for group in range(draw(st.integers(1, 3))):
        members = []
        for index in range(draw(st.integers(1, 6))):
            reward = draw(st.sampled_from([0.0, 0.5, 1.0]))
            turns = draw(st.integers(1, 4))
            parent = draw(st.sampled_from([None, *[m for m in members if m[2] > 1]]))
            name = f"{group}.{index}"
            if parent is None:
                members.append((name, 0, turns))
                parts.append(part(name, reward, turns, group=str(group)))
            else:
                at = draw(st.integers(1, parent[2] - 1))
                members.append((name, at, at + turns))
                parts.append(
                    part(name, reward, at + turns, parent=parent[0], branch_turn=at, group=str(group))
                )
    return RewardBatch(parts=tuple(draw(st.permutations(parts))))


def paths(step):
    """Of each part, the turns of itself and of those before it that its episode consists of."""
    by_id = {each.part_id: each for each in step.parts}

    def turns_of(each, end):
        above = turns_of(by_id[each.parent_id], each.branch_turn) if each.parent_id else []
        own = sorted(set(each.samples[0].turns[each.samples[0].sampled].tolist()))
        return [*above, *((each.part_id, turn) for turn in own if turn < end)]

    return {each.part_id: turns_of(each, 10**6) for each in step.parts}


@settings(max_examples=60, deadline=None)
@given(groups())
def test_a_turn_is_worth_the_mean_of_the_episodes_that_contain_it(step):
    found = by_turn(step)
    members = paths(step)
    trees = {name: members[name][0][0] for name in members}
    reward = {each.part_id: each.reward for each in step.parts}

    def normal(name, others):
        values = [reward[other] for other in others]
        if len(set(values)) < 2:
            return 0.0
        return (reward[name] - statistics.mean(values)) / (statistics.stdev(values) + CONFIG.epsilon)

    leaf = {}
    for each in step.parts:
        group = [other.part_id for other in step.parts if other.group_id == each.group_id]
        tree = [name for name in group if trees[name] == trees[each.part_id]]
        leaf[each.part_id] = normal(each.part_id, group) + normal(each.part_id, tree)
    for turn, value in found.items():
        containing = [leaf[name] for name, path in members.items() if turn in path]
        assert value == pytest.approx(statistics.mean(containing), abs=2e-5)
    assert set(found) == {turn for path in members.values() for turn in path}


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 10**6))
def test_without_branches_it_is_grpo(seed):
    step = steps.random_step(seed)
    ours, theirs = tree_grpo(step, CONFIG), grpo(step, GroupAdvantage())
    for one, other in zip(trained(step, ours), trained(step, theirs), strict=True):
        assert one.tolist() == other.tolist()
    assert ours.trainable == theirs.trainable


def test_branches_of_a_trunk_that_is_not_there_are_one_tree():
    """As where it was truncated, and truncated episodes are dropped."""
    branches = [part(name, reward, 3, parent="gone", branch_turn=1) for name, reward in (("b", 1), ("c", 0))]
    other = part("d", 0.0, 2)
    found = by_turn(RewardBatch(parts=(*branches, other)))
    same = by_turn(RewardBatch(parts=(replace(branches[0], parent_id="", branch_turn=0), branches[1], other)))
    assert found["b", 1] > same["b", 1], "with a tree of two leaves it has an advantage within it"
