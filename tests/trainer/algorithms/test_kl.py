"""KL estimators: the exact gradient of each where it may be used, and the reason where it is refused.

One token from a softmax over five: every expectation is a sum of five terms.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable

import pytest
import torch
from pydantic import ValidationError

from polyturn.configs.schema.algorithm import AlgorithmConfig
from polyturn.configs.schema.objective import KLInLoss, KLInReward
from polyturn.trainer.algorithms.kl import k1, k2, k3, kl_penalty
from polyturn.trainer.algorithms.registry import KL_ESTIMATORS
from polyturn.trainer.algorithms.tokens import TokenBatch

ESTIMATORS = {"k1": k1, "k2": k2, "k3": k3}
RATIOS = ("none", "detached", "differentiated")
PLACEMENTS = {
    "none": "loss",
    "detached": "loss_times_detached_ratio",
    "differentiated": "loss_times_ratio",
}
GENERATOR = torch.Generator().manual_seed(0)
LOGITS, OTHER, SAMPLER = torch.randn(3, 5, generator=GENERATOR, dtype=torch.float64)
REFERENCE, BEHAVIOR = OTHER.log_softmax(-1), SAMPLER.log_softmax(-1)


def gradient(function: Callable[[torch.Tensor], torch.Tensor]) -> torch.Tensor:
    """Of a function of the policy's logprobs [5], by its logits."""
    leaf = LOGITS.clone().requires_grad_()
    function(leaf.log_softmax(-1)).backward()
    assert leaf.grad is not None
    return leaf.grad


REVERSE = gradient(lambda policy: (policy.exp() * (policy - REFERENCE)).sum())
FORWARD = gradient(lambda policy: (REFERENCE.exp() * (REFERENCE - policy)).sum())
ALL = torch.ones(5, dtype=torch.bool)


def unchecked(estimator: str, ratio: str) -> KLInLoss:
    """A section that validation may refuse."""
    fields = {"kind": "in_loss", "coefficient": 1.0, "anchor": "reference"}
    return KLInLoss.model_construct(estimator=estimator, ratio=ratio, **fields)


def make_batch(policy: torch.Tensor, behavior: torch.Tensor) -> TokenBatch:
    """All five tokens, each of a sample of its own."""
    ones = torch.ones(5, dtype=torch.int64)
    return TokenBatch(
        logprobs=policy,
        entropies=torch.zeros_like(REFERENCE),
        mask=ALL,
        sequence_index=torch.arange(5),
        num_sequences=5,
        sequence_lengths=ones,
        prompt_lengths=ones,
        turns=ones,
        policy_versions=ones,
        advantages=torch.zeros_like(REFERENCE),
        behavior_logprobs=behavior,
        proximal_logprobs=behavior - 3.0,
        reference_logprobs=REFERENCE,
    )


def in_loss(config: KLInLoss, behavior: torch.Tensor) -> torch.Tensor:
    """The expected gradient of the penalty in the loss, over tokens that `behavior` draws."""
    return gradient(lambda policy: (behavior.exp() * kl_penalty(make_batch(policy, behavior), config)).sum())


def in_reward(estimator: str) -> torch.Tensor:
    """The expected gradient of -log p times the negative penalty, over tokens that the policy draws."""
    policy_now = LOGITS.log_softmax(-1)
    penalty = ESTIMATORS[estimator](policy_now, REFERENCE, ALL)
    return gradient(lambda policy: (policy_now.exp() * penalty * policy).sum())


ON_POLICY = LOGITS.log_softmax(-1)


def claimed(gradient_name: str) -> torch.Tensor | None:
    return {
        "zero": torch.zeros_like(REVERSE),
        "reverse_kl": REVERSE,
        "forward_kl": FORWARD,
        "reverse_minus_forward_kl": REVERSE - FORWARD,
    }.get(gradient_name)


@pytest.mark.catalogue("B12")
@pytest.mark.parametrize(("estimator", "ratio"), list(itertools.product(ESTIMATORS, RATIOS)))
def test_the_gradient_in_the_loss_is_the_one_that_is_claimed(estimator, ratio):
    claim = KL_ESTIMATORS[estimator].gradients[PLACEMENTS[ratio]]
    found = in_loss(unchecked(estimator, ratio), ON_POLICY)
    expected = claimed(claim)
    if expected is None:
        assert claim == "biased"
        assert (found - REVERSE).abs().max() > 1e-2 and (found - FORWARD).abs().max() > 1e-2
    else:
        torch.testing.assert_close(found, expected, atol=1e-12, rtol=1e-9)


@pytest.mark.catalogue("B12")
@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_the_gradient_in_the_reward_is_the_one_that_is_claimed(estimator):
    claim = KL_ESTIMATORS[estimator].gradients["reward"]
    found, expected = in_reward(estimator), claimed(claim)
    if expected is None:
        assert claim == "biased"
        assert (found - REVERSE).abs().max() > 1e-2 and (found - FORWARD).abs().max() > 1e-2
    else:
        torch.testing.assert_close(found, expected, atol=1e-12, rtol=1e-9)


@pytest.mark.catalogue("B12")
@pytest.mark.parametrize(("estimator", "ratio"), list(itertools.product(ESTIMATORS, RATIOS)))
def test_exactly_those_without_the_gradient_of_the_kl_are_refused_in_the_loss(estimator, ratio):
    right = KL_ESTIMATORS[estimator].gradients[PLACEMENTS[ratio]] == "reverse_kl"
    written = {"kl": {"kind": "in_loss", "estimator": estimator, "ratio": ratio}}
    if right:
        AlgorithmConfig.model_validate(written)
        return
    reason = {
        "zero": "expected gradient of zero",
        "forward_kl": r"gradient of KL\(reference \|\| policy\)",
        "biased": "is not a KL's gradient",
    }[KL_ESTIMATORS[estimator].gradients[PLACEMENTS[ratio]]]
    with pytest.raises(ValidationError, match=rf"{reason}.*; take "):
        AlgorithmConfig.model_validate(written)


@pytest.mark.catalogue("B12")
@pytest.mark.parametrize(
    ("estimator", "reason"), [("k1", None), ("k2", "biased"), ("k3", r"KL\(reference \|\| policy\)")]
)
def test_only_k1_may_be_in_the_reward(estimator, reason):
    right = KL_ESTIMATORS[estimator].gradients["reward"] == "reverse_kl"
    assert right == (reason is None)
    if right:
        KLInReward(kind="in_reward", estimator=estimator)
        return
    with pytest.raises(ValidationError, match=rf"{reason}.*; take k1"):
        KLInReward(kind="in_reward", estimator=estimator)


@pytest.mark.parametrize(
    ("estimator", "ratio"), [("k1", "differentiated"), ("k3", "differentiated"), ("k2", "detached")]
)
def test_with_the_ratio_the_gradient_is_right_whoever_draws_the_tokens(estimator, ratio):
    config = KLInLoss(kind="in_loss", estimator=estimator, ratio=ratio)
    torch.testing.assert_close(in_loss(config, BEHAVIOR), REVERSE, atol=1e-12, rtol=1e-9)
    without = in_loss(unchecked("k2", "none"), BEHAVIOR)
    assert (without - REVERSE).abs().max() > 1e-2


def test_the_ratio_is_against_the_sampler_not_the_start_of_the_step():
    """The proximal policy of the batch is far away: it must not be read."""
    config = KLInLoss(kind="in_loss", estimator="k1", ratio="differentiated")
    torch.testing.assert_close(in_loss(config, BEHAVIOR), REVERSE, atol=1e-12, rtol=1e-9)


@pytest.mark.parametrize("anchor", ["reference", "proximal", "behavior"])
def test_the_policy_is_held_near_the_anchor_of_that_name(anchor):
    config = KLInLoss(kind="in_loss", anchor=anchor)
    batch = make_batch(ON_POLICY, BEHAVIOR)
    held_to = {"reference": REFERENCE, "proximal": BEHAVIOR - 3.0, "behavior": BEHAVIOR}[anchor]
    torch.testing.assert_close(kl_penalty(batch, config), (ON_POLICY - held_to).square() / 2)
    assert AlgorithmConfig(kl=config).needs_reference == (anchor == "reference")


@pytest.mark.parametrize("estimator", ["k1", "k3"])
def test_k1_and_k3_estimate_the_kl(estimator):
    exact = (ON_POLICY.exp() * (ON_POLICY - REFERENCE)).sum()
    values = ESTIMATORS[estimator](ON_POLICY, REFERENCE, ALL)
    torch.testing.assert_close((ON_POLICY.exp() * values).sum(), exact)
    assert estimator == "k1" or (values >= 0).all()


@pytest.mark.catalogue("B13")
@pytest.mark.parametrize("estimator", ["k2", "k3"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_further_a_token_drifted_the_harder_it_is_pulled_back(estimator, dtype):
    drift = torch.linspace(-10, 10, 81, dtype=dtype, requires_grad=True)
    ESTIMATORS[estimator](drift, torch.zeros_like(drift), torch.ones(81, dtype=torch.bool)).sum().backward()
    assert drift.grad is not None
    # k3 pulls down by 1 - exp(-d), which is 1 in float32 from 10 on.
    assert (drift.grad.diff() >= 0).all() and (drift.grad[:40].diff() > 0).all()
    assert (drift.grad[:40] < 0).all() and (drift.grad[41:] > 0).all()


@pytest.mark.catalogue("B13")
@pytest.mark.parametrize("far", [-30.0, -500.0, 500.0])
def test_a_token_beyond_all_bounds_is_still_pulled_back_by_a_finite_number(far):
    drift = torch.tensor([far], requires_grad=True)
    value = k3(drift, torch.zeros(1), torch.ones(1, dtype=torch.bool))
    value.sum().backward()
    assert drift.grad is not None and torch.isfinite(value).all() and torch.isfinite(drift.grad).all()
    assert torch.sign(drift.grad).item() == (1 if far > 0 else -1)
