"""The objective against closed forms, and its independence of masked slots, padding, order and splits."""

import itertools
import math
from dataclasses import fields, replace

import pytest
import torch

from polyturn.configs.algorithm import AlgorithmConfig
from polyturn.trainer.algorithms.kl import k1, k2, k3
from polyturn.trainer.algorithms.losses import clip_loss
from polyturn.trainer.algorithms.objective import Objective, TokenBatch, evaluate_objective
from polyturn.trainer.algorithms.reductions import GlobalCounts, token_weights

NUM_ROWS, WIDTH = 6, 9
OBJECTIVES = [
    Objective(
        loss=loss,
        kl_coefficient=kl,
        entropy_coefficient=entropy,
        reduction=reduction,
    )
    for loss, kl, entropy, reduction in itertools.product(
        ("clip", "supervised"), (0.0, 0.3), (0.0, 0.2), ("token_mean", "sequence_mean")
    )
]
every_objective = pytest.mark.parametrize("objective", OBJECTIVES, ids=lambda o: f"{o.loss}-{o.reduction}")


def make_batch(seed: int = 0) -> TokenBatch:
    """Ragged rows, some tokens masked, one row without a trainable token; ratios on both sides of the clip."""
    generator = torch.Generator().manual_seed(seed)

    def noise(scale: float) -> torch.Tensor:
        return torch.randn(NUM_ROWS, WIDTH, generator=generator, dtype=torch.float64) * scale

    mask = torch.rand(NUM_ROWS, WIDTH, generator=generator) < 0.6
    mask[2] = False
    mask[3, 5:] = False
    logprobs = -noise(1.0).abs()
    return TokenBatch(
        logprobs=logprobs,
        entropies=noise(1.0).abs(),
        mask=mask,
        sequence_lengths=mask.sum(1, keepdim=True).expand(-1, WIDTH),
        advantages=torch.randn(NUM_ROWS, 1, generator=generator, dtype=torch.float64).expand(-1, WIDTH),
        behavior_logprobs=logprobs + noise(0.1),
        proximal_logprobs=logprobs + noise(0.3),
        reference_logprobs=logprobs + noise(0.5),
    )


def count(batch: TokenBatch) -> GlobalCounts:
    return GlobalCounts.of(batch.mask.sum(1).tolist())


def map_columns(batch: TokenBatch, function) -> TokenBatch:
    return replace(batch, **{field.name: function(getattr(batch, field.name)) for field in fields(batch)})


def evaluate(batch: TokenBatch, objective: Objective, counts: GlobalCounts):
    """The loss, its gradients by logprobs and entropies, and the metrics."""
    logprobs = batch.logprobs.clone().requires_grad_()
    entropies = batch.entropies.clone().requires_grad_()
    result = evaluate_objective(replace(batch, logprobs=logprobs, entropies=entropies), objective, counts)
    result.loss.backward()
    gradients = [x.grad if x.grad is not None else torch.zeros_like(x) for x in (logprobs, entropies)]
    return result.loss.item(), gradients, result


@pytest.mark.catalogue("B15")
@every_objective
@pytest.mark.parametrize("poison", [math.nan, math.inf, 1e9])
def test_what_stands_in_masked_slots_changes_nothing(objective, poison):
    batch = make_batch()
    loss, gradients, result = evaluate(batch, objective, count(batch))
    floats = ["logprobs", "entropies", "advantages"]
    floats += ["behavior_logprobs", "proximal_logprobs", "reference_logprobs"]
    poisoned = replace(
        batch, **{name: torch.where(batch.mask, getattr(batch, name), poison) for name in floats}
    )
    poisoned_loss, poisoned_gradients, poisoned_result = evaluate(poisoned, objective, count(batch))
    assert poisoned_loss == loss
    for ours, theirs in zip(gradients, poisoned_gradients, strict=True):
        assert torch.equal(ours, theirs)
        assert (ours[~batch.mask] == 0).all()
    assert poisoned_result.sums == result.sums and poisoned_result.maxima == result.maxima


@every_objective
def test_masked_tokens_can_be_deleted(objective):
    batch = make_batch()
    loss, gradients, result = evaluate(batch, objective, count(batch))
    deleted = map_columns(batch, lambda column: column[batch.mask])
    short_loss, short_gradients, short_result = evaluate(deleted, objective, count(batch))
    assert short_loss == pytest.approx(loss, abs=1e-12)
    for ours, theirs in zip(gradients, short_gradients, strict=True):
        torch.testing.assert_close(ours[batch.mask], theirs)
    for name, total in result.sums.items():
        torch.testing.assert_close(short_result.sums[name], total)


@pytest.mark.catalogue("B17")
@every_objective
def test_padding_changes_nothing(objective):
    batch = make_batch()
    padded = map_columns(batch, lambda column: torch.cat([column, torch.zeros_like(column[:, :4])], 1))
    padded = replace(padded, sequence_lengths=padded.mask.sum(1, keepdim=True).expand(-1, WIDTH + 4))
    expected = evaluate(batch, objective, count(batch))
    found = evaluate(padded, objective, count(batch))
    assert found[0] == pytest.approx(expected[0], abs=1e-12)
    torch.testing.assert_close(found[1][0][:, :WIDTH], expected[1][0])


@every_objective
def test_the_order_of_the_rows_changes_nothing(objective):
    batch = make_batch()
    order = torch.randperm(NUM_ROWS, generator=torch.Generator().manual_seed(1))
    loss, gradients, _ = evaluate(batch, objective, count(batch))
    found = evaluate(map_columns(batch, lambda column: column[order]), objective, count(batch))
    assert found[0] == pytest.approx(loss, abs=1e-12)
    torch.testing.assert_close(found[1][0], gradients[0][order])


@pytest.mark.catalogue("B14", "B18", "B19")
@every_objective
@pytest.mark.parametrize("bounds", [(0, 6), (0, 1, 6), (0, 2, 3, 6), (0, 1, 2, 3, 4, 5, 6)])
def test_parts_add_up_to_the_whole_however_it_is_split(objective, bounds):
    batch = make_batch()
    counts = count(batch)
    loss, gradients, result = evaluate(batch, objective, counts)
    parts = [
        evaluate(map_columns(batch, lambda column, a=a, b=b: column[a:b]), objective, counts)
        for a, b in itertools.pairwise(bounds)
    ]
    assert sum(part[0] for part in parts) == pytest.approx(loss, abs=1e-12)
    torch.testing.assert_close(torch.cat([part[1][0] for part in parts]), gradients[0])
    torch.testing.assert_close(torch.cat([part[1][1] for part in parts]), gradients[1])
    for name, total in result.sums.items():
        torch.testing.assert_close(sum(part[2].sums[name] for part in parts), total)


@pytest.mark.catalogue("B16")
@every_objective
def test_a_batch_twice_is_the_batch_once(objective):
    batch = make_batch()
    twice = map_columns(batch, lambda column: torch.cat([column, column]))
    assert evaluate(twice, objective, count(twice))[0] == pytest.approx(
        evaluate(batch, objective, count(batch))[0], abs=1e-12
    )


def test_weights_are_one_over_tokens_or_over_sequences_and_their_tokens():
    mask = torch.tensor([[1, 1, 0, 0], [1, 1, 1, 1], [0, 0, 0, 0]], dtype=torch.bool)
    lengths = mask.sum(1, keepdim=True)
    counts = GlobalCounts.of([2, 4, 0])
    assert counts == GlobalCounts(num_tokens=6, num_sequences=2)
    by_token = token_weights(mask, lengths, reduction="token_mean", counts=counts)
    assert torch.equal(by_token, mask.float() / 6)
    by_sequence = token_weights(mask, lengths, reduction="sequence_mean", counts=counts)
    torch.testing.assert_close(by_sequence[0, :2], torch.full((2,), 1 / 4))
    torch.testing.assert_close(by_sequence[1], torch.full((4,), 1 / 8))
    assert by_sequence[2].sum() == 0


@pytest.mark.parametrize(
    ("ratio", "advantage", "value", "slope"),
    [
        (1.0, 2.0, -2.0, -2.0),
        (1.25, 2.0, -2.5, -2.5),  # inside the higher bound
        (1.5, 2.0, -1.28 * 2, 0.0),
        (0.5, 2.0, -1.0, -1.0),  # worse for us: not clipped
        (0.5, -2.0, 0.8 * 2, 0.0),
        (1.5, -2.0, 3.0, 3.0),
    ],
)
def test_clipped_surrogate_by_hand(ratio, advantage, value, slope):
    logprob = torch.tensor([-1.0], dtype=torch.float64, requires_grad=True)
    anchor = logprob.detach() - math.log(ratio)
    mask = torch.ones(1, dtype=torch.bool)
    loss = clip_loss(
        logprob, anchor, torch.tensor([advantage], dtype=torch.float64), mask, clip_low=0.2, clip_high=0.28
    )
    loss.values.sum().backward()
    assert loss.values.item() == pytest.approx(value)
    assert logprob.grad.item() == pytest.approx(slope)
    assert loss.clipped.item() == (slope == 0.0)


@pytest.mark.parametrize("advantage", [-1.0, 1.0])
@pytest.mark.parametrize("gap", [-400.0, 400.0])
def test_a_far_anchor_overflows_nothing(gap, advantage):
    logprob = torch.tensor([-1.0], requires_grad=True)
    mask = torch.ones(1, dtype=torch.bool)
    loss = clip_loss(
        logprob, torch.tensor([-1.0 - gap]), torch.tensor([advantage]), mask, clip_low=0.2, clip_high=0.28
    )
    loss.values.sum().backward()
    assert torch.isfinite(loss.values).all() and torch.isfinite(logprob.grad).all()


@pytest.mark.catalogue("B29")
def test_before_any_update_nothing_has_changed():
    batch = make_batch()
    batch = replace(batch, proximal_logprobs=batch.logprobs)
    counts = count(batch)
    loss, gradients, result = evaluate(batch, Objective(), counts)
    expected = -(batch.advantages * batch.mask) / counts.num_tokens
    assert loss == pytest.approx(expected.sum().item(), abs=1e-7)
    torch.testing.assert_close(gradients[0], expected, atol=1e-7, rtol=1e-6)
    assert result.sums["policy_kl"] == 0 and result.sums["clip_fraction"] == 0
    assert result.maxima["policy_logratio_max"] == 0


@pytest.mark.catalogue("B32")
def test_a_stale_sample_has_a_ratio():
    batch = make_batch()
    moved = replace(batch, proximal_logprobs=batch.logprobs - 0.1)
    result = evaluate_objective(moved, Objective(), count(batch))
    assert (result.sums["ratio"] / count(batch).num_tokens).item() == pytest.approx(math.exp(0.1), rel=1e-5)
    assert result.sums["policy_kl"] > 0


@pytest.mark.catalogue("B34")
def test_metrics_by_hand():
    batch = TokenBatch(
        logprobs=torch.tensor([[-1.0, -2.0, -9.0]]),
        entropies=torch.tensor([[0.5, 0.25, 9.0]]),
        mask=torch.tensor([[True, True, False]]),
        sequence_lengths=torch.tensor([[2, 2, 2]]),
        advantages=torch.tensor([[1.0, 1.0, 1.0]]),
        behavior_logprobs=torch.tensor([[-1.25, -1.5, 0.0]]),
        proximal_logprobs=torch.tensor([[-2.0, -2.0, 0.0]]),
    )
    result = evaluate_objective(batch, Objective(), GlobalCounts(num_tokens=2, num_sequences=1))
    sums = {name: value.item() for name, value in result.sums.items()}
    assert sums == pytest.approx(
        {
            "loss": -(1.28 + 1.0) / 2,
            "num_tokens": 2.0,
            "clip_fraction": 1.0,
            "entropy": 0.75,
            "policy_kl": math.exp(-1) - 1 + 1,
            "ratio": math.e + 1,
            "logprob_difference": 0.75,
            "behavior_kl": (math.exp(0.25) - 1 - 0.25) + (math.exp(-0.5) - 1 + 0.5),
        }
    )
    assert result.maxima["logprob_difference_max"].item() == 0.5
    assert result.maxima["policy_logratio_max"].item() == 1.0


def expected_gradient(estimator, logits: torch.Tensor, reference: torch.Tensor) -> torch.Tensor:
    """The exact expectation, under the policy, of the gradient of an estimator used as a loss."""
    probabilities = logits.softmax(-1).detach()
    total = torch.zeros_like(logits)
    mask = torch.ones(1, dtype=torch.bool)
    for token, probability in enumerate(probabilities):
        leaf = logits.clone().requires_grad_()
        estimator(leaf.log_softmax(-1)[token, None], reference[token, None], mask).sum().backward()
        total += probability * leaf.grad
    return total


@pytest.mark.catalogue("B12")
def test_k2_in_the_loss_has_the_gradient_of_the_kl_and_k1_has_none():
    generator = torch.Generator().manual_seed(0)
    logits, other = torch.randn(2, 5, generator=generator, dtype=torch.float64)
    reference = other.log_softmax(-1)
    leaf = logits.clone().requires_grad_()
    policy = leaf.log_softmax(-1)
    (policy.exp() * (policy - reference)).sum().backward()
    torch.testing.assert_close(expected_gradient(k2, logits, reference), leaf.grad)
    assert expected_gradient(k1, logits, reference).abs().max() < 1e-12
    assert (expected_gradient(k3, logits, reference) - leaf.grad).abs().max() > 1e-2


def test_k1_and_k3_estimate_the_kl():
    generator = torch.Generator().manual_seed(0)
    policy, reference = torch.randn(2, 5, generator=generator, dtype=torch.float64).log_softmax(-1)
    exact = (policy.exp() * (policy - reference)).sum()
    mask = torch.ones(5, dtype=torch.bool)
    for estimator in (k1, k3):
        torch.testing.assert_close((policy.exp() * estimator(policy, reference, mask)).sum(), exact)
    assert (k3(policy, reference, mask) >= 0).all()


@pytest.mark.catalogue("B13")
def test_the_further_a_token_drifted_the_harder_it_is_pulled_back():
    drift = torch.linspace(-10, 10, 81, dtype=torch.float64, requires_grad=True)
    k2(drift, torch.zeros_like(drift), torch.ones(81, dtype=torch.bool)).sum().backward()
    assert (drift.grad.diff() > 0).all()


def test_the_entropy_bonus_raises_entropy_and_the_penalty_needs_a_reference():
    batch = make_batch()
    _, gradients, _ = evaluate(batch, Objective(entropy_coefficient=0.5), count(batch))
    torch.testing.assert_close(
        gradients[1][batch.mask], torch.full_like(gradients[1][batch.mask], -0.5 / count(batch).num_tokens)
    )
    with pytest.raises(AssertionError, match="reference"):
        evaluate(replace(batch, reference_logprobs=None), Objective(kl_coefficient=0.1), count(batch))


def test_an_objective_is_what_the_config_says():
    config = AlgorithmConfig.model_validate(
        {
            "loss": {"clip_low": 0.1, "clip_high": 0.3},
            "kl": {"kind": "in_loss", "coefficient": 0.02},
            "reduction": "sequence_mean",
            "entropy_coefficient": 0.01,
        }
    )
    assert Objective.from_config(config, temperature=0.7) == Objective(
        loss="clip",
        clip_low=0.1,
        clip_high=0.3,
        kl_coefficient=0.02,
        entropy_coefficient=0.01,
        reduction="sequence_mean",
        temperature=0.7,
    )
    assert Objective.from_config(AlgorithmConfig(), temperature=1.0).kl_coefficient == 0.0
