"""On-policy distillation against closed forms: in the advantage, in the loss, and what configs may ask for."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from polyturn.agents.episode import Episode
from polyturn.configs.errors import ConfigError
from polyturn.configs.loading.loader import load_config
from polyturn.configs.models import resolve_model_path
from polyturn.configs.schema.algorithm import AlgorithmConfig
from polyturn.configs.schema.objective import KLInLoss, PolicyGradientLoss
from polyturn.configs.schema.run import RunConfig
from polyturn.configs.schema.trainer import OptimizerConfig
from polyturn.configs.sizing.arithmetic import num_gpus
from polyturn.configs.sizing.fit import host_bytes
from polyturn.configs.sizing.memory import estimate_memory
from polyturn.configs.sizing.model_shape import ModelShape
from polyturn.configs.sizing.placement import plan_placement, planned_nodes
from polyturn.configs.sizing.placement_table import placement_lines
from polyturn.trainer.algorithms.kl import kl_penalty
from polyturn.trainer.algorithms.objective import Objective
from polyturn.trainer.credit.estimates import StepCredit, assign_credit, make_samples
from polyturn.trainer.data.samples import TrainSample, count_samples
from polyturn.trainer.run.served_checks import check_served_models, check_teachers
from tests.support.megatron.policies import make_policy
from tests.support.samples import random_samples
from tests.trainer.algorithms.test_objective import make_batch, take

ALONE = AlgorithmConfig.model_validate(
    {"advantage": {"kind": "none"}, "distillation": {"kind": "in_advantage", "coefficient": 0.5}}
)


@pytest.fixture
def episodes(make_episode) -> list[Episode]:
    return [make_episode("g", i, float(i == 0), num_sampled=2 + i, num_segments=1 + i % 2) for i in range(3)]


def credit_of(
    episodes: list[Episode], algorithm: AlgorithmConfig, teacher: Callable[[TrainSample], Any]
) -> StepCredit:
    rng = np.random.default_rng(0)
    scored = {}
    for sample in make_samples(episodes):
        proximal = np.where(sample.sampled, rng.normal(-2, 0.3, len(sample)), 0.0).astype(np.float32)
        sample = replace(sample, proximal_logprobs=proximal)
        scored[sample.sample_id] = replace(sample, teacher_logprobs=teacher(sample))
    return assign_credit(episodes, scored, algorithm, version=0)


def ahead(sample: TrainSample) -> np.ndarray:
    """A teacher that finds every token likelier, later ones more so; nonsense where nothing was sampled."""
    steps = 0.1 * np.arange(len(sample), dtype=np.float32)
    return np.where(sample.sampled, sample.proximal_logprobs + steps, np.float32(np.nan)).astype(np.float32)


def test_each_token_is_worth_how_much_likelier_the_teacher_finds_it(episodes):
    credit = credit_of(episodes, ALONE, ahead)
    assert len(credit.samples) == 4
    for sample in credit.samples:
        expected = np.where(sample.sampled, 0.5 * 0.1 * np.arange(len(sample)), 0.0)
        assert sample.advantages == pytest.approx(expected, abs=1e-6)
    gaps = [-0.1 * place for s in credit.samples for place in np.flatnonzero(s.sampled)]
    assert credit.metrics["distillation/kl"] == pytest.approx(np.mean(gaps), abs=1e-6)
    assert credit.metrics["distillation/tokens"] == len(gaps)


def test_the_teacher_that_is_the_policy_says_nothing(episodes):
    credit = credit_of(episodes, ALONE, lambda sample: sample.proximal_logprobs)
    assert all((sample.advantages == 0).all() for sample in credit.samples)
    assert credit.metrics["distillation/kl"] == 0


def test_it_comes_on_top_of_any_other_advantage_and_can_be_bounded(episodes):
    own = AlgorithmConfig.model_validate({"advantage": {"kind": "dr_grpo"}})
    bounded = {"kind": "in_advantage", "coefficient": 2.0, "max_difference": 0.25}
    both = AlgorithmConfig.model_validate({"advantage": {"kind": "dr_grpo"}, "distillation": bounded})
    plain, found = (credit_of(episodes, algorithm, ahead) for algorithm in (own, both))
    for before, after in zip(plain.samples, found.samples, strict=True):
        added = np.where(before.sampled, 2.0 * np.minimum(0.1 * np.arange(len(before)), 0.25), 0.0)
        assert after.advantages - before.advantages == pytest.approx(added, abs=1e-6)


def test_a_sample_without_a_teacher_is_named(episodes):
    with pytest.raises(ValueError, match=r"sample g\.0\.0/0 has no teacher_logprobs"):
        credit_of(episodes, ALONE, lambda _: None)


def test_in_expectation_both_ways_have_the_gradient_of_the_reverse_kl():
    """Over all tokens of a softmax: -A log p with A = log teacher - log proximal, and k2 to the teacher."""
    generator = torch.Generator().manual_seed(0)
    logits, teacher = torch.randn(2, 7, generator=generator, dtype=torch.float64)
    logits.requires_grad_()
    logprobs, theirs = logits.log_softmax(-1), teacher.log_softmax(-1)
    divergence = (logprobs.exp() * (logprobs - theirs)).sum()
    (expected,) = torch.autograd.grad(divergence, logits, retain_graph=True)
    drawn = logprobs.detach().exp()
    advantages = (theirs - logprobs).detach()
    (by_advantage,) = torch.autograd.grad((drawn * -advantages * logprobs).sum(), logits, retain_graph=True)
    torch.testing.assert_close(by_advantage, expected)
    batch = take(make_batch(), torch.arange(7))
    batch = replace(
        batch, logprobs=logprobs, mask=torch.ones(7, dtype=torch.bool), teacher_logprobs=theirs.detach()
    )
    penalty = kl_penalty(batch, KLInLoss(kind="in_loss", anchor="teacher"))
    (by_loss,) = torch.autograd.grad((drawn * penalty).sum(), logits)
    torch.testing.assert_close(by_loss, expected)


def test_both_ways_take_the_same_first_step_towards_the_teacher(make_model):
    """And the teacher becomes likelier: what is trained is what was asked for."""
    path, samples = make_model("qwen3", tied=True), random_samples([30, 41, 24, 60])
    objectives = {
        "advantage": Objective(loss=PolicyGradientLoss(kind="policy_gradient")),
        "loss": Objective(
            loss=PolicyGradientLoss(kind="policy_gradient"),
            kl=KLInLoss(kind="in_loss", anchor="teacher", coefficient=1.0),
        ),
    }
    found = {}
    for way, objective in objectives.items():
        policy = make_policy(path, optimizer=OptimizerConfig(learning_rate=1e-3, epsilon=1.0, clip_grad=5.0))
        try:
            taught = []
            for sample, logprobs in zip(samples, policy.logprobs(samples), strict=True):
                # Some tokens more, some less likely than they are.
                target = logprobs + np.where(np.arange(len(sample)) % 2, 0.5, -0.5).astype(np.float32)
                advantages = (target - logprobs) * (way == "advantage")
                taught.append(
                    replace(
                        sample,
                        proximal_logprobs=logprobs,
                        teacher_logprobs=target.astype(np.float32),
                        advantages=advantages.astype(np.float32),
                    )
                )
            metrics = policy.train(taught, objective=objective, global_counts=count_samples(taught))
            after = policy.logprobs(taught)
            gaps = [
                np.square(s.teacher_logprobs - logprobs)[s.sampled].sum()
                for s, logprobs in zip(taught, after, strict=True)
            ]
            found[way] = (metrics["grad_norm"], float(np.sum(gaps)))
        finally:
            policy.close()
    assert found["advantage"] == pytest.approx(found["loss"], rel=1e-4)
    before = 0.25 * sum(sample.num_trainable for sample in samples)
    assert found["loss"][1] < before - 0.2


def configured(algorithm: dict[str, Any], *teachers: dict[str, Any]) -> RunConfig:
    given = load_config("quickstart").model_dump()
    given["trainer"]["algorithm"] |= algorithm
    given["teachers"] = list(teachers)
    return RunConfig.model_validate(given)


IN_ADVANTAGE = {"distillation": {"kind": "in_advantage"}}
SELF = {"name": "same", "path": "builtin:tiny-searcher", "engines": {"device": "cpu"}}


def test_teachers_that_fit_pass():
    directory = resolve_model_path("builtin:tiny-searcher")
    for algorithm in (IN_ADVANTAGE, {"kl": {"kind": "in_loss", "anchor": "teacher"}}):
        config = configured(algorithm, SELF, {**SELF, "name": "elsewhere", "urls": ["http://127.0.0.1:1"]})
        check_served_models(config)
        check_teachers(config, directory)


@pytest.mark.parametrize(
    ("algorithm", "teachers", "sentence"),
    [
        ({}, [SELF], "nobody learns from them"),
        (IN_ADVANTAGE, [], "there is none; give teachers"),
        (
            IN_ADVANTAGE,
            [{**SELF, "environments": ["polyturn/Nowhere"]}],
            "no task of the run is of 'polyturn/Now",
        ),
        (IN_ADVANTAGE, [{**SELF, "environments": []}], "learns from a teacher, and none teaches it"),
        (IN_ADVANTAGE, [{**SELF, "path": "/nowhere"}], r"teachers\.0\.path: there is no directory"),
        (
            IN_ADVANTAGE,
            [{**SELF, "sglang": {"model_path": "x"}}],
            r"teachers\.0: .sglang\.model_path. is not yours",
        ),
        (IN_ADVANTAGE, [{**SELF, "sglang": {"context_length": 16}}], "leaves the teacher room for 16"),
        (
            IN_ADVANTAGE,
            [{**SELF, "engines": {"tensor_parallel": 3}}],
            r"teachers\.0\.engines\.tensor_parallel is 3",
        ),
    ],
)
def test_teachers_that_cannot_be_are_refused(algorithm, teachers, sentence):
    directory = resolve_model_path("builtin:tiny-searcher")
    with pytest.raises(ConfigError, match=sentence):
        config = configured(algorithm, *teachers)
        check_served_models(config)
        check_teachers(config, directory)


def test_a_teacher_with_other_tokens_is_refused(tmp_path):
    ours = resolve_model_path("builtin:tiny-searcher")
    for name in ("config.json", "tokenizer.json"):
        shutil.copy(ours / name, tmp_path / name)
    tokenizer = json.loads((tmp_path / "tokenizer.json").read_text())
    (first, second, *_) = sorted(tokenizer["model"]["vocab"], key=tokenizer["model"]["vocab"].get)[20:]
    vocabulary = tokenizer["model"]["vocab"]
    vocabulary[first], vocabulary[second] = vocabulary[second], vocabulary[first]
    (tmp_path / "tokenizer.json").write_text(json.dumps(tokenizer))
    config = configured(IN_ADVANTAGE, {**SELF, "path": str(tmp_path)})
    with pytest.raises(
        ConfigError, match=r"teachers\.0\.path: its tokenizer .* 2 tokens differ, the first is"
    ):
        check_teachers(config, ours)


def test_names_are_of_one_model_each_and_a_model_is_served_somewhere():
    with pytest.raises(ValueError, match="two teachers or judges have the name 'same'"):
        configured(IN_ADVANTAGE, SELF, SELF)
    with pytest.raises(ValueError, match=r"teachers\.1"):
        configured(IN_ADVANTAGE, SELF, {"name": "nowhere"})


def lines_of(config):
    return placement_lines(config, plan_placement(config, planned_nodes(config)))


def test_the_plan_shows_where_teachers_run_and_what_they_take():

    shape = ModelShape.read(resolve_model_path("builtin:tiny-searcher"))
    plain = configured({})
    config = configured(IN_ADVANTAGE, {**SELF, "engines": {"device": "cpu", "num_engines": 2}})
    of_plain = {line.name for line in lines_of(plain)}
    assert [line.name for line in lines_of(config) if line.name not in of_plain] == [
        "same engine 0",
        "same engine 1",
    ]
    estimate = estimate_memory(config, shape)
    # Two of them, in bfloat16 and with half the room for KV, where the policy's engine is in float32.
    expected = estimate.engine["weights"] + estimate.engine["kv cache"] // 2
    assert host_bytes(config, estimate) - host_bytes(plain, estimate) == expected
    on_gpus = {**SELF, "engines": {"num_engines": 2, "tensor_parallel": 2}}
    assert num_gpus(configured(IN_ADVANTAGE, on_gpus)) == num_gpus(plain) + 4
    elsewhere = {**on_gpus, "urls": ["http://127.0.0.1:1"]}
    assert num_gpus(configured(IN_ADVANTAGE, elsewhere)) == num_gpus(plain)
