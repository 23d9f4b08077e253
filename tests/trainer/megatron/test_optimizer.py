"""What the optimizer does to which weights, when it does nothing, and options that change memory but no number."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from polyturn.configs.schema.trainer import OptimizerConfig, ParallelConfig
from polyturn.trainer.algorithms.objective import Objective
from polyturn.trainer.data.balance import split_over_ranks
from polyturn.trainer.data.samples import TrainSample, count_samples
from polyturn.trainer.megatron.model import (
    MegatronOptions,
    transformer_config,
)
from polyturn.trainer.megatron.policy import MegatronPolicy
from polyturn.trainer.megatron.process_groups import ModelLayout
from tests.support.megatron.policies import make_policy

LENGTHS = [5, 40, 17, 2, 33, 17, 60, 9]
SMOOTH = OptimizerConfig(learning_rate=0.01, epsilon=1e-3, weight_decay=0.1, clip_grad=1e9)


@contextmanager
def open_policy(path: Path, **settings) -> Iterator[MegatronPolicy]:
    policy = make_policy(path, **{"optimizer": SMOOTH, **settings})
    try:
        yield policy
    finally:
        policy.close()


def scored(policy: MegatronPolicy, samples: list[TrainSample]) -> list[TrainSample]:
    columns = policy.logprobs(samples)
    return [
        replace(sample, proximal_logprobs=column) for sample, column in zip(samples, columns, strict=True)
    ]


def train(policy: MegatronPolicy, samples: list[TrainSample], **settings) -> dict[str, float]:
    return policy.train(samples, objective=Objective(**settings), global_counts=count_samples(samples))


def weights_of(policy: MegatronPolicy) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in policy.named_hf_tensors()}


def gradients_of(policy: MegatronPolicy) -> dict[str, torch.Tensor]:
    """What the last update's micro-batches added up to."""
    return {
        name: param.main_grad.clone()
        for chunk in policy._engine.chunks
        for name, param in chunk.named_parameters()
    }


def assert_bitwise(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> None:
    assert set(ours) == set(theirs)
    for name, tensor in ours.items():
        assert torch.equal(tensor, theirs[name]), name


def assert_close(ours, theirs) -> None:
    """Two runs' metrics by update and weights, but for rounding."""
    for one, other in zip(ours[0], theirs[0], strict=True):
        assert one == pytest.approx(other, rel=1e-5, abs=1e-6)
    for name, tensor in ours[1].items():
        torch.testing.assert_close(tensor, theirs[1][name], atol=1e-6, rtol=1e-5, msg=name)


@pytest.mark.parametrize("tied", [True, False])
def test_loss_and_gradients_do_not_depend_on_the_packing(make_model, make_samples, tied):
    """From all samples in one micro-batch to each in one of its own: gradient accumulation changes nothing."""
    samples = make_samples(LENGTHS)
    results = []
    for max_tokens in (1, 40, 61, 100, 10_000):
        with open_policy(make_model(tied=tied), max_tokens_per_gpu=max_tokens) as policy:
            batch = scored(policy, samples)
            metrics = train(policy, batch, entropy_coefficient=0.05)
            results.append((metrics, gradients_of(policy), batch))
    expected, gradients, columns = results[0]
    for metrics, found, batch in results[1:]:
        assert metrics == pytest.approx(expected, rel=1e-5, abs=1e-6)
        for name, gradient in found.items():
            scale = gradients[name].abs().max()
            torch.testing.assert_close(gradient, gradients[name], atol=float(3e-6 * scale), rtol=0, msg=name)
        for one, other in zip(batch, columns, strict=True):
            np.testing.assert_allclose(one.proximal_logprobs, other.proximal_logprobs, atol=5e-6, rtol=0)


def test_samples_in_another_order_make_the_same_update(make_model, make_samples):
    results = []
    for step in (1, -1):
        with open_policy(make_model(), max_tokens_per_gpu=61) as policy:
            metrics = train(policy, scored(policy, make_samples(LENGTHS)[::step]))
            results.append((metrics, gradients_of(policy)))
    assert results[0][0] == pytest.approx(results[1][0], rel=1e-5, abs=1e-6)
    for name, gradient in results[0][1].items():
        torch.testing.assert_close(gradient, results[1][1][name], atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize(
    "megatron",
    [
        {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1},
        {"recompute_granularity": "full", "recompute_method": "block", "recompute_num_layers": 1},
        {"recompute_granularity": "selective"},
        {"recompute_granularity": "selective", "recompute_modules": ["core_attn", "mlp"]},
        {"ddp": {"bucket_size": 1000, "check_for_nan_in_grad": True}},
    ],
    ids=["full-uniform", "full-block", "selective", "selective-mlp", "buckets"],
)
def test_options_that_change_memory_change_no_number(make_model, make_samples, megatron):
    results = []
    for section in ({}, megatron):
        with open_policy(make_model(), megatron=section, max_tokens_per_gpu=61) as policy:
            metrics = [train(policy, scored(policy, make_samples(LENGTHS))) for _ in range(2)]
            results.append((metrics, weights_of(policy)))
    assert_close(*results)


def decayed(make_model, make_samples, megatron=None, **settings) -> set[str]:
    """Which weights shrank: those that differ from an update without weight decay by their own decay."""
    config = SMOOTH.model_copy(update=settings)
    results = []
    for decay in (0.0, config.weight_decay):
        optimizer = config.model_copy(update={"weight_decay": decay})
        with open_policy(make_model("qwen2"), optimizer=optimizer, megatron=megatron or {}) as policy:
            before = weights_of(policy)
            train(policy, scored(policy, make_samples(LENGTHS)))
            results.append(weights_of(policy))
    names = set()
    for name, weight in before.items():
        difference = results[0][name] - results[1][name]
        if difference.any():
            torch.testing.assert_close(difference, 0.01 * config.weight_decay * weight, atol=1e-6, rtol=1e-2)
            names.add(name)
    return names


def test_norms_and_biases_do_not_decay_unless_told(make_model, make_samples):
    with open_policy(make_model("qwen2")) as policy:
        every = set(weights_of(policy))
    vectors = {name for name in every if "norm" in name or name.endswith("bias")}
    assert vectors
    assert decayed(make_model, make_samples) == every - vectors
    assert decayed(make_model, make_samples, decay_vectors=True) == every
    assert decayed(make_model, make_samples, no_decay=["*word_embeddings*"]) == every - vectors - {
        "model.embed_tokens.weight"
    }


def test_a_pattern_that_fits_nothing_is_refused(make_model):
    optimizer = SMOOTH.model_copy(update={"no_decay": ["*embed_tokens*"]})
    with pytest.raises(ValueError, match=r"no_decay: '\*embed_tokens\*' fits no parameter; there are"):
        make_policy(make_model(), optimizer=optimizer)


def test_bfloat16_weights_follow_float32_ones(make_model, make_samples):
    """Steps too small for bfloat16 add up in the float32 weights, as in a float32 policy's."""
    small = SMOOTH.model_copy(update={"learning_rate": 1e-4, "weight_decay": 0.0, "epsilon": 1e-8})
    with open_policy(make_model(), dtype="bfloat16", optimizer=small) as policy:
        samples = scored(policy, make_samples(LENGTHS))
        start = weights_of(policy)["model.norm.weight"]
        stuck = []
        for _ in range(40):
            train(policy, samples)
            stuck.append(torch.equal(weights_of(policy)["model.norm.weight"], start))
        inner = [part.optimizer for part in policy._engine.optimizers]
        params = [
            param for optimizer in inner for group in optimizer.param_groups for param in group["params"]
        ]
        moved = (weights_of(policy)["model.norm.weight"].float() - start.float()).abs().max()
    assert stuck[0] and not stuck[-1], "the first step is lost on bfloat16, the sum of forty is not"
    assert {param.dtype for param in params} == {torch.float32}
    assert 1e-3 < moved < 2 * 40 * 1e-4


@pytest.mark.catalogue("B30")
def test_an_exploding_gradient_stops_before_it_touches_a_weight(make_model, make_samples):
    limited = SMOOTH.model_copy(update={"max_grad_norm": 1e-3})
    with open_policy(make_model(), optimizer=limited) as policy:
        samples = scored(policy, make_samples(LENGTHS))
        before = weights_of(policy)
        with pytest.raises(
            FloatingPointError, match=r"norm is \S+, larger than trainer.optimizer.max_grad_norm=0.001"
        ):
            train(policy, samples)
        assert_bitwise(weights_of(policy), before)
    with open_policy(make_model()) as policy:
        with pytest.raises(FloatingPointError, match="norm is inf, though every trainable token is finite"):
            train(policy, overflowing(samples))
        assert_bitwise(weights_of(policy), before)


def overflowing(samples: list[TrainSample]) -> list[TrainSample]:
    """Finite numbers whose gradient's square is not."""
    huge = np.full(len(samples[1]), -1e30, dtype=np.float32)
    return [samples[0], replace(samples[1], advantages=huge), *samples[2:]]


def test_an_exploding_gradient_can_be_skipped(make_model, make_samples):
    results = []
    for explode in (False, True):
        skipping = SMOOTH.model_copy(update={"on_exploding": "skip"})
        with open_policy(make_model(), optimizer=skipping) as policy:
            samples = scored(policy, make_samples(LENGTHS))
            assert train(policy, samples)["skipped"] == 0.0
            if explode:
                before = weights_of(policy)
                metrics = train(policy, overflowing(samples))
                assert metrics["skipped"] == 1.0 and metrics["grad_norm"] == float("inf")
                assert_bitwise(weights_of(policy), before)
            train(policy, samples)
            results.append(weights_of(policy))
    assert_bitwise(*results)


@pytest.mark.parametrize(
    ("megatron", "why"),
    [
        ({"optimizer": {"optimizer_cpu_offload": True}}, "no GPU whose memory it would spare"),
        ({"optimizer": {"use_precision_aware_optimizer": True}}, "FusedAdam"),
        ({"moe_token_dispatcher_type": "flex", "moe_enable_deepep": True}, "DeepEP"),
        ({"ddp": {"overlap_param_gather": True}}, "right after an update"),
    ],
)
def test_what_this_machine_cannot_run_is_refused(make_model, megatron, why):
    with pytest.raises(ValueError, match=why):
        make_policy(make_model(), megatron=megatron)


def train_share(context, path, parallel, megatron, shares, counts):
    policy = make_policy(
        path,
        parallel=parallel,
        optimizer=SMOOTH,
        megatron=megatron,
        max_tokens_per_gpu=61,
        place=context.place,
    )
    samples = scored(policy, shares[policy.data_parallel_rank])
    metrics = [policy.train(samples, objective=Objective(), global_counts=counts) for _ in range(2)]
    return metrics, weights_of(policy)


@pytest.mark.stack
def test_gradients_reduced_while_the_backward_pass_runs_are_the_same(rank_pool, make_model, make_samples):
    samples = make_samples(LENGTHS)
    shares = split_over_ranks(samples, 2)
    results = [
        rank_pool.run(
            2, train_share, make_model(), ParallelConfig(data=2), {"ddp": ddp}, shares, count_samples(samples)
        )[0]
        for ddp in ({}, {"overlap_grad_reduce": True, "bucket_size": 3000})
    ]
    assert_close(*results)


@pytest.mark.parametrize(
    "extra",
    [
        {"moe_token_dispatcher_type": "flex", "moe_enable_deepep": True},
        {"moe_token_dispatcher_type": "flex", "moe_flex_dispatcher_backend": "deepep"},
    ],
)
def test_deepep_reaches_megatron_where_there_are_gpus(extra):
    """As far as a CPU can tell: the section is valid, and Megatron-core's config takes it."""
    options = MegatronOptions.of({**extra, "moe_router_dtype": "fp32"}, device="cuda")
    hf = {
        "model_type": "qwen3_moe",
        "vocab_size": 64,
        "hidden_size": 32,
        "intermediate_size": 64,
        "moe_intermediate_size": 16,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "norm_topk_prob": True,
        "rms_norm_eps": 1e-6,
        "max_position_embeddings": 128,
    }
    layout = ModelLayout(expert=2)
    config = transformer_config(hf, dtype="bfloat16", device="cuda", extra=options.transformer, layout=layout)
    assert config.moe_token_dispatcher_type == "flex"
    assert config.moe_flex_dispatcher_backend == "deepep"


def test_options_of_the_optimizer_become_numbers_of_torch():
    options = MegatronOptions.of(
        {"optimizer": {"use_precision_aware_optimizer": True, "exp_avg_dtype": "bfloat16"}}, device="cuda"
    )
    assert options.optimizer == {"use_precision_aware_optimizer": True, "exp_avg_dtype": torch.bfloat16}


def test_gradients_may_be_summed_in_the_weights_dtype(make_model, make_samples):
    """Less memory for less precision: near the update with float32 gradients, not equal to it."""
    results = []
    for ddp in ({}, {"grad_reduce_in_fp32": False}):
        with open_policy(make_model(), dtype="bfloat16", megatron={"ddp": ddp}) as policy:
            metrics = train(policy, scored(policy, make_samples(LENGTHS)))
            (dtype,) = {gradient.dtype for gradient in gradients_of(policy).values()}
            results.append((metrics["grad_norm"], dtype))
    assert [dtype for _, dtype in results] == [torch.float32, torch.bfloat16]
    assert results[1][0] == pytest.approx(results[0][0], rel=0.02)
