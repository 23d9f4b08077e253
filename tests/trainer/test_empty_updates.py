"""Steps and updates with little or nothing to train on: a case of the loop, never an error."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from polyturn.agents.episode import Episode
from polyturn.configs.loading.loader import load_config, shipped_names
from polyturn.configs.schema.run import RunConfig
from polyturn.rollout.groups import Group, Prompt
from polyturn.rollout.scheduler import StepGroups
from polyturn.trainer.credit.estimates import StepCredit, assign_credit, make_samples
from polyturn.trainer.data.balance import cut_into_updates, share_out
from polyturn.trainer.data.samples import SKIPPED, TrainSample, Update, UpdateReport
from polyturn.trainer.ranks.rank import PolicyRank
from polyturn.trainer.ranks.trainer import Trainer, _left_out
from polyturn.trainer.run.cluster import reserve
from polyturn.trainer.run.metrics import step_metrics
from tests.support.samples import make_sample

Episodes = Callable[..., Episode]


def algorithm_config(tmp_path: Path, name: str, *overrides: str) -> RunConfig:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(f"extends: [quickstart, algorithms/{name}]\nname: trial\n")
    return load_config(recipe, ["trainer.global_batch_size=4", "trainer.updates_per_step=4", *overrides])


def scored(samples: tuple[TrainSample, ...]) -> dict[str, TrainSample]:
    """With every column that an algorithm may ask for."""
    columns = ("proximal_logprobs", "reference_logprobs", "teacher_logprobs", "values")
    return {
        sample.sample_id: replace(
            sample, **{name: np.full(len(sample), -1.0, dtype=np.float32) for name in columns}
        )
        for sample in samples
    }


def play(make_episode: Episodes, kind: str) -> list[Episode]:
    """4 x 4 episodes of which few or none are left to train on."""
    rewards = [[0.0] * 4 for _ in range(4)]
    if kind == "one group differs":
        rewards[2] = [1.0, 0.0, 0.0, 0.0]
    return [
        make_episode(
            f"g{group}",
            index,
            reward,
            truncated=kind == "all truncated",
            num_sampled=0 if kind == "no tokens" else 3,
        )
        for group, of_group in enumerate(rewards)
        for index, reward in enumerate(of_group)
    ]


def cut(config: RunConfig, samples: tuple[TrainSample, ...]) -> list[list[Update]]:
    trainer = config.trainer
    updates = cut_into_updates(samples, trainer.updates_per_step)
    return share_out(updates, 2, trainer.balance, shared_prefix=trainer.shared_prefix)


@pytest.mark.parametrize("truncated", ["train", "drop", "mask"])
@pytest.mark.parametrize("kind", ["all uniform", "one group differs", "all truncated", "no tokens"])
@pytest.mark.parametrize("name", [name for name in shipped_names("algorithm") if name != "supervised"])
def test_every_shipped_algorithm_takes_a_step_that_has_little_to_tell(
    tmp_path: Path, make_episode: Episodes, name: str, kind: str, truncated: str
) -> None:
    config = algorithm_config(tmp_path, name, f"trainer.algorithm.truncated={truncated}")
    algorithm = config.trainer.algorithm
    episodes = play(make_episode, kind)
    credit = assign_credit(episodes, scored(make_samples(episodes)), algorithm, version=0)
    if getattr(algorithm.advantage, "uniform", "zero") == "drop":
        assert {sample.group_id for sample in credit.samples} <= {"g2"}
    shares = cut(config, credit.samples)
    assert all(len(of_rank) == 4 for of_rank in shares)
    found = sorted(sample.sample_id for of_rank in shares for share in of_rank for sample in share.samples)
    assert found == sorted(sample.sample_id for sample in credit.samples)
    reports = [_left_out(of_rank) for of_rank in shares]
    row = metrics_of(episodes, credit, reports)
    num_empty = 4 - min(4, len({sample.sequence_id for sample in credit.samples}))
    assert (row["train/empty_updates"], row["train/skipped_updates"]) == (num_empty, num_empty)


def metrics_of(episodes: list[Episode], credit: StepCredit, reports: list[UpdateReport]) -> dict[str, float]:
    groups = [
        Group(
            group_id=group_id,
            prompt=Prompt(task_index=0, epoch=0, position=0, group_id=group_id),
            episodes=tuple(episode for episode in episodes if episode.group_id == group_id),
            num_expected=4,
            num_dropped=0,
            num_retries=0,
        )
        for group_id in dict.fromkeys(episode.group_id for episode in episodes)
    ]
    taken = StepGroups(
        groups=tuple(groups),
        wait_s=1.0,
        num_filtered={},
        num_stale=0,
        gave_up=False,
        num_in_play=0,
    )
    return step_metrics(
        taken=taken,
        credit=credit,
        reports=reports,
        seconds={"generate": 1.0, "tools": 0.0, "train": 1.0},
        total_seconds=2.0,
        version=4,
        sync=None,
    )


@given(
    lengths=st.lists(st.integers(0, 4), max_size=5),
    num_updates=st.integers(1, 4),
    num_ranks=st.integers(1, 3),
)
def test_any_number_of_samples_is_cut_into_any_number_of_updates(
    lengths: list[int], num_updates: int, num_ranks: int
) -> None:
    samples = [
        make_sample(range(length + 1), name=f"e{index}/0", sequence_id=f"e{index}")
        for index, length in enumerate(lengths)
    ]
    for shared_prefix in ("off", "tree"):
        shares = share_out(cut_into_updates(samples, num_updates), num_ranks, shared_prefix=shared_prefix)
        assert len(shares) == num_ranks and {len(of_rank) for of_rank in shares} == {num_updates}
        for update in zip(*shares, strict=True):
            total = sum(sample.num_trainable for share in update for sample in share.samples)
            # All ranks agree on the denominators, and so on whether there is an update at all.
            assert {share.counts.num_tokens for share in update} == {total}
            assert {share.is_empty for share in update} == {total == 0}


SMALL = (
    "trainer.algorithm.advantage={kind: grpo, uniform: drop}",
    "trainer.global_batch_size=1",
    "trainer.updates_per_step=2",
    "rollout.prompts_per_step=1",
    "rollout.samples_per_prompt=2",
    "trainer.max_tokens_per_gpu=64",
)


@pytest.mark.stack
def test_an_empty_update_moves_nothing_and_keeps_count(make_model, make_samples) -> None:
    """After an update with momentum, one without a gradient would move the weights."""
    path = make_model()
    config = load_config("quickstart", [*SMALL, f"model.path={path}", "trainer.parallel.data=1"])
    rank = PolicyRank(config=config, model_path=str(path), rank=0)
    rank.build("127.0.0.1", 0)
    try:
        (sample,) = make_samples([6])
        (shares,) = share_out(cut_into_updates([with_proximal(sample)], 2), 1)
        assert [share.is_empty for share in shares] == [True, False]
        first = rank.update(shares)
        assert first.metrics[0] == SKIPPED and first.metrics[1]["grad_norm"] > 0
        before = {name: tensor.clone() for name, tensor in rank.policy.named_hf_tensors()}
        (nothing,) = share_out(cut_into_updates([], 2), 1)
        report = rank.update(nothing)
        assert report.metrics == (SKIPPED, SKIPPED) and report.trained_tokens == {}
        assert all(tensor.equal(before[name]) for name, tensor in rank.policy.named_hf_tensors())
        assert rank.policy.num_updates == 4, "schedules and versions count on"
        assert "grad_norm" in rank.update(shares).metrics[1]
    finally:
        rank.close()


def with_proximal(sample: TrainSample) -> TrainSample:
    return replace(sample, proximal_logprobs=sample.behavior_logprobs)


OF_THE_DRIVER = ("polyturn.trainer.run", "polyturn.trainer.credit", "polyturn.trainer.ranks.trainer")


@pytest.mark.stack
def test_an_update_with_samples_on_one_rank_of_two(ray_session, make_model, make_samples) -> None:
    path = make_model()
    config = load_config("quickstart", [*SMALL, f"model.path={path}", "trainer.parallel.data=2"])
    reservation = reserve(config)
    group = Trainer(config, model_path=path, reservation=reservation)
    try:
        group.build()
        (sample,) = make_samples([6])
        modules = group._policy.on_all(
            lambda rank: [name for name in sys.modules if name.startswith(OF_THE_DRIVER)]
        )
        assert modules == [[], []], "a rank imports nothing of the driver"
        (scored,) = group.score([sample]).values()
        assert scored.proximal_logprobs is not None
        reports = group.update(cut_into_updates([with_proximal(sample)], 2))
        assert all(report.metrics[0] == SKIPPED for report in reports)
        assert reports[0].metrics == reports[1].metrics and reports[0].metrics[1]["grad_norm"] > 0
        assert [name for report in reports for name in report.trained_tokens] == [sample.sample_id]
    finally:
        group.close()
        reservation.release()
