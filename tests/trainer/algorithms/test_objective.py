"""The objective against closed forms, and its independence of masked slots, padding, order and splits."""

import itertools
import math
from dataclasses import fields, replace

import pytest
import torch

from polyturn.configs.schema import objective as sections
from polyturn.configs.schema.algorithm import AlgorithmConfig, EntropyTarget
from polyturn.configs.schema.objective import ClipLoss, KLInLoss, NoKL, ReinforceLoss, SupervisedLoss
from polyturn.trainer.algorithms.entropy_control import EntropyBonus
from polyturn.trainer.algorithms.objective import Objective, evaluate_objective
from polyturn.trainer.algorithms.tokens import GlobalCounts, TokenBatch

NUM_ROWS, WIDTH = 6, 9
REDUCTIONS = [
    sections.TokenMean(),
    sections.SequenceMean(kind="sequence_mean"),
    sections.SequenceSum(kind="sequence_sum"),
    sections.SequenceSumNorm(kind="sequence_sum_norm", length=7),
    sections.PromptMean(kind="prompt_mean"),
    sections.TokenSum(kind="token_sum"),
]
IN_LOSS = KLInLoss(kind="in_loss", coefficient=0.3)
OBJECTIVES = [
    Objective(loss=loss, kl=kl, entropy_coefficient=entropy, reduction=reduction)
    for loss, kl, entropy, reduction in itertools.product(
        (ClipLoss(), SupervisedLoss(kind="supervised")), (NoKL(), IN_LOSS), (0.0, 0.2), REDUCTIONS[:2]
    )
]
OBJECTIVES += [
    Objective(kl=IN_LOSS, entropy_coefficient=0.2, reduction=reduction) for reduction in REDUCTIONS[2:]
]
every_objective = pytest.mark.parametrize(
    "objective", OBJECTIVES, ids=lambda o: f"{o.loss.kind}-{o.reduction.kind}"
)
SEQUENCES = ["a", "a", "b", "c", "d", "d"]
"""Of each row: two episodes have two segments."""
PROMPTS = ["p", "p", "p", "q", "q", "q"]


def make_batch(seed: int = 0) -> TokenBatch:
    """Ragged rows, some tokens masked, one row without a trainable token; ratios on both sides of the clip."""
    generator = torch.Generator().manual_seed(seed)

    def noise(scale: float) -> torch.Tensor:
        return torch.randn(NUM_ROWS, WIDTH, generator=generator, dtype=torch.float64) * scale

    mask = torch.rand(NUM_ROWS, WIDTH, generator=generator) < 0.6
    mask[2] = False
    mask[3, 5:] = False
    logprobs = -noise(1.0).abs()
    lengths = mask.sum(1).tolist()

    def total(ids: list[str]) -> torch.Tensor:
        sums = [sum(n for n, other in zip(lengths, ids, strict=True) if other == own) for own in ids]
        return torch.tensor(sums)[:, None].expand(-1, WIDTH).flatten()

    return TokenBatch(
        logprobs=logprobs.flatten(),
        entropies=noise(1.0).abs().flatten(),
        mask=mask.flatten(),
        sequence_index=torch.arange(NUM_ROWS).repeat_interleave(WIDTH),
        num_sequences=NUM_ROWS,
        sequence_lengths=total(SEQUENCES),
        prompt_lengths=total(PROMPTS),
        turns=torch.arange(WIDTH).repeat(NUM_ROWS) // 3,
        policy_versions=torch.full((NUM_ROWS * WIDTH,), 3),
        advantages=torch.randn(NUM_ROWS, 1, generator=generator, dtype=torch.float64)
        .expand(-1, WIDTH)
        .flatten(),
        behavior_logprobs=(logprobs + noise(0.1)).flatten(),
        proximal_logprobs=(logprobs + noise(0.3)).flatten(),
        reference_logprobs=(logprobs + noise(0.5)).flatten(),
        correction_weights=torch.rand(NUM_ROWS * WIDTH, generator=generator, dtype=torch.float64),
    )


def count(batch: TokenBatch) -> GlobalCounts:
    lengths = [int(batch.mask[batch.sequence_index == row].sum()) for row in range(batch.num_sequences)]
    copies = batch.num_sequences // NUM_ROWS
    return GlobalCounts.of(
        lengths,
        sequence_ids=[f"{name}{copy}" for copy in range(copies) for name in SEQUENCES],
        prompt_ids=[f"{name}{copy}" for copy in range(copies) for name in PROMPTS],
    )


def take(batch: TokenBatch, where: torch.Tensor) -> TokenBatch:
    """The tokens at some positions, in that order; samples keep their indices."""
    return map_columns(batch, lambda column: column[where])


def map_columns(batch: TokenBatch, function) -> TokenBatch:
    columns = {field.name: getattr(batch, field.name) for field in fields(batch)}
    tensors = {name: function(column) for name, column in columns.items() if isinstance(column, torch.Tensor)}
    return replace(batch, **tensors)


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
    floats += ["correction_weights"]
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
    deleted = take(batch, batch.mask)
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
    padded = map_columns(
        batch,
        lambda column: torch.cat(
            [column.view(NUM_ROWS, WIDTH), torch.zeros_like(column.view(NUM_ROWS, WIDTH)[:, :4])], 1
        ),
    )
    padded = map_columns(padded, torch.flatten)
    index = torch.arange(NUM_ROWS).repeat_interleave(WIDTH + 4)
    expected = evaluate(batch, objective, count(batch))
    found = evaluate(replace(padded, sequence_index=index), objective, count(batch))
    assert found[0] == pytest.approx(expected[0], abs=1e-12)
    torch.testing.assert_close(found[1][0][padded.mask], expected[1][0][batch.mask])


@every_objective
def test_the_order_of_the_tokens_changes_nothing(objective):
    batch = make_batch()
    order = torch.randperm(NUM_ROWS * WIDTH, generator=torch.Generator().manual_seed(1))
    loss, gradients, _ = evaluate(batch, objective, count(batch))
    found = evaluate(take(batch, order), objective, count(batch))
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
        evaluate(take(batch, (a <= batch.sequence_index) & (batch.sequence_index < b)), objective, counts)
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
    index = torch.cat([batch.sequence_index, batch.sequence_index + NUM_ROWS])
    twice = replace(twice, sequence_index=index, num_sequences=2 * NUM_ROWS)
    times = 2 if objective.reduction.kind == "token_sum" else 1
    assert evaluate(twice, objective, count(twice))[0] == pytest.approx(
        times * evaluate(batch, objective, count(batch))[0], abs=1e-12
    )


@pytest.mark.catalogue("B29")
def test_before_any_update_nothing_has_changed():
    batch = make_batch()
    batch = replace(batch, proximal_logprobs=batch.logprobs, correction_weights=None)
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
        logprobs=torch.tensor([-1.0, -2.0, -9.0]),
        entropies=torch.tensor([0.5, 0.25, 9.0]),
        mask=torch.tensor([True, True, False]),
        sequence_index=torch.tensor([0, 0, 0]),
        num_sequences=1,
        sequence_lengths=torch.tensor([2, 2, 2]),
        prompt_lengths=torch.tensor([2, 2, 2]),
        turns=torch.tensor([0, 0, 0]),
        policy_versions=torch.tensor([0, 0, 0]),
        advantages=torch.tensor([1.0, 1.0, 1.0]),
        behavior_logprobs=torch.tensor([-1.25, -1.5, 0.0]),
        proximal_logprobs=torch.tensor([-2.0, -2.0, 0.0]),
    )
    result = evaluate_objective(batch, Objective(), GlobalCounts.of([2]))
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


def test_the_entropy_bonus_raises_entropy_and_the_penalty_needs_a_reference():
    batch = make_batch()
    _, gradients, _ = evaluate(batch, Objective(entropy_coefficient=0.5), count(batch))
    torch.testing.assert_close(
        gradients[1][batch.mask], torch.full_like(gradients[1][batch.mask], -0.5 / count(batch).num_tokens)
    )
    with pytest.raises(AssertionError, match="reference"):
        evaluate(replace(batch, reference_logprobs=None), Objective(kl=IN_LOSS), count(batch))


def test_an_objective_is_what_the_config_says():
    config = AlgorithmConfig.model_validate(
        {
            "loss": {"kind": "clip", "clip_low": 0.1, "clip_high": 0.3},
            "kl": {"kind": "in_loss", "coefficient": 0.02},
            "reduction": {"kind": "sequence_mean"},
            "entropy_coefficient": 0.01,
        }
    )
    assert Objective.from_config(config, temperature=0.7) == Objective(
        loss=ClipLoss(clip_low=0.1, clip_high=0.3),
        kl=KLInLoss(kind="in_loss", coefficient=0.02),
        entropy_coefficient=0.01,
        reduction=sections.SequenceMean(kind="sequence_mean"),
        temperature=0.7,
    )
    assert Objective.from_config(AlgorithmConfig(), temperature=1.0) == Objective()


def test_a_rejected_token_has_no_policy_loss_but_is_held_by_the_penalties():
    batch = make_batch()
    weights = torch.where(batch.sequence_index == 0, 0.0, 2.0).double()
    corrected, plain = (
        replace(batch, correction_weights=column) for column in (weights, torch.ones_like(weights))
    )
    counts, rejected = count(batch), (batch.sequence_index == 0) & batch.mask
    assert rejected.any()
    _, alone, _ = evaluate(plain, Objective(), counts)
    _, found, _ = evaluate(corrected, Objective(), counts)
    # The denominators are those before rejection: what is left is not scaled up.
    torch.testing.assert_close(found[0], alone[0] * weights)
    objective = Objective(kl=IN_LOSS, entropy_coefficient=0.2)
    _, held, _ = evaluate(corrected, objective, counts)
    pull = 0.3 * (batch.logprobs - batch.reference_logprobs) / counts.num_tokens
    torch.testing.assert_close(held[0][rejected], pull[rejected])
    torch.testing.assert_close(held[1][rejected], torch.full_like(pull[rejected], -0.2 / counts.num_tokens))


def test_decoupled_ppo_is_the_importance_weighted_policy_gradient_at_the_start_of_the_step():
    """Three policies: where the policy is the proximal one, the slope is -w A with w = proximal / behavior."""
    batch = make_batch()
    weights = (batch.proximal_logprobs - batch.behavior_logprobs).exp()
    batch = replace(batch, logprobs=batch.proximal_logprobs, correction_weights=weights)
    counts = count(batch)
    _, decoupled, _ = evaluate(batch, Objective(), counts)
    _, two_policies, _ = evaluate(
        replace(batch, correction_weights=None),
        Objective(loss=ReinforceLoss(kind="reinforce", anchor="behavior")),
        counts,
    )
    expected = torch.where(batch.mask, -weights * batch.advantages / counts.num_tokens, 0.0)
    torch.testing.assert_close(decoupled[0], expected)
    torch.testing.assert_close(two_policies[0], expected)


def test_tokens_that_a_control_holds_are_pulled_back_and_nothing_else_is() -> None:
    batch = make_batch()
    counts = GlobalCounts.of([int(batch.mask.sum())])
    holds = torch.zeros_like(batch.logprobs)
    place = int(batch.mask.nonzero()[3])
    holds[place] = 0.7
    holds[~batch.mask] = math.nan
    grads, losses = [], []
    for kl_weights in (None, holds):
        logprobs = batch.logprobs.detach().requires_grad_()
        held = replace(batch, logprobs=logprobs, kl_weights=kl_weights)
        loss = evaluate_objective(held, Objective(), counts).loss
        losses.append(loss.item())
        grads.append(torch.autograd.grad(loss, logprobs)[0])
    gap = float(batch.logprobs[place] - batch.proximal_logprobs[place])
    assert losses[1] - losses[0] == pytest.approx(0.7 * abs(gap) / counts.num_tokens)
    pull = torch.zeros_like(holds)
    pull[place] = math.copysign(0.7 / counts.num_tokens, gap)
    torch.testing.assert_close(grads[1] - grads[0], pull)


def test_the_entropy_bonus_follows_its_target() -> None:
    target = EntropyTarget(entropy=0.2, step=0.01, most=0.025)
    bonus = EntropyBonus.first(0.0)
    seen = []
    for entropy in (0.1, 0.1, 0.1, 0.2, 0.3, 0.3, 0.3, 0.3, 0.15):
        bonus = bonus.after(entropy, target)
        seen.append((round(bonus.level, 6), round(bonus.coefficient, 6)))
    assert seen == [
        (0.01, 0.01),
        (0.02, 0.02),
        (0.025, 0.025),
        (0.025, 0.025),
        (0.015, 0.0),
        (0.005, 0.0),
        (0.0, 0.0),
        (0.0, 0.0),
        (0.01, 0.01),
    ]
