"""From episodes to samples and to each rank's updates."""

from __future__ import annotations

import random
from collections import Counter
from dataclasses import replace

import pytest

from polyturn.agents.episode import Episode, Outcome, TurnRecord
from polyturn.configs.schema.algorithm import AlgorithmConfig, CentredAdvantage
from polyturn.trainer.algorithms.advantages import RewardPart
from polyturn.trainer.credit.estimates import StepCredit, estimate_advantages, make_samples, reward_parts
from polyturn.trainer.data.balance import cut_into_updates, share_out
from polyturn.trainer.data.samples import TrainSample


def estimate(episodes: list[Episode], algorithm: AlgorithmConfig | None = None) -> StepCredit:
    scored = {sample.sample_id: sample for sample in make_samples(episodes)}
    return estimate_advantages(episodes, scored, algorithm or AlgorithmConfig())


def advantage_of(sample: TrainSample) -> float:
    """Its tokens' advantage, the same at all that were sampled."""
    assert sample.advantages is not None
    assert not sample.advantages[~sample.sampled].any()
    (value,) = set(sample.advantages[sample.sampled].tolist())
    return value


def test_each_segment_is_a_sample_with_its_episodes_advantage(make_episode) -> None:
    episodes = [make_episode("g", 0, 1.0, num_segments=3), make_episode("g", 1, 0.0)]
    result = estimate(episodes)
    assert [sample.sample_id for sample in result.samples] == ["g.0.0/0", "g.0.0/1", "g.0.0/2", "g.1.0/0"]
    assert len({advantage_of(sample) for sample in result.samples[:3]}) == 1
    # One episode each way: an episode counts once in its group, however many segments it has.
    assert advantage_of(result.samples[0]) == pytest.approx(-advantage_of(result.samples[3]))


@pytest.mark.catalogue("B4")
def test_a_lonely_episode_and_a_silent_one_are_not_trained_on(make_episode) -> None:
    """Nor is a silent one compared with: nobody wrote what its reward is for."""
    episodes = [
        make_episode("alone", 0, 1.0),
        make_episode("g", 0, 1.0),
        make_episode("g", 1, 0.0),
        make_episode("g", 2, 0.0, num_sampled=0),
    ]
    result = estimate(episodes)
    assert [sample.sample_id for sample in result.samples] == ["g.0.0/0", "g.1.0/0"]
    assert advantage_of(result.samples[0]) == pytest.approx(-advantage_of(result.samples[1]))
    assert result.metrics["group/num_singleton"] == 1


@pytest.mark.catalogue("B43")
def test_a_failed_episode_never_reaches_the_trainer(make_episode) -> None:
    failed = Episode(
        episode_id="g.0.0",
        group_id="g",
        env_id="env",
        task_id="task",
        seed=0,
        outcome=Outcome.FAILED,
        stop_reason="fault",
        reward=None,
    )
    with pytest.raises(AssertionError, match="never trained on"):
        make_samples([failed, make_episode("g", 1, 1.0)])


@pytest.mark.parametrize("turn", [0, 1])
def test_a_turn_whose_reward_is_no_number_is_told_wherever_it_stands(make_episode, turn: int) -> None:
    records = tuple(TurnRecord(reward=float("nan") if i == turn else 0.0) for i in range(2))
    with pytest.raises(ValueError, match="the rewards of its turns are"):
        estimate([replace(make_episode("g", 0, 1.0), turn_records=records)])


def test_turns_belong_to_the_role_that_took_them(make_episode) -> None:
    episode = make_episode("g", 0, 1.75)
    segments = tuple(replace(episode.segments[0], role=role) for role in ("a/0", "b/0"))
    records = tuple(
        TurnRecord(role=role, reward=reward, anchor=anchor)
        for role, reward, anchor in (("a/0", 0.25, "x"), ("b/0", 0.5, "y"), ("a/0", 1.0, "z"))
    )
    episode = replace(episode, segments=segments, turn_records=records)

    def parts(episode: Episode) -> list[RewardPart]:
        a, b = make_samples([episode])
        return reward_parts([episode], {"g.0.0/a/0": [a], "g.0.0/b/0": [b]}, AlgorithmConfig())

    first, second = parts(episode)
    # Both are worth the episode's reward; what the other one's turns were paid comes with their own last turn.
    assert (first.turn_rewards, first.anchors) == ((0.25, 1.5), ("x", "z"))
    assert (second.turn_rewards, second.anchors) == ((1.75,), ("y",))
    own, _ = parts(replace(episode, role_rewards={"a/0": 3.0}))
    assert own.turn_rewards == (0.0, 3.0), "a reward of its own came at the end"


def test_roles_are_compared_with_their_like(make_episode) -> None:
    def with_roles(sample: int, rewards: dict[str, float]) -> Episode:
        episode = make_episode("g", sample, 0.25)
        segments = tuple(replace(episode.segments[0], role=role) for role in rewards)
        return replace(episode, segments=segments, role_rewards=rewards)

    episodes = [
        with_roles(0, {"solver/0": 1.0, "solver/1": 0.0, "critic/0": 1.0}),
        with_roles(1, {"solver/0": 0.0, "solver/1": 0.0, "critic/0": 1.0}),
    ]
    result = estimate(episodes, AlgorithmConfig(advantage=CentredAdvantage(kind="dr_grpo")))
    assert result.advantages == {
        "g.0.0/solver/0": 0.75,
        "g.0.0/solver/1": -0.25,
        "g.0.0/critic/0": 0.0,
        "g.1.0/solver/0": -0.25,
        "g.1.0/solver/1": -0.25,
        "g.1.0/critic/0": 0.0,
    }
    assert [(sample.sample_id, sample.group_id) for sample in result.samples] == [
        (f"g.{number}.0/{index}", f"g/{kind}")
        for number in range(2)
        for index, kind in enumerate(("solver", "solver", "critic"))
    ]
    assert result.metrics["group/num_compared"] == 2


@pytest.mark.parametrize(("num_updates", "num_ranks"), [(1, 1), (1, 2), (3, 2), (2, 4)])
def test_updates_cover_every_sample_once_with_denominators_of_the_whole(
    make_episode, num_updates: int, num_ranks: int
) -> None:
    rng = random.Random(0)
    episodes = [
        make_episode(f"g{index // 4}", index % 4, float(rng.random() < 0.5), num_sampled=rng.randint(1, 9))
        for index in range(24)
    ]
    samples = estimate(episodes).samples
    ranks = share_out(cut_into_updates(samples, num_updates), num_ranks)
    assert [len(shares) for shares in ranks] == [num_updates] * num_ranks
    seen = Counter(sample.sample_id for shares in ranks for share in shares for sample in share.samples)
    assert seen == Counter(sample.sample_id for sample in samples)
    for update in range(num_updates):
        parts = [shares[update] for shares in ranks]
        total = sum(sample.num_trainable for part in parts for sample in part.samples)
        assert {part.counts.num_tokens for part in parts} == {total}
        assert {part.counts.num_sequences for part in parts} == {sum(len(part.samples) for part in parts)}
