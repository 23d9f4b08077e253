"""The plug-ins of examples/algorithms: under the battery, by hand, and in the places where training calls them."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from polyturn.configs.loading.loader import load_config
from polyturn.configs.schema.algorithm import AlgorithmConfig
from polyturn.envs.plugins import load_plugin
from polyturn.trainer.algorithms.advantages import RewardBatch
from polyturn.trainer.algorithms.objective import Objective, evaluate_objective
from polyturn.trainer.algorithms.registry import (
    ADVANTAGES,
    CORRECTIONS,
    POLICY_LOSSES,
    REDUCERS,
    REWARD_POSTPROCESSORS,
    Registry,
)
from polyturn.trainer.battery import checks, run_check, steps
from polyturn.trainer.battery.rows import count, random_rows, to_batch
from polyturn.trainer.battery.token_losses import evaluate
from polyturn.trainer.battery.token_weights import correct
from polyturn.trainer.credit.estimates import estimate_advantages, make_samples

FOLDER = Path(__file__).resolve().parents[4] / "examples" / "algorithms"
LOSS = f"{FOLDER / 'loss.py'}:simple_policy_optimization"
ADVANTAGE = f"{FOLDER / 'advantage.py'}:rank_in_group"
REWARD = f"{FOLDER / 'reward.py'}:TokenPrice"
CORRECTION = f"{FOLDER / 'correction.py'}:tempered"
REDUCTION = f"{FOLDER / 'reduction.py'}:root_length"
PLUGINS: list[tuple[Registry[Any], str, dict[str, Any], dict[str, Any]]] = [
    (POLICY_LOSSES, LOSS, {"epsilon": 0.3}, {"loss": "on_policy_gradient"}),
    (ADVANTAGES, ADVANTAGE, {}, {"loss": "biased"}),
    (REWARD_POSTPROCESSORS, REWARD, {"per_thousand": 2.0}, {}),
    (CORRECTIONS, CORRECTION, {"power": 0.7}, {}),
    (REDUCERS, REDUCTION, {"power": 0.5}, {}),
]


@pytest.mark.parametrize(
    ("registry", "target", "options", "claims", "check"),
    [
        pytest.param(registry, target, options, claims, check, id=f"{target.rpartition(':')[2]}-{check}")
        for registry, target, options, claims in PLUGINS
        for check in checks(registry, claims)
    ],
)
def test_examples_pass(
    registry: Registry[Any], target: str, options: dict[str, Any], claims: dict[str, Any], check: str
) -> None:
    run_check(registry, check, target, options, gradients=claims)


def test_the_recipe_of_all_five_is_sound(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(FOLDER.parents[1])
    algorithm = load_config(FOLDER / "recipe.yaml").trainer.algorithm
    for registry, section in (
        (POLICY_LOSSES, algorithm.loss),
        (ADVANTAGES, algorithm.advantage),
        (REWARD_POSTPROCESSORS, algorithm.reward_shaping),
        (CORRECTIONS, algorithm.corrections[0]),
        (REDUCERS, algorithm.reduction),
    ):
        load_plugin(registry.signature, section.target, section.options)


def test_spo_turns_back_beyond_its_best_ratio() -> None:
    loss = load_plugin(POLICY_LOSSES.signature, LOSS, {"epsilon": 0.2})
    (row,) = random_rows(0, lengths=(5,))
    ratios = torch.tensor([0.7, 1.0, 1.1, 1.2, 1.3], dtype=torch.float64)
    ones = torch.ones(5, dtype=torch.float64)
    row = row.having(
        proximal_logprobs=row.columns["logprobs"] - ratios.log(), advantages=2 * ones, cotangents=ones
    )
    row = row.map(lambda column: torch.ones_like(column) if column.dtype == torch.bool else column)
    found = evaluate(loss, [row])
    assert found.columns["value"][0].tolist() == pytest.approx(
        [-(2 * r - 5 * (r - 1) ** 2) for r in ratios.tolist()], abs=1e-9
    )
    slopes = [-r * (2 - 10 * (r - 1)) for r in ratios.tolist()]
    assert found.columns["gradient by logprobs"][0].tolist() == pytest.approx(slopes, abs=1e-9)
    assert found.columns["clipped"][0].tolist() == [False, False, False, False, True]


def test_ranks_do_not_see_scales() -> None:
    step = steps.random_step(0, sizes={"g": 4})
    parts = [
        replace(part, reward=reward) for part, reward in zip(step.parts, [0.0, 1e6, 1.0, 1.0], strict=True)
    ]
    batch = RewardBatch(parts=tuple(parts))
    result = load_plugin(ADVANTAGES.signature, ADVANTAGE)(batch)
    assert result.mean(batch) == pytest.approx([-1.0, 1.0, 0.0, 0.0])


def test_tempering_is_between_nothing_and_truncated_importance() -> None:
    rows = random_rows(3)
    none, half, full = (
        torch.cat(correct(load_plugin(CORRECTIONS.signature, CORRECTION, {"power": power}), rows)[0])
        for power in (0.0, 0.5, 1.0)
    )
    mask = torch.cat([row.mask for row in rows])
    assert (none[mask] == 1).all()
    inside = mask & (full < 2.0)
    torch.testing.assert_close(half[inside].square(), full[inside])


def test_a_price_is_for_those_who_earned() -> None:
    step = steps.random_step(0, sizes={"g": 2})
    price = load_plugin(REWARD_POSTPROCESSORS.signature, REWARD, {"per_thousand": 100.0, "above": 0.5})
    lengths = [part.num_trainable for part in step.parts]
    assert list(price([1.0, 0.25], step.parts)) == pytest.approx([1 - lengths[0] / 10, 0.25])
    with pytest.raises(ValueError, match="not negative"):
        load_plugin(REWARD_POSTPROCESSORS.signature, REWARD, {"per_thousand": -1.0})


def test_a_step_is_estimated_with_plugins(make_episode) -> None:
    algorithm = AlgorithmConfig.model_validate(
        {
            "reward_shaping": {"kind": "plugin", "target": REWARD, "options": {"per_thousand": 100.0}},
            "advantage": {"kind": "plugin", "target": ADVANTAGE},
        }
    )
    # Equal rewards, but the longer answer costs more.
    episodes = [
        make_episode("g", 0, 1.0, num_sampled=6),
        make_episode("g", 1, 1.0, num_sampled=3),
        make_episode("g", 2, 0.0, num_sampled=3),
    ]
    scored = {sample.sample_id: sample for sample in make_samples(episodes)}
    result = estimate_advantages(episodes, scored, algorithm)
    assert result.advantages == pytest.approx({"g.0.0": 0.0, "g.1.0": 1.0, "g.2.0": -1.0})


def test_an_update_is_evaluated_with_plugins() -> None:
    algorithm = AlgorithmConfig.model_validate(
        {
            "loss": {"kind": "plugin", "target": LOSS, "options": {"epsilon": 0.5}},
            "reduction": {"kind": "plugin", "target": REDUCTION},
        }
    )
    rows = random_rows(5)
    counts = count(rows)
    batch = to_batch(rows, counts)
    result = evaluate_objective(batch, Objective.from_config(algorithm, temperature=1.0), counts)
    values = torch.cat(
        evaluate(load_plugin(POLICY_LOSSES.signature, LOSS, {"epsilon": 0.5}), rows).columns["value"]
    )
    assert batch.correction_weights is not None
    expected = sum(
        float(value * weight) / (counts.num_sequences * math.sqrt(length))
        for value, weight, length, kept in zip(
            values, batch.correction_weights, batch.sequence_lengths.tolist(), batch.mask, strict=True
        )
        if kept
    )
    assert result.loss.item() == pytest.approx(expected, rel=1e-5)
    result.loss.backward()
    assert batch.logprobs.grad is not None and batch.logprobs.grad[batch.mask].all()
