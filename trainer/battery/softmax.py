"""Expected gradients, exactly: all tokens of a small softmax policy, each with its probability."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import torch

from polyturn.trainer.algorithms.advantages import RewardBatch, RewardPart, TokenColumns
from polyturn.trainer.algorithms.protocols import AdvantageEstimator, KLEstimator, PolicyLoss
from polyturn.trainer.algorithms.registry import Gradient
from polyturn.trainer.battery.invariances import BatteryFailure, require, require_equal
from polyturn.trainer.battery.rows import Row, count, to_batch

NUM_TOKENS = 4
"""In the vocabulary."""
TOLERANCE = 1e-9


def check_loss_gradient(loss: PolicyLoss, claim: Gradient, seed: int) -> None:
    """Raise `BatteryFailure` unless a policy loss has the gradient that it claims, in expectation over its samples.

    `on_policy_gradient` is tried on answers of one and of two tokens, `policy_gradient` on answers of one token that
    were drawn from another policy, which stands as behavior and as proximal.
    """
    for length in (1, 2) if claim != "policy_gradient" else (1,):
        expected, found = _loss_gradients(loss, seed, length=length, on_policy=claim != "policy_gradient")
        what = f"the expected gradient, over answers of {length} token(s), is not minus that of the advantage"
        if claim in ("on_policy_gradient", "policy_gradient"):
            require_equal(found, expected, what, tolerance=TOLERANCE)
        elif claim == "zero":
            require_equal(
                found, torch.zeros_like(found), "the expected gradient is not 0", tolerance=TOLERANCE
            )
        else:
            require(claim == "biased", f"a policy loss cannot claim {claim!r}")
            require(not _close(found, expected), "the gradient is called biased, but it is exact")


def _loss_gradients(
    loss: PolicyLoss, seed: int, *, length: int, on_policy: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """Minus the gradient of the expected advantage, and the expected gradient of the loss, by all logits."""
    generator = torch.Generator().manual_seed(seed)
    contexts = [NUM_TOKENS**place for place in range(length)]
    logits, other = (
        [torch.randn(rows, NUM_TOKENS, generator=generator, dtype=torch.float64) for rows in contexts]
        for _ in range(2)
    )
    leaves = [table.clone().requires_grad_() for table in logits]
    sampler = [table.log_softmax(-1) for table in (logits if on_policy else other)]
    answers = list(itertools.product(range(NUM_TOKENS), repeat=length))
    advantages = torch.randn(len(answers), generator=generator, dtype=torch.float64)

    def logprobs(tables: list[torch.Tensor], answer: tuple[int, ...]) -> torch.Tensor:
        picked, context = [], 0
        for table, token in zip(tables, answer, strict=True):
            picked.append(table[context, token])
            context = context * NUM_TOKENS + token
        return torch.stack(picked)

    ours = [table.log_softmax(-1) for table in leaves]
    expectation = torch.stack([logprobs(ours, answer).sum().exp() for answer in answers]) @ advantages
    expected = -torch.cat([g.flatten() for g in torch.autograd.grad(expectation, leaves, retain_graph=True)])

    rows = []
    for index, answer in enumerate(answers):
        theirs = logprobs(sampler, answer)
        columns = dict.fromkeys(("behavior_logprobs", "proximal_logprobs", "reference_logprobs"), theirs)
        columns["logprobs"] = logprobs(ours, answer).detach()
        columns["entropies"] = torch.ones(length, dtype=torch.float64)
        columns["advantages"] = advantages[index].repeat(length)
        columns["correction_weights"] = torch.ones(length, dtype=torch.float64)
        columns["turns"] = columns["policy_versions"] = torch.zeros(length, dtype=torch.int64)
        rows.append(
            Row(
                columns=columns,
                mask=torch.ones(length, dtype=torch.bool),
                sequence=f"sequence-{index}",
                prompt="prompt",
            )
        )
    batch = to_batch(rows, count(rows))
    probabilities = torch.stack([logprobs(sampler, answer).sum().exp() for answer in answers])
    total = (loss(batch).values * probabilities.repeat_interleave(length)).sum()
    if total.requires_grad:
        total.backward()
    if batch.logprobs.grad is not None:
        (torch.cat([logprobs(ours, answer) for answer in answers]) * batch.logprobs.grad).sum().backward()
    found = torch.cat(
        [(torch.zeros_like(leaf) if leaf.grad is None else leaf.grad).flatten() for leaf in leaves]
    )
    return expected, found


def check_kl_gradient(estimator: KLEstimator, placement: str, claim: Gradient, seed: int) -> None:
    """Raise `BatteryFailure` unless an estimator has, in this placement, the gradient that it claims."""
    generator = torch.Generator().manual_seed(seed)
    logits, reference, sampler = torch.randn(3, NUM_TOKENS, generator=generator, dtype=torch.float64)
    log_reference, log_sampler = reference.log_softmax(-1), sampler.log_softmax(-1)

    def gradient(value: Callable[[torch.Tensor], torch.Tensor]) -> torch.Tensor:
        leaf = logits.clone().requires_grad_()
        (found,) = torch.autograd.grad(value(leaf.log_softmax(-1)), leaf)
        return found

    reverse = gradient(lambda policy: (policy.exp() * (policy - log_reference)).sum())
    forward = gradient(lambda policy: -(log_reference.exp() * policy).sum())
    mask = torch.ones(NUM_TOKENS, dtype=torch.bool)

    def value(policy: torch.Tensor) -> torch.Tensor:
        estimates, here = estimator(policy, log_reference, mask), policy.detach()
        ratio = (policy - log_sampler).exp()
        terms = {
            "loss": here.exp() * estimates,
            "loss_times_detached_ratio": log_sampler.exp() * ratio.detach() * estimates,
            "loss_times_ratio": log_sampler.exp() * ratio * estimates,
            # A reward without gradient, times that of the token's logprob.
            "reward": here.exp() * estimates.detach() * policy,
        }
        if placement not in terms:
            raise BatteryFailure(f"there is no placement {placement!r}; there are {', '.join(terms)}")
        return terms[placement].sum()

    found = gradient(value)
    targets = {
        "zero": torch.zeros_like(reverse),
        "reverse_kl": reverse,
        "forward_kl": forward,
        "reverse_minus_forward_kl": reverse - forward,
    }
    if claim in targets:
        require_equal(
            found, targets[claim], f"the gradient as {placement} is not {claim}", tolerance=TOLERANCE
        )
    else:
        require(claim == "biased", f"a KL estimator cannot claim {claim!r}")
        require(
            not any(_close(found, target) for target in targets.values()),
            f"the gradient as {placement} is called biased, but it is exact",
        )


def check_advantage_gradient(estimator: AdvantageEstimator, claim: Gradient, seed: int) -> None:
    """Raise `BatteryFailure` unless the mean of A grad log p over a step has the expectation that is claimed.

    Steps of one group of three answers, and of two groups of two; all answers there can be are tried, each with its
    probability. Some answers go on for a second token that is certain: their length must not matter.
    """
    sizes = ((3,), (2, 2))
    pairs = [_advantage_gradients(estimator, seed, sizes=groups) for groups in sizes]
    factors = {
        "zero": [0.0 for _ in sizes],
        "policy_gradient": [1.0 for _ in sizes],
        "scaled_policy_gradient": [(groups[0] - 1) / groups[0] for groups in sizes],
    }
    if claim in factors:
        for (expected, found), factor, groups in zip(pairs, factors[claim], sizes, strict=True):
            what = f"with groups of {groups[0]} the expected gradient is not {factor:.4g} times that of the reward"
            # The columns are float32.
            require_equal(found, factor * expected, what, tolerance=1e-6)
        return
    require(claim == "biased", f"an advantage cannot claim {claim!r}")
    for name, claimed in factors.items():
        exact = all(
            _close(found, factor * expected) for (expected, found), factor in zip(pairs, claimed, strict=True)
        )
        require(not exact, f"the gradient is called biased, but it is {name}")


def _advantage_gradients(
    estimator: AdvantageEstimator, seed: int, *, sizes: tuple[int, ...]
) -> tuple[torch.Tensor, torch.Tensor]:
    """The gradient of the expected reward, and the expectation of the mean over answers of A grad log p."""
    generator = torch.Generator().manual_seed(seed)
    num_answers = 3
    logits = torch.randn(num_answers, generator=generator, dtype=torch.float64)
    rewards = torch.rand(num_answers, generator=generator, dtype=torch.float64) + 0.1
    policy = logits.softmax(-1)
    groups = [f"group-{index}" for index, size in enumerate(sizes) for _ in range(size)]
    found = torch.zeros_like(policy)
    for answers in itertools.product(range(num_answers), repeat=len(groups)):
        parts = tuple(
            _short_part(index, group_id, rewards[answer].item(), length=1 + answer % 2)
            for index, (group_id, answer) in enumerate(zip(groups, answers, strict=True))
        )
        probability = policy[list(answers)].prod()
        for answer, columns in zip(answers, estimator(RewardBatch(parts=parts)).columns, strict=True):
            score = torch.eye(num_answers, dtype=torch.float64)[answer] - policy
            found += probability * float(columns[0][1]) * score / len(groups)
    return policy * (rewards - policy @ rewards), found


def _short_part(index: int, group_id: str, reward: float, *, length: int) -> RewardPart:
    """A prompt of one token and an answer in one turn, whose first token decides; the critic says 0.25 everywhere."""
    sampled = torch.tensor([False] + [True] * length)
    column = TokenColumns(
        sampled=sampled.numpy(),
        turns=torch.zeros(1 + length, dtype=torch.int32).numpy(),
        values=torch.full((1 + length,), 0.25).numpy(),
    )
    return RewardPart(
        part_id=f"part-{index}",
        group_id=group_id,
        reward=reward,
        samples=(column,),
        reward_parts={"task": reward},
        turn_rewards=(reward,),
        anchors=("start",),
    )


def _close(found: torch.Tensor, expected: torch.Tensor) -> bool:
    return bool(((found - expected).abs() <= 1e-6).all())
