"""What happens to rewards before they are compared, and to episodes that a limit ended; the critic's loss."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from pydantic import TypeAdapter

from polyturn.agents.episode import Episode
from polyturn.configs.schema.algorithm import (
    Advantage,
    AlgorithmConfig,
    CentredAdvantage,
    GDPOAdvantage,
    GroupAdvantage,
    GroupedSection,
    MaxRLAdvantage,
    OverlongShaping,
)
from polyturn.configs.schema.objective import KLInReward
from polyturn.configs.schema.section import Plugin
from polyturn.trainer.algorithms.losses import value_loss
from polyturn.trainer.algorithms.registry import ADVANTAGES
from polyturn.trainer.credit.estimates import StepCredit, estimate_advantages, make_samples

OVERLONG = OverlongShaping(kind="overlong", max_tokens=8, buffer_tokens=4, factor=2.0)
CENTRED = CentredAdvantage(kind="dr_grpo")


def estimate(episodes: list[Episode], algorithm: AlgorithmConfig, **columns: float) -> StepCredit:
    scored = {
        sample.sample_id: replace(
            sample,
            **{name: torch.full((len(sample),), value).numpy() for name, value in columns.items()},
        )
        for sample in make_samples(episodes)
    }
    return estimate_advantages(episodes, scored, algorithm)


def test_the_punishment_of_long_answers_grows_over_the_buffer(make_episode) -> None:
    lengths = (3, 4, 5, 6, 8, 20, 3)
    rewards = [1.0] * 6 + [0.0]
    episodes = [
        make_episode("g", i, reward, num_sampled=n)
        for i, (reward, n) in enumerate(zip(rewards, lengths, strict=True))
    ]
    found = estimate(episodes, AlgorithmConfig(reward_shaping=OVERLONG, advantage=CENTRED))
    shaped = [1.0, 1.0, 0.5, 0.0, -1.0, -1.0, 0.0]
    mean = sum(shaped) / 7
    assert list(found.advantages.values()) == pytest.approx([value - mean for value in shaped])
    assert found.metrics["shaping/reward_mean"] == pytest.approx(mean)


SHAPEABLE = sorted(
    entry.name
    for entry in ADVANTAGES
    if issubclass(entry.config, GroupedSection) and entry.name not in ("gdpo", "maxrl")
)


@pytest.mark.parametrize("kind", SHAPEABLE)
@pytest.mark.parametrize("reward", [0.0, 1.0])
def test_answers_of_one_reward_are_alike_however_long_they_are(
    make_episode, kind: str, reward: float
) -> None:
    """Groups are told apart by what the task paid: DAPO filters on accuracy, and punishes length in what is left."""
    lengths = (2, 3, 6, 4)
    uniform = [make_episode("u", i, reward, num_sampled=n) for i, n in enumerate(lengths)]
    telling = [make_episode("t", i, float(i == 0), num_sampled=n) for i, n in enumerate(lengths)]

    def found(**options: str) -> StepCredit:
        section = TypeAdapter(Advantage).validate_python({"kind": kind, "whiten": False, **options})
        return estimate([*uniform, *telling], AlgorithmConfig(reward_shaping=OVERLONG, advantage=section))

    dropped = found(uniform="drop")
    assert {sample.group_id for sample in dropped.samples} == {"t"}
    assert dropped.metrics["group/num_uniform"] == 1
    kept = found(uniform="zero")
    assert len(kept.samples) == 8
    assert all(kept.advantages[episode.episode_id] == 0 for episode in uniform)
    # Where rewards differ, the punishment is in what is compared.
    assert kept.advantages["t.2.0"] < kept.advantages["t.1.0"]


@pytest.mark.parametrize("kind", SHAPEABLE)
def test_sums_that_differ_by_rounding_are_one_reward(make_episode, kind: str) -> None:
    rewards = {"g": (0.1 + 0.2, 0.3, 0.3, 0.3), "h": (0.1 + 0.2 - 0.3, 0.0, 0.0, 0.0)}
    assert all(len(set(values)) == 2 for values in rewards.values())
    episodes = [
        make_episode(group, i, reward, num_sampled=n)
        for group, values in rewards.items()
        for i, (reward, n) in enumerate(zip(values, (2, 3, 6, 8), strict=True))
    ]
    section = TypeAdapter(Advantage).validate_python({"kind": kind, "whiten": False})
    found = estimate(episodes, AlgorithmConfig(reward_shaping=OVERLONG, advantage=section))
    assert set(found.advantages.values()) == {0.0}


@pytest.mark.parametrize("kind", sorted([*SHAPEABLE, "gdpo", "maxrl"]))
def test_groups_may_be_told_apart_by_one_part_of_a_reward(make_episode, kind: str) -> None:
    """As by the right answer, where the reward has a bonus for its form or takes something off for its length."""

    def graded(group: str, sample: int, right: float, brief: float) -> Episode:
        episode = make_episode(group, sample, right + brief)
        return replace(episode, reward_parts={"right": right, "brief": brief})

    wrong = [graded("w", i, 0.0, 0.1 * i) for i in range(4)]
    mixed = [graded("m", i, float(i == 0), 0.1 * i) for i in range(4)]

    def found(**options: str) -> StepCredit:
        section = TypeAdapter(Advantage).validate_python({"kind": kind, "whiten": False, **options})
        return estimate([*wrong, *mixed], AlgorithmConfig(advantage=section))

    dropped = found(uniform="drop", uniform_by="right")
    assert {sample.group_id for sample in dropped.samples} == {"m"}
    assert len(found(uniform="drop").samples) == 8
    if kind != "gdpo":  # which normalises over the batch
        kept = found(uniform_by="right")
        assert all(kept.advantages[episode.episode_id] == 0 for episode in wrong)
        assert kept.advantages["m.0.0"] == dropped.advantages["m.0.0"] or kind == "gpg"
    with pytest.raises(ValueError, match="did you mean 'right'"):
        found(uniform_by="rihgt")


def test_a_kl_in_the_reward_makes_no_group_tell_anything_and_is_kept_where_it_stays(make_episode) -> None:
    episodes = [make_episode("g", 0, 0.0, num_sampled=2), make_episode("g", 1, 0.0, num_sampled=4)]

    def found(uniform: str) -> StepCredit:
        advantage = CentredAdvantage(kind="dr_grpo", uniform=uniform)
        kl = KLInReward(kind="in_reward", coefficient=0.5)
        algorithm = AlgorithmConfig(kl=kl, advantage=advantage, reward_shaping=OVERLONG)
        return estimate(episodes, algorithm, proximal_logprobs=-1.0, reference_logprobs=-1.5)

    assert found("drop").samples == ()
    # 2 and 4 tokens at 0.25 each.
    assert list(found("zero").advantages.values()) == pytest.approx([0.25, -0.25])


def test_shaping_that_an_advantage_does_not_read_is_refused() -> None:
    with pytest.raises(ValueError, match="compares the reward's parts"):
        AlgorithmConfig(reward_shaping=OVERLONG, advantage=GDPOAdvantage(kind="gdpo"))
    with pytest.raises(ValueError, match="the punishment makes negative"):
        AlgorithmConfig(reward_shaping=OVERLONG, advantage=MaxRLAdvantage(kind="maxrl"))


def test_a_buffer_longer_than_the_answer_is_refused() -> None:
    with pytest.raises(ValueError, match="begin before the answer"):
        OverlongShaping(kind="overlong", max_tokens=4, buffer_tokens=8)


@pytest.mark.catalogue("B11", "B42")
def test_a_truncated_episode_is_trained_on_masked_or_as_if_never_played(make_episode) -> None:
    episodes = [
        make_episode("g", 0, 1.0),
        make_episode("g", 1, 0.0),
        make_episode("g", 2, 0.5, truncated=True),
    ]

    def found(truncated: str) -> StepCredit:
        return estimate(episodes, AlgorithmConfig(truncated=truncated, advantage=CENTRED))

    def trained(result: StepCredit) -> list[str]:
        return [sample.sample_id for sample in result.samples]

    assert trained(found("train")) == ["g.0.0/0", "g.1.0/0", "g.2.0/0"]
    masked = found("mask")
    assert trained(masked) == ["g.0.0/0", "g.1.0/0"]
    assert masked.metrics["truncated/num_masked"] == 1
    dropped = found("drop")
    never = estimate(episodes[:2], AlgorithmConfig(advantage=CENTRED))
    assert trained(dropped) == trained(never) and dropped.advantages == never.advantages
    assert dropped.metrics["truncated/num_dropped"] == 1


def test_masking_keeps_the_reward_in_the_comparison(make_episode) -> None:
    episodes = [
        make_episode("g", 0, 1.0),
        make_episode("g", 1, 0.0),
        make_episode("g", 2, 0.0, truncated=True),
    ]
    found = estimate(episodes, AlgorithmConfig(truncated="mask", advantage=CENTRED))
    assert found.advantages["g.0.0"] == pytest.approx(2 / 3)


def test_a_plugin_shapes_rewards_and_is_told_what_it_gave(make_episode, tmp_path) -> None:
    (tmp_path / "mine.py").write_text(
        "def half(rewards, parts, scale=0.5):\n    return [scale * r for r in rewards]\n"
        "def short(rewards, parts):\n    return rewards[:1]\n"
        "def broken(rewards, parts):\n    return [float('nan')] * len(parts)\n"
    )

    def algorithm(name: str, **options: float) -> AlgorithmConfig:
        plugin = Plugin(kind="plugin", target=f"{tmp_path / 'mine.py'}:{name}", options=options)
        return AlgorithmConfig(reward_shaping=plugin, advantage=CENTRED)

    episodes = [make_episode("g", 0, 1.0), make_episode("g", 1, 0.0)]
    assert list(estimate(episodes, algorithm("half")).advantages.values()) == [0.25, -0.25]
    assert list(estimate(episodes, algorithm("half", scale=4.0)).advantages.values()) == [2.0, -2.0]
    with pytest.raises(ValueError, match="1 rewards for 2 episodes"):
        estimate(episodes, algorithm("short"))
    with pytest.raises(ValueError, match=r"'g\.0\.0' nan"):
        estimate(episodes, algorithm("broken"))


def test_an_estimator_of_ones_own_must_fit_the_samples(make_episode, tmp_path) -> None:
    (tmp_path / "mine.py").write_text(
        "import numpy as np\n"
        "from polyturn.trainer.algorithms.advantages import Advantages\n"
        "def make(step, value):\n"
        "    return Advantages(trainable=(True,) * len(step.parts), columns=tuple(tuple(\n"
        "        np.full(len(s.sampled) - (value == 7), value, np.float32) for s in p.samples) for p in step.parts))\n"
    )

    def algorithm(value: float) -> AlgorithmConfig:
        target = f"{tmp_path / 'mine.py'}:make"
        return AlgorithmConfig(advantage=Plugin(kind="plugin", target=target, options={"value": value}))

    episodes = [make_episode("g", 0, 1.0), make_episode("g", 1, 0.0)]
    assert list(estimate(episodes, algorithm(2.0)).advantages.values()) == [2.0, 2.0]
    with pytest.raises(ValueError, match="shapes"):
        estimate(episodes, algorithm(7.0))
    with pytest.raises(ValueError, match="not finite"):
        estimate(episodes, algorithm(float("inf")))


@pytest.mark.catalogue("B12")
def test_a_kl_in_the_reward_is_a_penalty_of_tokens_and_not_divided_by(make_episode) -> None:
    kl = KLInReward(kind="in_reward", coefficient=0.5)
    with pytest.raises(ValueError, match="divides rewards"):
        AlgorithmConfig(kl=kl, advantage=GroupAdvantage())
    episodes = [make_episode("g", 0, 1.0, num_sampled=2), make_episode("g", 1, 0.0, num_sampled=4)]
    algorithm = AlgorithmConfig(kl=kl, advantage=CENTRED)
    found = estimate(episodes, algorithm, proximal_logprobs=-1.0, reference_logprobs=-1.5)
    # k1 is 0.5 a token: the rewards are 1 - 2 * 0.25 and 0 - 4 * 0.25.
    assert list(found.advantages.values()) == pytest.approx([0.75, -0.75])
    assert found.metrics["kl/reward_penalty"] == pytest.approx(0.75)


def test_the_value_loss_has_its_closed_form_and_gradient() -> None:
    values = torch.tensor([1.0, 3.0, 0.0, 5.0], requires_grad=True)
    old = torch.tensor([0.5, 1.0, 0.0, 9.0])
    returns = torch.tensor([2.0, 0.0, 1.0, 9.0])
    mask = torch.tensor([True, True, True, False])
    plain = value_loss(values, returns, mask)
    assert plain.values.tolist() == [0.5, 4.5, 0.5, 0.0]
    bounded = value_loss(values, returns, mask, old_values=old, clip=0.2)
    # The first would move from 0.5 to 1.0, towards its return: held at 0.7. The second went away from it: not held.
    assert bounded.values.tolist() == pytest.approx([0.5 * 1.3**2, 4.5, 0.5, 0.0])
    assert bounded.clipped.tolist() == [True, False, False, False]
    bounded.values.sum().backward()
    assert values.grad is not None and values.grad.tolist() == pytest.approx([0.0, 3.0, -1.0, 0.0])


@pytest.mark.parametrize("garbage", [float("nan"), 1e9])
def test_masked_values_have_no_part_in_the_loss(garbage: float) -> None:
    mask = torch.tensor([True, False])
    values = torch.tensor([1.0, garbage], requires_grad=True)
    others = torch.tensor([2.0, garbage])
    for loss in (
        value_loss(values, others, mask),
        value_loss(values, others, mask, old_values=others, clip=0.1),
    ):
        assert loss.values[1] == 0
        (gradient,) = torch.autograd.grad(loss.values.sum(), values)
        assert gradient[1] == 0 and torch.isfinite(gradient).all()
