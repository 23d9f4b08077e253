"""Off-policy corrections by hand, and which combinations are refused."""

from __future__ import annotations

import math
from collections.abc import Sequence

import pytest
import torch
from pydantic import ValidationError

from polyturn.configs.schema import objective as sections
from polyturn.configs.schema.algorithm import AlgorithmConfig
from polyturn.configs.schema.section import Section
from polyturn.trainer.algorithms import corrections  # noqa: F401
from polyturn.trainer.algorithms.protocols import CorrectionWeights
from polyturn.trainer.algorithms.registry import CORRECTIONS, bind

INDEX = [0, 0, 1, 1, 1]


def correct(
    config: Section,
    log_rhos: Sequence[float],
    index: Sequence[int] = INDEX,
    advantages: Sequence[float] | None = None,
) -> CorrectionWeights:
    """Of trainable tokens with these log(proximal / behavior)."""
    proximal = torch.full((len(log_rhos),), -1.0, dtype=torch.float64)
    return bind(CORRECTIONS, config)(
        proximal - torch.tensor(log_rhos, dtype=torch.float64),
        proximal,
        torch.ones(len(log_rhos), dtype=torch.bool),
        torch.tensor(index),
        torch.tensor(advantages or [1.0] * len(log_rhos), dtype=torch.float64),
    )


LOGS = [0.5, 1.0, -0.5, 0.2, 0.0]


@pytest.mark.parametrize(
    ("level", "expected", "clipped"),
    [
        ("token", [math.exp(0.5), 2.0, math.exp(-0.5), math.exp(0.2), 1.0], 1 / 5),
        ("sequence", [2.0, 2.0, *[math.exp(-0.3)] * 3], 2 / 5),
        ("geometric", [2.0, 2.0, *[math.exp(-0.1)] * 3], 2 / 5),
    ],
)
def test_truncated_importance(level, expected, clipped):
    found = correct(sections.TruncatedImportance(kind="truncated_importance", level=level, cap=2.0), LOGS)
    assert found.weights.tolist() == pytest.approx(expected)
    each = expected if level == "token" else [expected[0], expected[2]]
    mean = sum(each) / len(each)
    assert found.metrics == pytest.approx({"clipped_fraction": clipped, "mean_weight": mean})
    assert found.clipped is not None and found.clipped.sum() == clipped * 5


@pytest.mark.parametrize("level", ["token", "sequence", "geometric"])
def test_normalised_weights_have_mean_one(level):
    config = sections.TruncatedImportance(kind="truncated_importance", level=level, normalize=True)
    plain = correct(sections.TruncatedImportance(kind="truncated_importance", level=level), LOGS).weights
    found = correct(config, LOGS).weights
    # Each sequence counts once, however long it is.
    counted = plain if level == "token" else plain[[INDEX.index(sequence) for sequence in sorted(set(INDEX))]]
    torch.testing.assert_close(found, plain / counted.mean())


def test_icepop_rejects_on_both_sides():
    config = sections.IcePop(kind="icepop", low=0.5, high=2.0)
    found = correct(config, [math.log(r) for r in (0.49, 0.51, 1.0, 1.99, 2.01)])
    assert found.weights.tolist() == pytest.approx([0.0, 0.51, 1.0, 1.99, 0.0])
    assert found.metrics == pytest.approx({"rejected_fraction": 0.4, "mean_weight": 0.7})


def test_rejection_by_the_geometric_mean():
    config = sections.GeometricRejection(kind="geometric_rejection")
    found = correct(config, [0.3, -0.295, 0.02, 0.02, 0.0])  # means 1.0025 and 1.0134
    assert found.weights.tolist() == [1, 1, 0, 0, 0]
    assert found.metrics == pytest.approx({"rejected_fraction": 3 / 5, "rejected_sequences": 1 / 2})


def test_rejection_by_an_estimate_of_the_divergence():
    values = {
        "k1": [-0.5, -1.0, 0.5, -0.2, 0.0],
        "k2": [x**2 / 2 for x in LOGS],
        "k3": [math.exp(x) - 1 - x for x in LOGS],
    }
    for estimator, tokens in values.items():
        for how, put_together in (("sum", sum), ("mean", lambda x: sum(x) / len(x)), ("max", max)):
            first, second = put_together(tokens[:2]), put_together(tokens[2:])
            for limit in (first, second):
                if limit <= 0:
                    continue
                config = sections.DivergenceRejection(
                    kind="divergence_rejection", estimator=estimator, over_tokens=how, threshold=limit * 1.001
                )
                kept = [float(first <= limit * 1.001)] * 2 + [float(second <= limit * 1.001)] * 3
                assert correct(config, LOGS).weights.tolist() == kept, (estimator, how)
                tighter = config.model_copy(update={"threshold": limit * 0.999})
                kept = [float(first <= limit * 0.999)] * 2 + [float(second <= limit * 0.999)] * 3
                assert correct(tighter, LOGS).weights.tolist() == kept, (estimator, how)


@pytest.mark.parametrize(
    ("outlier", "kept"), [(math.log(99), 1.0), (math.log(101), 0.0), (math.log(0.9e-4), 0.0)]
)
def test_a_veto_takes_the_whole_sequence(outlier, kept):
    found = correct(sections.Veto(kind="veto"), [0.0, 0.0, outlier, 0.0, 0.0])
    assert found.weights.tolist() == [1, 1, kept, kept, kept]
    assert found.metrics["rejected_sequences"] == (1 - kept) / 2


@pytest.mark.catalogue("B34")
def test_unlikely_sequences_are_masked_where_the_advantage_is_negative():
    config = sections.OffPolicySequenceMask(kind="off_policy_sequence_mask", threshold=0.1)
    logs = [-0.3, 0.0, -0.3, -0.1, 0.2]  # means of -log rho: 0.15 and 0.067
    assert correct(config, logs, advantages=[-1.0] * 5).weights.tolist() == [0, 0, 1, 1, 1]
    assert correct(config, logs, advantages=[1.0] * 5).weights.tolist() == [1] * 5
    # Observations are neither in the mean nor in the fraction.
    long = torch.tensor([True, True, *[False] * 8])
    found = bind(CORRECTIONS, config)(
        torch.where(long, 0.0, 5.0),
        torch.where(long, -0.3, 9.0),
        long,
        torch.zeros(10, dtype=torch.int64),
        torch.full((10,), -1.0),
    )
    assert found.metrics == {"rejected_fraction": 1.0, "rejected_sequences": 1.0}


@pytest.mark.catalogue("B33")
@pytest.mark.parametrize("kind", ["truncated_importance", "icepop"])
@pytest.mark.parametrize(
    "loss",
    [
        {"kind": "clip", "anchor": "behavior"},
        {"kind": "dppo"},
        {"kind": "reinforce"},
        {"kind": "topr"},
        {"kind": "vespo"},
        {"kind": "cispo", "anchor": "behavior"},
    ],
    ids=lambda loss: loss["kind"],
)
def test_the_same_difference_is_not_corrected_twice(kind, loss):
    with pytest.raises(ValidationError, match=r"count twice; take loss\.anchor: proximal"):
        AlgorithmConfig.model_validate({"loss": loss, "corrections": [{"kind": kind}]})
    AlgorithmConfig.model_validate({"loss": {**loss, "anchor": "proximal"}, "corrections": [{"kind": kind}]})


@pytest.mark.catalogue("B33")
def test_two_importance_weights_are_refused_and_rejections_are_not():
    weights = [{"kind": "truncated_importance"}, {"kind": "icepop"}]
    with pytest.raises(
        ValidationError, match="'truncated_importance' and 'icepop' are both importance weights"
    ):
        AlgorithmConfig.model_validate({"corrections": weights})
    rejections = [{"kind": "veto"}, {"kind": "geometric_rejection"}]
    AlgorithmConfig.model_validate({"corrections": [*weights[:1], *rejections]})
    AlgorithmConfig.model_validate(
        {"loss": {"kind": "clip", "anchor": "behavior"}, "corrections": rejections}
    )


@pytest.mark.parametrize("kind", ["icepop", "geometric_rejection", "veto"])
def test_a_range_must_hold_one(kind):
    with pytest.raises(ValidationError, match="must have 1 between them"):
        AlgorithmConfig.model_validate({"corrections": [{"kind": kind, "low": 1.5, "high": 2}]})


@pytest.mark.parametrize(
    ("rest", "reason"),
    [
        ({"loss": {"kind": "clip"}}, r"loss\.anchor is proximal"),
        ({"loss": {"kind": "cispo"}}, r"loss\.anchor is proximal"),
        ({"loss": {"kind": "topr"}, "corrections": [{"kind": "veto"}]}, "corrections compare the two"),
        (
            {"loss": {"kind": "dppo"}, "kl": {"kind": "in_loss", "anchor": "proximal"}},
            "take kl in_loss to another",
        ),
        (
            {"loss": {"kind": "dppo"}, "advantage": {"kind": "rloo"}, "kl": {"kind": "in_reward"}},
            "take kl in_loss to another",
        ),
        ({"loss": {"kind": "clip", "anchor": "behavior"}}, None),
        ({"loss": {"kind": "policy_gradient"}, "kl": {"kind": "in_loss"}}, None),
    ],
)
def test_what_is_not_scored_must_not_be_asked_for(rest, reason):
    written = {"proximal": "behavior", **rest}
    AlgorithmConfig.model_validate(rest)
    if reason is None:
        AlgorithmConfig.model_validate(written)
        return
    with pytest.raises(ValidationError, match=reason):
        AlgorithmConfig.model_validate(written)
