"""Routing replay: a record in place of the routers' own choice, against plain transformers, in every layout."""

from __future__ import annotations

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
from polyturn.trainer.run.metrics import routing_metrics
from tests.support.megatron.policies import make_policy
from tests.support.megatron.tiny_families import make_tiny
from tests.support.samples import make_sample

pytestmark = pytest.mark.stack

LENGTHS = [23, 9, 14, 31]
NUM_LAYERS, NUM_EXPERTS, TOP_K = 4, 8, 2
SMOOTH = OptimizerConfig(learning_rate=0.01, epsilon=1e-3, clip_grad=0.5)


def make_samples(*, recorded: bool) -> list[TrainSample]:
    """Random samples; with a random record of all tokens but the last two of each."""
    rng = np.random.default_rng(5)
    samples = []
    for length in LENGTHS:
        choice = rng.permuted(np.tile(np.arange(NUM_EXPERTS), (length, NUM_LAYERS, 1)), axis=2)[..., :TOP_K]
        routing = choice.reshape(length, -1).astype(np.int16)
        routing[-2:] = -1
        samples.append(
            make_sample(
                rng.integers(0, 301, length),
                name=str(length),
                sampled=np.arange(length) > 2,
                behavior_logprobs=np.full(length, -5.0, dtype=np.float32),
                advantages=rng.normal(size=length).astype(np.float32),
                routed_experts=routing if recorded else None,
            )
        )
    return samples


def torch_logprobs(path: Path, samples: list[TrainSample]) -> list[np.ndarray]:
    """Plain transformers with the choice of its routers replaced by the record where there is one."""
    model = transformers.AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    under_way: list[TrainSample] = []

    def replay(layer: int) -> Any:
        def hook(_module: Any, _inputs: Any, output: Any) -> Any:
            logits, _weights, own = output
            record = under_way[0].routed_experts
            if record is None:
                return output
            rows = torch.from_numpy(record.reshape(len(record), NUM_LAYERS, TOP_K)[:, layer].astype(np.int64))
            indices = torch.where((rows >= 0).all(-1, keepdim=True), rows, own)
            weights = logits.gather(1, indices).softmax(-1)
            return logits, weights, indices

        return hook

    for index, layer in enumerate(model.model.layers):
        layer.mlp.gate.register_forward_hook(replay(index))
    columns = []
    for sample in samples:
        under_way[:] = [sample]
        tokens = torch.from_numpy(sample.token_ids).long()
        with torch.no_grad():
            scores = model(input_ids=tokens[None]).logits[0, :-1].log_softmax(-1)
        column = np.zeros(len(sample), dtype=np.float32)
        column[1:] = scores.gather(1, tokens[1:, None]).squeeze(1).numpy()
        columns.append(np.where(sample.sampled, column, 0.0))
    return columns


def replay_on_ranks(
    context: Any, path: Path, samples: list[TrainSample], layout: dict[str, int], megatron: dict[str, Any]
) -> list[Any]:
    """Logprobs with and without the record, then three updates with it."""
    parallel = ParallelConfig(**layout)
    policy = make_policy(
        path,
        parallel=parallel,
        optimizer=SMOOTH,
        max_tokens_per_gpu=32,
        megatron=megatron,
        keep_reference=True,
        routing_replay=True,
        place=context.place,
    )
    try:
        share = split_over_ranks(samples, parallel.data)[policy.data_parallel_rank]
        replayed = policy.logprobs(share)
        own = policy.logprobs([replace(sample, routed_experts=None) for sample in share])
        for one, other in zip(policy.reference_logprobs(share), own, strict=True):
            np.testing.assert_array_equal(one, other)
        scored = [
            replace(sample, proximal_logprobs=column) for sample, column in zip(share, replayed, strict=True)
        ]
        counts = count_samples(samples)
        found = [policy.train(scored, objective=Objective(), global_counts=counts) for _ in range(3)]
        names = [sample.sample_id for sample in share]
        after = dict(zip(names, policy.logprobs(share), strict=True))
        return [
            dict(zip(names, replayed, strict=True)),
            dict(zip(names, own, strict=True)),
            found,
            after,
        ]
    finally:
        policy.close()


@pytest.fixture(scope="module")
def tiny_path(tmp_path_factory) -> Path:
    return make_tiny("qwen3_moe", tmp_path_factory.mktemp("qwen3_moe"))


RECOMPUTE = {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}
LAYOUTS: list[tuple[dict[str, int], dict[str, Any]]] = [
    ({}, RECOMPUTE),
    ({"tensor": 2, "expert": 2}, {}),
    ({"pipeline": 2, "context": 2}, RECOMPUTE),
]


@pytest.mark.catalogue("B40")
def test_the_record_decides_in_every_layout(rank_pool, tiny_path):
    samples = make_samples(recorded=True)
    (expected,) = rank_pool.run(1, replay_on_ranks, tiny_path, samples, {}, {})
    replayed, own, metrics, after = expected
    with_record = torch_logprobs(tiny_path, samples)
    without = torch_logprobs(tiny_path, make_samples(recorded=False))
    for sample, one, other in zip(samples, with_record, without, strict=True):
        np.testing.assert_allclose(replayed[sample.sample_id], one, atol=2e-5, rtol=0)
        np.testing.assert_allclose(own[sample.sample_id], other, atol=2e-5, rtol=0)
        assert abs(one - other).max() > 0.1, "the record makes a difference"
    assert metrics[0]["policy_kl"] < 1e-9 < metrics[-1]["policy_kl"]
    for layout, megatron in LAYOUTS:
        num_ranks = ParallelConfig(**layout).world_size
        for ours, _, found, later in rank_pool.run(
            num_ranks, replay_on_ranks, tiny_path, samples, layout, megatron
        ):
            for ours_metrics, theirs in zip(found, metrics, strict=True):
                assert ours_metrics == pytest.approx(theirs, rel=1e-3, abs=1e-5), (layout, megatron)
            for sample_id, column in ours.items():
                np.testing.assert_allclose(column, replayed[sample_id], atol=2e-5, rtol=0)
                np.testing.assert_allclose(later[sample_id], after[sample_id], atol=1e-4, rtol=0)


def test_what_cannot_be_replayed_is_refused(make_model, tiny_path):
    with pytest.raises(ValueError, match="the model has no experts"):
        make_policy(make_model(), routing_replay=True)
    policy = make_policy(tiny_path, routing_replay=True)
    try:
        samples = [replace(s, routed_experts=s.routed_experts[:, :-1]) for s in make_samples(recorded=True)]
        with pytest.raises(ValueError, match="recorded 7 experts of a token, but 4 layers with 2 each are 8"):
            policy.logprobs(samples)
    finally:
        policy.close()


@pytest.mark.catalogue("B40")
def test_tokens_without_a_record_are_counted():
    recorded, bare = make_samples(recorded=True), make_samples(recorded=False)
    assert routing_metrics(bare) == {}
    num_tokens = 2 * sum(LENGTHS)
    figures = routing_metrics([*recorded, *bare])
    # Each recorded sample lacks its last two tokens, both sampled; three tokens of each sample are not sampled.
    missing = 2 * len(LENGTHS) + sum(LENGTHS)
    assert figures["routing/replayed"] == pytest.approx(1 - missing / num_tokens)
    missing -= 3 * len(LENGTHS)
    assert figures["routing/sampled_replayed"] == pytest.approx(1 - missing / (num_tokens - 6 * len(LENGTHS)))
