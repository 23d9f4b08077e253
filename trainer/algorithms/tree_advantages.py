"""Advantages of episodes that branch: what several leaves share is worth what its leaves are worth on average.

The episodes of a group are leaves of trees. A trunk is played from the start; a branch begins with the trunk's turns up
to `branch_turn`, and only what it sampled itself is trained on in it:

    trunk    t0 t1 t2 t3      reward 1
    branch         t2 t3      reward 0, `branch_turn` 2, its t0 and t1 are the trunk's

Both are leaves of the trunk's t0 and t1, so these are worth the mean of the two leaves' advantages; from turn 2 on each
has its own. Each sampled token is trained on once, and a group's statistics count each leaf once.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from polyturn.configs.schema.algorithm import TreeAdvantage
from polyturn.trainer.algorithms.advantages import (
    Advantages,
    Float64,
    Group,
    RewardBatch,
    RewardPart,
    by_outcome,
    finish,
    mean,
    standardize,
    trajectory,
)
from polyturn.trainer.algorithms.registry import ADVANTAGES


@ADVANTAGES.register(
    "tree_grpo",
    formula="A_t = mean over the leaves below t of (grpo within the group + tree_weight grpo within the tree)",
    paper="2509.21240, 2507.19849",
    config=TreeAdvantage,
    gradients={"loss": "biased"},
)
def tree_grpo(step: RewardBatch, config: TreeAdvantage) -> Advantages:
    """Tree-GRPO (arXiv 2509.21240): a leaf's advantage is GRPO's among all leaves of the group (inter-tree) plus GRPO's
    among the leaves of its tree (intra-tree). The paper trains on shared turns once for each leaf; here they are
    trained on once, with the mean, as in the hard estimation of ARPO (arXiv 2507.19849).

    A leaf alone in its tree, or in a tree whose leaves do not differ, has no intra-tree advantage; without branches
    this is GRPO. A trunk that is not in the step, such as one that was dropped, still makes its branches one tree.
    """

    def compare(group: Group) -> list[float]:
        return standardize(group.values, epsilon=config.epsilon)

    inter = by_outcome(step, compare, config=config, min_spread=config.min_spread)
    roots = _roots(step.parts)
    trees = RewardBatch(
        parts=tuple(
            replace(part, group_id=f"{part.group_id}/{root}")
            for part, root in zip(step.parts, roots, strict=True)
        )
    )
    alone_is_nothing = config.model_copy(update={"singletons": "zero"})
    intra = by_outcome(trees, compare, config=alone_is_nothing, min_spread=config.min_spread)
    leaves = [
        whole + config.tree_weight * within
        for whole, within in zip(inter.advantages, intra.advantages, strict=True)
    ]
    sizes = [len(members) for members in trees.groups().values()]
    metrics = {
        **inter.metrics,
        "tree/num": float(len(sizes)),
        "tree/num_branches": float(sum(part.branch_turn > 0 for part in step.parts)),
        "tree/leaves_max": float(max(sizes, default=0)),
        "tree/num_uniform": intra.metrics["group/num_uniform"] + intra.metrics["group/num_near_uniform"],
    }
    return finish(
        step, _by_token(step.parts, leaves), config=config, trainable=inter.trainable, metrics=metrics
    )


def _roots(parts: Sequence[RewardPart]) -> list[str]:
    """By part, the id of its tree: that of the trunk, or of the nearest to it that is known by name."""
    by_id = {part.part_id: part for part in parts}

    def root(part: RewardPart) -> str:
        above = part.part_id
        while part.parent_id:
            above = part.parent_id
            if above not in by_id:
                break
            part = by_id[above]
        return above

    return [root(part) for part in parts]


def _by_token(parts: Sequence[RewardPart], leaves: Sequence[float]) -> list[Float64]:
    """Along each part's trajectory [N], the mean over the leaves below each token."""
    branches: dict[str, list[int]] = {}
    for index, part in enumerate(parts):
        if part.parent_id:
            branches.setdefault(part.parent_id, []).append(index)

    def leaves_of(index: int) -> list[float]:
        behind = branches.get(parts[index].part_id, ())
        return [leaves[index], *(leaf for branch in behind for leaf in leaves_of(branch))]

    found = []
    for index, part in enumerate(parts):
        turns = trajectory(part)[2]
        values = np.full(len(turns), float(leaves[index]))
        behind = branches.get(part.part_id, ())
        for turn in np.unique(turns) if behind else ():
            below = [
                leaf for branch in behind if parts[branch].branch_turn > turn for leaf in leaves_of(branch)
            ]
            values[turns == turn] = mean([leaves[index], *below])
        found.append(values)
    return found
