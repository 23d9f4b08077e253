"""The critic: against plain torch, on several ranks beside the policy, and PPO's learning with it."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers

from polyturn.configs.schema.trainer import OptimizerConfig, ParallelConfig
from polyturn.trainer.algorithms.objective import Objective
from polyturn.trainer.data.balance import split_over_ranks
from polyturn.trainer.data.samples import TrainSample, count_samples
from polyturn.trainer.megatron.critic import MegatronCritic
from tests.support.megatron.policies import make_critic, make_policy

pytestmark = pytest.mark.stack

LENGTHS = [5, 40, 17, 3, 33, 17, 61]
SMOOTH = OptimizerConfig(learning_rate=0.01, epsilon=1e-3, weight_decay=0.1, clip_grad=0.5)
NUM_UPDATES = 3


def critic_of(path: Path, parallel: ParallelConfig | None = None, **settings: Any) -> MegatronCritic:
    layout = parallel or ParallelConfig()
    return make_critic(path, parallel=layout, optimizer=SMOOTH, max_tokens_per_gpu=64, **settings)


def with_returns(samples: list[TrainSample], values: list[np.ndarray]) -> list[TrainSample]:
    rng = np.random.default_rng(1)
    return [
        replace(sample, values=column, returns=rng.normal(0.5, 1.0, len(sample)).astype(np.float32))
        for sample, column in zip(samples, values, strict=True)
    ]


def torch_values(model: Any, head: torch.nn.Linear, sample: TrainSample) -> torch.Tensor:
    """Plain transformers: [trainable tokens], each from the hidden state before it."""
    hidden = model.model(input_ids=torch.from_numpy(sample.token_ids).long()[None]).last_hidden_state[0]
    rows = torch.from_numpy(np.flatnonzero(sample.sampled) - 1)
    return head(hidden[rows]).squeeze(-1)


@pytest.mark.parametrize(("family", "tied"), [("qwen3", True), ("llama", False)])
def test_values_and_updates_are_those_of_plain_torch(make_model, make_samples, family, tied):
    path = make_model(family, tied=tied)
    model = transformers.AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    samples = make_samples(LENGTHS)
    policy = make_policy(path)
    try:
        critic = critic_of(path)
        layer = critic.engine.chunks[-1].output_layer
        head = torch.nn.Linear(layer.weight.shape[1], 1)
        with torch.no_grad():
            head.weight.copy_(layer.weight)
            head.bias.copy_(layer.bias)
        assert 0 < head.weight.std() < 2 / (layer.weight.shape[1] + 1) and not head.bias.any()
        params = [*model.model.parameters(), *head.parameters()]
        decaying = [param for param in params if param.dim() > 1]
        still = [param for param in params if param.dim() == 1]
        optimizer = torch.optim.AdamW(
            [{"params": decaying}, {"params": still, "weight_decay": 0.0}],
            lr=SMOOTH.learning_rate,
            betas=(SMOOTH.beta1, SMOOTH.beta2),
            eps=SMOOTH.epsilon,
            weight_decay=SMOOTH.weight_decay,
        )
        before = critic.values(samples)
        scored = with_returns(samples, before)
        for update in range(NUM_UPDATES):
            columns = critic.values(scored)
            losses = []
            for sample, column in zip(scored, columns, strict=True):
                values = torch_values(model, head, sample)
                np.testing.assert_allclose(column[sample.sampled], values.detach(), atol=5e-5, rtol=0)
                assert not column[~sample.sampled].any()
                returns = torch.from_numpy(sample.returns)[sample.sampled]
                old = torch.from_numpy(sample.values)[sample.sampled]
                clipped = old + (values - old).clamp(-0.3, 0.3)
                losses.append(0.5 * torch.maximum((values - returns) ** 2, (clipped - returns) ** 2))
            loss = torch.cat(losses).mean()
            optimizer.zero_grad()
            loss.backward()
            norm = torch.nn.utils.clip_grad_norm_(params, SMOOTH.clip_grad)
            optimizer.step()
            metrics = critic.train(scored, global_counts=count_samples(scored))
            assert metrics["loss"] == pytest.approx(loss.item(), abs=2e-5)
            assert metrics["grad_norm"] == pytest.approx(norm.item(), rel=1e-3)
            assert critic.num_updates == update + 1
        assert metrics["clip_fraction"] > 0, "the clip of values was at work"
        assert (
            max(abs(one - other).max() for one, other in zip(critic.values(samples), before, strict=True))
            > 0.1
        )
    finally:
        policy.close()


def train_both(
    context: Any, path: Path, samples: list[TrainSample], layout: dict[str, int], dtype: str
) -> list[Any]:
    """The policy and the critic of one process by turns; what each found."""
    parallel = ParallelConfig(**layout)
    policy = make_policy(
        path, parallel=parallel, optimizer=SMOOTH, max_tokens_per_gpu=64, dtype=dtype, place=context.place
    )
    try:
        critic = critic_of(path, parallel, dtype=dtype)
        share = split_over_ranks(samples, parallel.data)[policy.data_parallel_rank]
        counts = count_samples(samples)
        share = [
            replace(
                sample, proximal_logprobs=logprobs, values=values, returns=np.cos(sample.behavior_logprobs)
            )
            for sample, logprobs, values in zip(
                share, policy.logprobs(share), critic.values(share), strict=True
            )
        ]
        found: list[Any] = []
        for _ in range(NUM_UPDATES):
            value_metrics = critic.train(share, global_counts=counts)
            metrics = policy.train(share, objective=Objective(), global_counts=counts)
            found.append((value_metrics, metrics))
        columns = {
            sample.sample_id: column for sample, column in zip(share, critic.values(share), strict=True)
        }
        return [found, columns]
    finally:
        policy.close()


LAYOUTS = [{"tensor": 2, "pipeline": 2}, {"context": 2, "data": 2}]


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_ranks_of_policy_and_critic_train_like_one(rank_pool, make_model, make_samples, layout):
    path, samples = make_model("qwen3", tied=True), make_samples(LENGTHS)
    ((expected, expected_columns),) = rank_pool.run(1, train_both, path, samples, {}, "float32")
    results = rank_pool.run(4, train_both, path, samples, layout, "float32")
    for found, columns in results:
        for (values, policy), (their_values, their_policy) in zip(found, expected, strict=True):
            assert values == pytest.approx(their_values, rel=1e-3, abs=1e-5)
            assert policy == pytest.approx(their_policy, rel=1e-3, abs=1e-5)
        for sample_id, column in columns.items():
            np.testing.assert_allclose(column, expected_columns[sample_id], atol=2e-5, rtol=0)
    assert {sample_id for _, columns in results for sample_id in columns} == set(expected_columns)
