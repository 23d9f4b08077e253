"""Environments of a mixture with algorithms of their own: credit, denominators, loss and figures of each."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from polyturn.agents.episode import Episode
from polyturn.configs.errors import ConfigError
from polyturn.configs.loading.loader import load_config
from polyturn.configs.schema.algorithm import AlgorithmConfig
from polyturn.configs.schema.objective import ClipLoss, GSPOLoss, KLInLoss, SequenceMean
from polyturn.configs.schema.run import RunConfig
from polyturn.configs.schema.trainer import OptimizerConfig
from polyturn.trainer.algorithms.objective import Objective
from polyturn.trainer.credit.estimates import StepCredit, assign_credit, make_samples
from polyturn.trainer.data.balance import cut_into_updates
from polyturn.trainer.data.samples import TrainSample, count_samples
from polyturn.trainer.run.metrics import environment_metrics
from polyturn.trainer.run.preflight import check_own_algorithms
from tests.support.megatron.policies import make_policy
from tests.support.samples import random_samples

LENGTHS = [30, 41, 24, 60, 50, 13, 27, 30]
GRPO = AlgorithmConfig()
CENTRED = AlgorithmConfig.model_validate(
    {"advantage": {"kind": "dr_grpo"}, "corrections": [{"kind": "veto"}]}
)


@pytest.fixture
def episodes(make_episode) -> list[Episode]:
    """Two groups of each of two environments, taking turns, of unequal lengths."""
    made = []
    for group in range(4):
        for sample in range(3):
            episode = make_episode(
                f"g{group}", sample, float(sample == group % 3), num_sampled=2 + sample + group
            )
            made.append(replace(episode, env_id=f"env-{group % 2}"))
    return made


def credit_of(
    episodes: list[Episode], algorithm: AlgorithmConfig, own: dict[str, AlgorithmConfig] | None = None
) -> StepCredit:
    scored = {
        sample.sample_id: replace(sample, proximal_logprobs=sample.behavior_logprobs + 0.1)
        for sample in make_samples(episodes, environments=own or ())
    }
    return assign_credit(episodes, scored, algorithm, version=0, own_algorithms=own)


def columns(credit: StepCredit) -> dict[str, list[float]]:
    return {sample.sample_id: sample.advantages.tolist() for sample in credit.samples}


def test_each_environment_is_worth_what_its_own_algorithm_says(episodes):
    mixed = credit_of(episodes, GRPO, {"env-1": CENTRED})
    first = [episode for episode in episodes if episode.env_id == "env-0"]
    second = [episode for episode in episodes if episode.env_id == "env-1"]
    alone = {**columns(credit_of(first, GRPO)), **columns(credit_of(second, CENTRED))}
    assert columns(mixed) == alone
    # What is cut into updates by order stays in the order in which it was drawn.
    assert [sample.sample_id for sample in mixed.samples] == [
        f"{episode.episode_id}/0" for episode in episodes
    ]
    assert [sample.environment for sample in mixed.samples[:4]] == ["", "", "", "env-1"]
    assert all((s.correction_weights is not None) == (s.environment == "env-1") for s in mixed.samples)
    assert mixed.metrics["group/num_compared"] == 4
    assert mixed.metrics["environment/env-1/group/num_compared"] == 2
    assert mixed.metrics["environment/others/advantage/std"] == pytest.approx(
        credit_of(first, GRPO).metrics["advantage/std"]
    )
    assert mixed.metrics["environment/env-1/correction/veto/rejected_sequences"] == 0
    tokens = sum(sample.num_trainable for sample in mixed.samples)
    assert mixed.metrics["offpolicy/age_0/tokens"] == tokens
    assert mixed.advantages.keys() == {episode.episode_id for episode in episodes}


def test_one_environment_with_an_algorithm_of_its_own_is_the_plain_run(episodes):
    (one,) = {episode.env_id for episode in episodes[:3]}
    plain, own = credit_of(episodes[:3], CENTRED), credit_of(episodes[:3], GRPO, {one: CENTRED})
    assert columns(own) == columns(plain)
    whole, parts = (cut_into_updates(credit.samples, 1)[0].counts for credit in (plain, own))
    assert replace(parts, by_environment={}) == whole and parts.by_environment == {one: whole}


def test_denominators_are_of_the_samples_of_each_environment():
    samples = in_environments(random_samples(LENGTHS), ["a", "b"])
    counts = count_samples(samples)
    for name in ("a", "b"):
        alone = count_samples([replace(s, environment="") for s in samples if s.environment == name])
        assert counts.by_environment[name] == alone
    assert counts.num_tokens == sum(own.num_tokens for own in counts.by_environment.values())
    assert count_samples([replace(s, environment="") for s in samples]).by_environment == {}


def in_environments(samples: list[TrainSample], names: list[str]) -> list[TrainSample]:
    """Groups of two, each of the next environment."""
    return [replace(s, environment=names[i // 2 % len(names)]) for i, s in enumerate(samples)]


def train(
    path: Path, samples: list[TrainSample], objective: Objective, max_tokens: int = 8192
) -> dict[str, float]:
    """The metrics of two updates, the second of which shows where the first one led."""
    policy = make_policy(
        path,
        optimizer=OptimizerConfig(learning_rate=0.01, epsilon=1e-3, clip_grad=0.5),
        max_tokens_per_gpu=max_tokens,
    )
    try:
        scored = [
            replace(s, proximal_logprobs=found + 0.05, reference_logprobs=found - 0.1)
            for s, found in zip(samples, policy.logprobs(samples), strict=True)
        ]
        counts = count_samples(samples)
        first = policy.train(scored, objective=objective, global_counts=counts)
        second = policy.train(scored, objective=objective, global_counts=counts)
    finally:
        policy.close()
    return {**{f"first/{name}": value for name, value in first.items()}, **second}


def without_parts(metrics: dict[str, float]) -> dict[str, float]:
    return {name: value for name, value in metrics.items() if "environment/" not in name}


OBJECTIVE = Objective(loss=ClipLoss(dual_clip=3.0), kl=KLInLoss(kind="in_loss", coefficient=0.1))


def test_a_mixture_of_one_trains_as_the_plain_run_to_the_last_bit(make_model):
    path, samples = make_model("qwen3", tied=True), random_samples(LENGTHS)
    plain = train(path, samples, OBJECTIVE, 70)
    own = train(
        path,
        in_environments(samples, ["a"]),
        replace(Objective(), by_environment={"a": OBJECTIVE}),
        70,
    )
    assert without_parts(own) == plain and plain["grad_norm"] > 1e-3
    assert own["environment/a/train/loss"] == plain["loss"]


def test_alike_environments_weighed_by_their_tokens_train_as_the_plain_run(make_model):
    path, samples = make_model("qwen3", tied=True), random_samples(LENGTHS)
    plain = train(path, samples, OBJECTIVE)
    mixed = in_environments(samples, ["a", "b", ""])
    counts = count_samples(mixed)
    shares = {name: own.num_tokens / counts.num_tokens for name, own in counts.by_environment.items()}
    for weights in ({"a": None, "b": None}, {"a": shares["a"], "b": shares["b"]}):
        own = {name: replace(OBJECTIVE, weight=weight) for name, weight in weights.items()}
        found = train(path, mixed, replace(OBJECTIVE, by_environment=own))
        assert without_parts(found) == pytest.approx(plain, rel=1e-5, abs=1e-7)


def test_a_mixture_is_the_same_however_it_is_packed_and_weights_count(make_model):
    """Sequence-level losses, own penalties and own reductions beside each other."""
    path = make_model("qwen3", tied=True)
    samples = in_environments(random_samples(LENGTHS), ["a", ""])
    own = Objective(
        loss=GSPOLoss(kind="gspo", clip_low=0.5, clip_high=5.0),
        reduction=SequenceMean(kind="sequence_mean"),
        weight=2.0,
    )
    objective = replace(OBJECTIVE, by_environment={"a": own})
    results = [train(path, samples, objective, max_tokens) for max_tokens in (8192, 70, 1)]
    for found in results[1:]:
        assert found == pytest.approx(results[0], rel=1e-4, abs=1e-6)
    first = {name.removeprefix("first/"): value for name, value in results[0].items()}
    counts = count_samples(samples)
    share = counts.by_environment[""].num_tokens / counts.num_tokens
    parts = {name: results[0][f"first/environment/{name}/train/loss"] for name in ("a", "others")}
    assert results[0]["first/loss"] == pytest.approx(2.0 * parts["a"] + share * parts["others"], rel=1e-5)
    alone = [replace(s, environment="") for s in samples if s.environment == "a"]
    assert parts["a"] == pytest.approx(train(path, alone, replace(own, weight=None))["first/loss"], rel=1e-5)
    assert first["grad_norm"] > 1e-3


def test_figures_by_environment(episodes):
    row = environment_metrics(episodes)
    assert row["environment/env-0/episode/num"] == row["environment/env-1/episode/num"] == 6
    assert row["environment/env-0/reward/mean"] == pytest.approx(1 / 3)
    assert environment_metrics(episodes[:3]) == {}


def configured(*own: dict[str, object], **changes: object) -> RunConfig:
    given = load_config("quickstart").model_dump()
    given["trainer"]["algorithm_by_environment"] = list(own)
    for key, value in changes.items():
        given["trainer"]["algorithm"][key] = value
    return RunConfig.model_validate(given)


def test_what_is_not_set_is_as_in_the_algorithm_of_the_run():
    env_id = load_config("quickstart").environment.id
    config = configured({"environment": env_id, "weight": 0.5, "loss": {"kind": "gspo"}}, truncated="mask")
    (own,) = config.own_algorithms.values()
    assert own == config.algorithm.model_copy(update={"loss": own.loss}) and own.loss.kind == "gspo"
    check_own_algorithms(config)
    objective = Objective.of_run(config)
    assert objective.by_environment[env_id].weight == 0.5
    assert objective.by_environment[env_id].loss == own.loss and objective.loss == config.algorithm.loss
    assert np.isclose(objective.temperature, config.rollout.sampling.temperature)


@pytest.mark.parametrize(
    ("own", "sentence"),
    [
        ([{"environment": "a"}, {"environment": "a"}], "'a' has two entries"),
        ([{"environment": "a", "advantage": {"kind": "ppo_gae"}}], "must both need a critic"),
        ([{"environment": "a", "kl": {"kind": "in_reward"}}], "environment a: .*kl in_reward"),
    ],
)
def test_entries_that_cannot_be_are_refused(own, sentence):
    with pytest.raises(ValueError, match=sentence):
        configured(*own)


def test_an_environment_that_no_task_is_of_is_refused():
    env_id = load_config("quickstart").environment.id
    with pytest.raises(ConfigError, match=f"no task of the run is of '{env_id[:-1]}'.*{env_id}"):
        check_own_algorithms(configured({"environment": env_id[:-1]}))
    plugin = {"kind": "plugin", "target": "nowhere.py:loss"}
    with pytest.raises(ConfigError, match=r"trainer\.algorithm_by_environment\.0\.loss"):
        check_own_algorithms(configured({"environment": env_id, "loss": plugin}))
