"""Policy losses against closed forms, value and slope by each logprob, in float64."""

from __future__ import annotations

import math
from collections.abc import Sequence

import pytest
import torch

from polyturn.configs.schema import objective as sections
from polyturn.configs.schema.section import Section
from polyturn.trainer.algorithms.registry import POLICY_LOSSES, bind
from polyturn.trainer.algorithms.tokens import TokenBatch, TokenLoss

LOGPROB = -1.0


def evaluate(
    config: Section,
    log_ratios: Sequence[float],
    advantages: Sequence[float],
    *,
    index: Sequence[int] | None = None,
    anchor: str | None = None,
    logprobs: Sequence[float] | None = None,
    dtype: torch.dtype = torch.float64,
) -> tuple[TokenLoss, torch.Tensor]:
    """The loss of tokens with these log-ratios to the config's anchor, and the slope of its sum by each logprob.

    The other anchor is far away, so that taking the wrong one shows.
    """
    count = len(log_ratios)
    tokens = list(index) if index is not None else list(range(count))
    values = torch.tensor(logprobs or [LOGPROB] * count, dtype=dtype, requires_grad=True)
    ratios = torch.tensor(log_ratios, dtype=dtype)
    anchor = anchor or getattr(config, "anchor", None) or "proximal"
    anchored, other = values.detach() - ratios, values.detach() - 0.123
    lengths = torch.tensor([tokens.count(token) for token in tokens])
    batch = TokenBatch(
        logprobs=values,
        entropies=torch.zeros_like(ratios),
        mask=torch.ones(count, dtype=torch.bool),
        sequence_index=torch.tensor(tokens),
        num_sequences=max(tokens) + 1,
        sequence_lengths=lengths,
        prompt_lengths=lengths,
        turns=torch.zeros(count, dtype=torch.int64),
        policy_versions=torch.zeros(count, dtype=torch.int64),
        advantages=torch.tensor(advantages, dtype=dtype),
        behavior_logprobs=anchored if anchor == "behavior" else other,
        proximal_logprobs=anchored if anchor == "proximal" else other,
    )
    loss = bind(POLICY_LOSSES, config)(batch)
    loss.values.sum().backward()
    assert values.grad is not None
    return loss, values.grad


def check(config: Section, ratio: float, advantage: float, value: float, slope: float, clipped: bool) -> None:
    loss, grad = evaluate(config, [math.log(ratio)], [advantage])
    assert loss.values.item() == pytest.approx(value)
    assert grad.item() == pytest.approx(slope, abs=1e-12)
    assert loss.clipped.item() == clipped


@pytest.mark.parametrize("anchor", ["proximal", "behavior"])
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
def test_clip(anchor, ratio, advantage, value, slope):
    check(sections.ClipLoss(anchor=anchor), ratio, advantage, value, slope, clipped=slope == 0.0)


@pytest.mark.parametrize(
    ("ratio", "advantage", "value", "slope", "clipped"),
    [
        (4.0, -2.0, 6.0, 0.0, True),  # 3 |A| in place of 8
        (2.5, -2.0, 5.0, 5.0, False),
        (4.0, 2.0, -1.28 * 2, 0.0, True),  # of no meaning where A > 0
        (0.5, -2.0, 1.6, 0.0, True),
    ],
)
def test_dual_clip(ratio, advantage, value, slope, clipped):
    check(sections.ClipLoss(dual_clip=3.0), ratio, advantage, value, slope, clipped)


def test_gspo_has_the_geometric_mean_of_a_samples_ratios():
    config = sections.GSPOLoss(kind="gspo", clip_low=0.1, clip_high=0.2)
    logs = [0.3, -0.1, 0.1, 0.5, 0.4]
    advantages = [2.0, 2.0, 2.0, -1.0, -1.0]
    loss, grad = evaluate(config, logs, advantages, index=[0, 0, 0, 1, 1])
    first, second = math.exp(0.1), math.exp(0.45)
    # Every token has its sample's loss, and a sample's slope is shared out over its tokens: 3 values, a third each.
    torch.testing.assert_close(
        loss.values, torch.tensor([-first * 2] * 3 + [second] * 2, dtype=torch.float64)
    )
    torch.testing.assert_close(grad, torch.tensor([-first * 2] * 3 + [second] * 2, dtype=torch.float64))
    assert not loss.clipped.any()


def test_gspo_clips_whole_samples():
    config = sections.GSPOLoss(kind="gspo", clip_low=0.1, clip_high=0.2)
    loss, grad = evaluate(config, [1.0, -0.5, 0.0, -1.0], [1.0, 1.0, -1.0, -1.0], index=[0, 0, 1, 1])
    torch.testing.assert_close(loss.values, torch.tensor([-1.2, -1.2, 0.9, 0.9], dtype=torch.float64))
    assert grad.abs().max() == 0 and loss.clipped.all()


def test_gspo_token_is_gspo_where_all_advantages_are_equal_and_local_elsewhere():
    logs, index = [0.3, -0.1, 0.1, 0.5, 0.4], [0, 0, 0, 1, 1]
    wide = {"clip_low": 0.9, "clip_high": 9.0}
    results = [
        evaluate(
            sections.GSPOLoss(kind="gspo", form=form, **wide), logs, [2.0, 2.0, 2.0, -1.0, -1.0], index=index
        )
        for form in ("sequence", "token")
    ]
    torch.testing.assert_close(results[0][0].values, results[1][0].values)
    torch.testing.assert_close(results[0][1], results[1][1])
    config = sections.GSPOLoss(kind="gspo", form="token", **wide)
    _, grad = evaluate(config, logs, [2.0, 0.0, 0.0, -1.0, -1.0], index=index)
    torch.testing.assert_close(grad[:3], torch.tensor([-2 * math.exp(0.1), 0.0, 0.0], dtype=torch.float64))


def test_luspo_is_gspo_times_the_length():
    logs, advantages, index = [0.3, -0.1, 0.1, 0.5, 0.4], [2.0, 2.0, 2.0, -1.0, -1.0], [0, 0, 0, 1, 1]
    wide = {"clip_low": 0.9, "clip_high": 9.0}
    plain, plain_grad = evaluate(sections.GSPOLoss(kind="gspo", **wide), logs, advantages, index=index)
    loss, grad = evaluate(sections.LUSPOLoss(kind="luspo", **wide), logs, advantages, index=index)
    lengths = torch.tensor([3.0, 3.0, 3.0, 2.0, 2.0], dtype=torch.float64)
    torch.testing.assert_close(loss.values, lengths * plain.values)
    torch.testing.assert_close(grad, lengths * plain_grad)


def test_gmpo_bounds_each_ratio_before_their_mean():
    config = sections.GMPOLoss(kind="gmpo")
    loss, grad = evaluate(config, [1.0, -1.0, 0.1], [2.0, 2.0, 2.0], index=[0, 0, 0])
    mean = math.exp((0.4 - 1.0 + 0.1) / 3)
    torch.testing.assert_close(loss.values, torch.full((3,), -2 * mean, dtype=torch.float64))
    torch.testing.assert_close(grad, torch.tensor([0.0, -2 * mean, -2 * mean], dtype=torch.float64))
    assert loss.clipped.tolist() == [True, False, False]
    loss, grad = evaluate(config, [1.0, -1.0], [-2.0, -2.0], index=[0, 0])
    mean = math.exp((1.0 - 0.4) / 2)
    torch.testing.assert_close(grad, torch.tensor([2 * mean, 0.0], dtype=torch.float64))
    assert loss.clipped.tolist() == [False, True]


@pytest.mark.parametrize(
    ("log_ratios", "advantage", "power", "rate"), [([0.2, 0.1], 1.5, 2, 3), ([-0.3, 0.1], -1.5, 3, 2)]
)
def test_vespo_weighs_whole_samples(log_ratios, advantage, power, rate):
    loss, grad = evaluate(sections.VESPOLoss(kind="vespo"), log_ratios, [advantage] * 2, index=[0, 0])
    w = math.exp(sum(log_ratios))
    weight = w**power * math.exp(rate * (1 - w))
    torch.testing.assert_close(grad, torch.full((2,), -weight * advantage, dtype=torch.float64))
    torch.testing.assert_close(loss.values, grad * LOGPROB)


@pytest.mark.parametrize(
    ("ratio", "floor", "weight"), [(1.5, 0.0, 1.5), (7.0, 0.0, 5.0), (0.01, 0.0, 0.01), (0.01, 0.3, 0.3)]
)
@pytest.mark.parametrize("advantage", [2.0, -2.0])
def test_cispo_caps_the_ratio_itself_and_keeps_every_gradient(ratio, floor, weight, advantage):
    config = sections.CISPOLoss(kind="cispo", ratio_cap=5.0, ratio_floor=floor)
    slope = -weight * advantage
    check(config, ratio, advantage, slope * LOGPROB, slope, clipped=weight != ratio)


@pytest.mark.parametrize(("advantage", "tau"), [(2.0, 1.0), (-2.0, 1.05)])
@pytest.mark.parametrize("ratio", [0.2, 1.0, 3.0])
def test_sapo_gates_by_a_sigmoid(ratio, advantage, tau):
    gate = 1 / (1 + math.exp(-tau * (ratio - 1)))
    slope = -4 * gate * (1 - gate) * ratio * advantage
    check(sections.SAPOLoss(kind="sapo"), ratio, advantage, -4 / tau * gate * advantage, slope, clipped=False)


@pytest.mark.parametrize(
    ("before", "now", "advantage", "kept"),
    [
        (0.3, 0.6, 1.0, False),  # moved up by 0.3, where A pushes it
        (0.3, 0.45, 1.0, True),
        (0.6, 0.3, 1.0, True),  # moved down, against A
        (0.6, 0.3, -1.0, False),
        (0.3, 0.6, -1.0, True),
        (1e-6, 1e-3, 1.0, True),  # a ratio of 1000, and hardly a move
    ],
)
@pytest.mark.parametrize("penalty", [0.0, 1e-3])
def test_dppo_leaves_out_what_moved_too_far(before, now, advantage, kept, penalty):
    config = sections.DPPOLoss(kind="dppo", drift_penalty=penalty)
    log = math.log(now / before)
    loss, grad = evaluate(config, [log], [advantage], logprobs=[math.log(now)])
    surrogate = -now / before * advantage if kept else 0.0
    assert loss.values.item() == pytest.approx(surrogate + penalty * log**2)
    assert grad.item() == pytest.approx(surrogate + 2 * penalty * log)
    assert loss.clipped.item() != kept


def test_dppo_by_the_kl_of_two_way_distributions():
    before, now = 0.3, 0.6
    kl = before * math.log(before / now) + (1 - before) * math.log((1 - before) / (1 - now))
    for threshold, clipped in ((kl * 1.01, False), (kl * 0.99, True)):
        config = sections.DPPOLoss(kind="dppo", divergence="kl", threshold_high=threshold)
        loss, _ = evaluate(config, [math.log(now / before)], [1.0], logprobs=[math.log(now)])
        assert loss.clipped.item() == clipped


@pytest.mark.parametrize(
    ("ratio", "advantage", "weight", "clipped"),
    [(3.0, 2.0, 1.0, False), (0.1, 2.0, 1.0, False), (0.1, -2.0, 0.1, False), (3.0, -2.0, 1.0, True)],
)
def test_topr_tapers_negative_examples_only(ratio, advantage, weight, clipped):
    slope = -weight * advantage
    check(sections.TOPRLoss(kind="topr"), ratio, advantage, slope * LOGPROB, slope, clipped)


@pytest.mark.parametrize("anchor", ["behavior", "proximal"])
def test_reinforce_is_weighted_by_the_ratio(anchor):
    check(sections.ReinforceLoss(kind="reinforce", anchor=anchor), 3.0, 2.0, -6.0 * LOGPROB, -6.0, False)


def test_the_policy_gradient_knows_no_ratio():
    check(sections.PolicyGradientLoss(kind="policy_gradient"), 3.0, 2.0, -2.0 * LOGPROB, -2.0, False)


def test_supervised_is_cross_entropy_whatever_the_advantage():
    loss, grad = evaluate(sections.SupervisedLoss(kind="supervised"), [0.3, -2.0], [5.0, -5.0])
    assert loss.values.tolist() == [-LOGPROB, -LOGPROB] and grad.tolist() == [-1.0, -1.0]
    assert not loss.clipped.any()


@pytest.mark.parametrize("entry", POLICY_LOSSES, ids=lambda entry: entry.name)
@pytest.mark.parametrize("advantage", [-1.0, 1.0])
@pytest.mark.parametrize("gap", [-400.0, 400.0])
def test_a_far_anchor_overflows_nothing(entry, gap, advantage):
    config = entry.config(kind=entry.name)
    loss, grad = evaluate(config, [gap, 0.1], [advantage] * 2, index=[0, 0], dtype=torch.float32)
    assert torch.isfinite(loss.values).all() and torch.isfinite(grad).all()


@pytest.mark.parametrize("entry", POLICY_LOSSES, ids=lambda entry: entry.name)
def test_slopes_are_those_of_finite_differences(entry):
    """But for weights that are detached on purpose, whose losses the closed forms above cover."""
    if entry.name in ("cispo", "reinforce", "topr", "vespo"):
        return
    config = entry.config(kind=entry.name)
    logs, advantages, index, step = (
        [0.2, -0.3, 0.05, 1e-4, -2e-4],
        [1.0, 1.0, 1.0, -2.0, -2.0],
        [0, 0, 0, 1, 1],
        1e-6,
    )
    _, grad = evaluate(config, logs, advantages, index=index)
    start = [LOGPROB] * len(logs)
    for token in range(len(logs)):
        totals = []
        for sign in (1, -1):
            moved, ratios = list(start), list(logs)
            moved[token] += sign * step
            ratios[token] += sign * step
            loss, _ = evaluate(config, ratios, advantages, index=index, logprobs=moved)
            totals.append(loss.values.sum().item())
        assert grad[token].item() == pytest.approx((totals[0] - totals[1]) / (2 * step), rel=1e-5, abs=1e-7)


LOSES_NOTHING_UNSEEN = {
    "clip": sections.ClipLoss(kind="clip"),
    "dual clip": sections.ClipLoss(kind="clip", dual_clip=3.0),
    "dppo": sections.DPPOLoss(kind="dppo"),
    "gspo": sections.GSPOLoss(kind="gspo"),
    "gspo of tokens": sections.GSPOLoss(kind="gspo", form="token"),
    "luspo": sections.LUSPOLoss(kind="luspo"),
    "gmpo": sections.GMPOLoss(kind="gmpo"),
    "reinforce": sections.ReinforceLoss(kind="reinforce"),
    "cispo": sections.CISPOLoss(kind="cispo"),
    "topr": sections.TOPRLoss(kind="topr"),
}


@pytest.mark.parametrize("name", LOSES_NOTHING_UNSEEN)
@pytest.mark.parametrize("advantage", [-1.0, 1.0])
@pytest.mark.parametrize("ratio", [-60.0, -20.5, -19.5, -0.5, 0.0, 0.5, 19.5, 20.5, 60.0])
def test_a_token_that_lost_its_gradient_counts_as_clipped(name: str, advantage: float, ratio: float) -> None:
    """`drift_penalty` and its like apart, a token has a gradient or is counted."""
    config = LOSES_NOTHING_UNSEEN[name]
    if name == "dppo":
        config = config.model_copy(update={"drift_penalty": 0.0})
    loss, grad = evaluate(config, [ratio], [advantage])
    assert bool(loss.clipped.item()) or grad.item() != 0.0
