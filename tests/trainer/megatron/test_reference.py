"""The reference policy: another model's weights, renewed ones, and whole again after each use, in any layout."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from polyturn.configs.errors import ConfigError
from polyturn.configs.loading.loader import load_config
from polyturn.configs.schema.trainer import LoraConfig, OptimizerConfig, ParallelConfig
from polyturn.configs.sizing.model_shape import ModelShape
from polyturn.trainer.algorithms.objective import Objective
from polyturn.trainer.data.balance import split_over_ranks
from polyturn.trainer.data.samples import TrainSample, count_samples
from polyturn.trainer.run.model_checks import check_critic, check_reference, check_routing_replay
from tests.support.megatron.policies import make_policy, save_checkpoint

pytestmark = pytest.mark.stack

LENGTHS = [5, 40, 17, 33]
SETTINGS: dict[str, Any] = {
    "optimizer": OptimizerConfig(learning_rate=0.01, epsilon=1e-3),
    "max_tokens_per_gpu": 64,
    "keep_reference": True,
}


@pytest.fixture(scope="module")
def other_model(make_model, tmp_path_factory) -> Path:
    """The same architecture with other weights."""
    directory = tmp_path_factory.mktemp("reference") / "other"
    shutil.copytree(make_model(), directory)
    torch.manual_seed(1)
    tensors = load_file(directory / "model.safetensors")
    tensors = {name: tensor + 0.05 * torch.randn_like(tensor) for name, tensor in tensors.items()}
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    return directory


def compare_with_reference(
    context: Any,
    path: Path,
    other: Path,
    samples: list[TrainSample],
    layout: dict[str, int],
    directory: Path,
    lora: LoraConfig | None,
) -> dict[str, list[np.ndarray]]:
    """Columns by sample: of the reference before and after updates, after it was renewed, and after a resume."""
    parallel = ParallelConfig(**layout)
    settings = {
        **SETTINGS,
        "parallel": parallel,
        "reference_path": other,
        "lora": lora,
        "place": context.place,
    }
    policy = make_policy(path, **settings)
    share = split_over_ranks(samples, parallel.data)[policy.data_parallel_rank]
    found = [policy.reference_logprobs(share)]
    before = policy.logprobs(share)
    scored = [replace(sample, proximal_logprobs=column) for sample, column in zip(share, before, strict=True)]
    for _ in range(2):
        policy.train(scored, objective=Objective(), global_counts=count_samples(samples))
    now = policy.logprobs(share)
    found.append(policy.reference_logprobs(share))
    for one, two in zip(policy.logprobs(share), now, strict=True):
        np.testing.assert_array_equal(one, two)
    if lora is None:
        policy.refresh_reference()
        for one, two in zip(policy.reference_logprobs(share), now, strict=True):
            np.testing.assert_array_equal(one, two)
        policy.train(scored, objective=Objective(), global_counts=count_samples(samples))
        save_checkpoint(policy, directory)
        policy.load_checkpoint(directory)
        found.append(policy.reference_logprobs(share))
        for one, two in zip(found[-1], now, strict=True):
            np.testing.assert_array_equal(one, two)
    policy.close()
    return {sample.sample_id: list(columns) for sample, *columns in zip(share, *found, strict=True)}


@pytest.mark.parametrize("lora", [None, LoraConfig(rank=2)], ids=["full", "lora"])
@pytest.mark.parametrize("layout", [{}, {"tensor": 2, "pipeline": 2}], ids=str)
def test_a_reference_of_another_path(
    rank_pool, make_model, other_model, make_samples, tmp_path, layout, lora
):
    samples = make_samples(LENGTHS)
    policy = make_policy(other_model)
    expected = {s.sample_id: column for s, column in zip(samples, policy.logprobs(samples), strict=True)}
    policy.close()
    num_ranks = ParallelConfig(**layout).world_size
    arguments = (make_model(), other_model, samples, layout, tmp_path / "step", lora)
    for columns in rank_pool.run(num_ranks, compare_with_reference, *arguments):
        for sample_id, (first, second, *_) in columns.items():
            np.testing.assert_allclose(first, expected[sample_id], atol=5e-6, rtol=0)
            np.testing.assert_array_equal(second, first)


def test_a_resumed_run_finds_the_renewed_reference(make_model, make_samples, tmp_path):
    samples = make_samples(LENGTHS)
    policy = make_policy(make_model(), **SETTINGS)
    scored = [replace(s, proximal_logprobs=c) for s, c in zip(samples, policy.logprobs(samples), strict=True)]
    policy.train(scored, objective=Objective(), global_counts=count_samples(samples))
    policy.refresh_reference()
    renewed = policy.logprobs(samples)
    policy.train(scored, objective=Objective(), global_counts=count_samples(samples))
    save_checkpoint(policy, tmp_path / "step")
    now = policy.logprobs(samples)
    policy.close()
    policy = make_policy(make_model(), **SETTINGS)
    policy.load_checkpoint(tmp_path / "step")
    for one, other in zip(policy.reference_logprobs(samples), renewed, strict=True):
        np.testing.assert_array_equal(one, other)
    for one, other in zip(policy.logprobs(samples), now, strict=True):
        np.testing.assert_array_equal(one, other)
    policy.close()


def test_a_reference_of_another_architecture_is_refused(make_model, other_model, tmp_path):
    directory = shutil.copytree(other_model, tmp_path / "longer")
    config = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps({**config, "rms_norm_eps": 1e-3}))
    with pytest.raises(ValueError, match=r"layernorm_epsilon=0\.001.*the policy has 1e-06"):
        make_policy(make_model(), reference_path=directory, **SETTINGS)
    kl = "trainer.algorithm.kl.kind=in_loss"
    for overrides, message in (
        ([kl, f"model.reference_path={directory}"], "models of one architecture"),
        ([f"model.reference_path={other_model}"], "nothing compares with a reference"),
        (["trainer.refresh_reference_every_steps=2"], "nothing compares with a reference"),
        ([kl, "trainer.refresh_reference_every_steps=2", "trainer.lora={}"], "without adapters, which stays"),
    ):
        with pytest.raises(ConfigError, match=message):
            check_reference(load_config("quickstart", overrides), make_model())
    with pytest.raises(ConfigError, match="the model has no experts"):
        config = load_config("quickstart", ["engines.routing_replay=true"])
        check_routing_replay(config, ModelShape.read(make_model()))
    ppo = "trainer.algorithm.advantage.kind=ppo_gae"
    own = ["trainer.critic.placement=own", "trainer.critic.parallel.tensor=3"]
    with pytest.raises(
        ConfigError,
        match=r"critic's trainer.critic.parallel.tensor is 3, which must divide .* 4 attention heads",
    ):
        check_critic(load_config("quickstart", [ppo, *own]), make_model())
    check_critic(load_config("quickstart", [ppo]), make_model())
