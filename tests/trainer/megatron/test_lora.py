"""LoRA: against PEFT and plain torch, merged and exported, and the same on several ranks."""

import json
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import load_file

from polyturn.configs.schema.trainer import LoraConfig, OptimizerConfig, ParallelConfig
from polyturn.configs.sizing.model_shape import ModelShape, adapter_parameters
from polyturn.trainer.algorithms.objective import Objective
from polyturn.trainer.algorithms.tokens import GlobalCounts
from polyturn.trainer.data.balance import split_over_ranks
from polyturn.trainer.data.samples import TrainSample
from polyturn.trainer.megatron.policy import MegatronPolicy
from tests.support.megatron.policies import make_policy, save_checkpoint
from tests.support.megatron.tiny_families import make_tiny
from tests.support.samples import make_sample

pytestmark = pytest.mark.stack

LENGTHS = [5, 40, 17, 3, 33, 17, 61]
SMOOTH = OptimizerConfig(learning_rate=0.02, epsilon=1e-3, weight_decay=0.1, clip_grad=0.5)
LORA = LoraConfig(rank=4, alpha=6.0)
PARTIAL = LoraConfig(rank=3, alpha=6.0, target_modules=("q_proj", "v_proj", "up_proj", "o_proj"))
NUM_UPDATES = 3


@contextmanager
def open_policy(path: Path, **settings: Any):
    policy = make_policy(path, **{"optimizer": SMOOTH, "max_tokens_per_gpu": 64, "lora": LORA, **settings})
    try:
        yield policy
    finally:
        policy.close()


def counts_of(samples: list[TrainSample]) -> GlobalCounts:
    return GlobalCounts.of([sample.num_trainable for sample in samples])


def with_proximal(policy: MegatronPolicy, samples: list[TrainSample]) -> list[TrainSample]:
    columns = policy.logprobs(samples)
    return [
        replace(sample, proximal_logprobs=column) for sample, column in zip(samples, columns, strict=True)
    ]


def train(policy: MegatronPolicy, samples: list[TrainSample], counts: GlobalCounts) -> list[dict[str, float]]:
    return [
        policy.train(samples, objective=Objective(), global_counts=counts, learning_rate=SMOOTH.learning_rate)
        for _ in range(NUM_UPDATES)
    ]


def peft_update(model: Any, optimizer: Any, samples: list[TrainSample]) -> tuple[float, float]:
    """PPO's clipped loss in plain torch, one sequence at a time; returns loss and gradient norm."""
    optimizer.zero_grad()
    num_tokens = sum(sample.num_trainable for sample in samples)
    total = torch.zeros(())
    for sample in samples:
        tokens, mask = torch.from_numpy(sample.token_ids).long(), torch.from_numpy(sample.sampled)
        logprobs = model(input_ids=tokens[None]).logits[0, :-1].log_softmax(-1)
        logprobs = logprobs.gather(1, tokens[1:, None]).squeeze(1)[mask[1:]]
        assert sample.proximal_logprobs is not None and sample.advantages is not None
        ratio = (logprobs - torch.from_numpy(sample.proximal_logprobs)[mask]).exp()
        advantage = torch.from_numpy(sample.advantages)[mask]
        total = (
            total - torch.minimum(ratio * advantage, ratio.clamp(0.8, 1.28) * advantage).sum() / num_tokens
        )
    total.backward()
    params = [param for param in model.parameters() if param.requires_grad]
    norm = torch.nn.utils.clip_grad_norm_(params, SMOOTH.clip_grad)
    optimizer.step()
    return total.item(), norm.item()


@pytest.mark.parametrize(
    ("family", "tied", "lora"), [("qwen3", True, LORA), ("qwen2", False, PARTIAL)], ids=["all", "partial"]
)
def test_adapters_train_as_peft_trains_them(make_model, make_samples, tmp_path, family, tied, lora):
    peft = pytest.importorskip("peft")
    path = make_model(family, tied=tied)
    base = load_file(path / "model.safetensors")
    with open_policy(path, lora=lora) as policy:
        policy.save_adapter(tmp_path / "before")
        initial = load_file(tmp_path / "before" / "adapter_model.safetensors")
        for name, tensor in initial.items():
            bound = tensor.shape[1] ** -0.5
            if "lora_B" in name:
                assert not tensor.any()
            else:
                assert 0.8 * bound < tensor.abs().max() <= bound, name
        samples = with_proximal(policy, make_samples(LENGTHS))
        found = train(policy, samples, counts_of(samples))
        policy.save_adapter(tmp_path / "after")
        policy.save_hf(tmp_path / "merged")

    model = transformers.AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    model = peft.PeftModel.from_pretrained(model, tmp_path / "before", is_trainable=True)
    optimizer = torch.optim.AdamW(
        [param for param in model.parameters() if param.requires_grad],
        lr=SMOOTH.learning_rate,
        betas=(SMOOTH.beta1, SMOOTH.beta2),
        eps=SMOOTH.epsilon,
        weight_decay=SMOOTH.weight_decay,
    )
    for metrics in found:
        loss, norm = peft_update(model, optimizer, samples)
        assert metrics["loss"] == pytest.approx(loss, abs=1e-5)
        assert metrics["grad_norm"] == pytest.approx(norm, rel=1e-4)
    trained = load_file(tmp_path / "after" / "adapter_model.safetensors")
    expected = peft.get_peft_model_state_dict(model)
    assert set(trained) == set(expected)
    for name, tensor in trained.items():
        torch.testing.assert_close(tensor, expected[name], atol=1e-5, rtol=1e-4)
        assert (tensor - initial[name]).abs().max() > 1e-3, f"{name} was not trained"

    merged = load_file(tmp_path / "merged" / "model.safetensors")
    assert set(merged) == set(base)
    for name, tensor in merged.items():
        stem = f"base_model.model.{name.removesuffix('.weight')}"
        by_hand = base[name]
        if f"{stem}.lora_A.weight" in trained:
            delta = trained[f"{stem}.lora_B.weight"] @ trained[f"{stem}.lora_A.weight"]
            by_hand = by_hand + lora.alpha / lora.rank * delta
        torch.testing.assert_close(tensor, by_hand, atol=1e-6, rtol=1e-6)
    num_adapted = 2 * (len(lora.target_modules) or 7)
    assert sum(not torch.equal(merged[name], base[name]) for name in base) == num_adapted
    fresh = transformers.AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    again = peft.PeftModel.from_pretrained(fresh, tmp_path / "after").merge_and_unload()
    for name, tensor in again.state_dict().items():
        if name in merged:
            torch.testing.assert_close(tensor, merged[name], atol=1e-6, rtol=1e-6)


def test_only_adapters_are_trained_and_the_base_model_is_the_reference(make_model, make_samples, tmp_path):
    path = make_model()
    samples = make_samples(LENGTHS)
    recompute = {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}
    with open_policy(path, lora=None) as policy:
        plain = policy.logprobs(samples)
    results = []
    for megatron in ({}, recompute):
        with open_policy(path, keep_reference=True, megatron=megatron) as policy:
            for one, other in zip(policy.logprobs(samples), plain, strict=True):
                np.testing.assert_array_equal(one, other)
            results.append(train(policy, with_proximal(policy, samples), counts_of(samples)))
            adapters = policy._engine.model.lora
            state = [optimizer.optimizer.param_groups for optimizer in policy._engine.optimizers]
            num_trained = sum(
                param.numel() for groups in state for group in groups for param in group["params"]
            )
            assert num_trained == sum(param.numel() for param in adapters.parameters())
            now = policy.logprobs(samples)
            assert max(abs(one - other).max() for one, other in zip(now, plain, strict=True)) > 0.05
            for one, other in zip(policy.reference_logprobs(samples), plain, strict=True):
                np.testing.assert_array_equal(one, other)
            for one, other in zip(policy.logprobs(samples), now, strict=True):
                np.testing.assert_array_equal(one, other)
            policy.save_hf(tmp_path / "merged")
    for one, other in zip(*results, strict=True):
        assert one["grad_norm"] > 0
        assert other == pytest.approx(one, rel=1e-4, abs=1e-6), "recomputing changes memory, not numbers"
    with open_policy(tmp_path / "merged", lora=None) as policy:
        for one, other in zip(policy.logprobs(samples), now, strict=True):
            np.testing.assert_allclose(one, other, atol=2e-5, rtol=0)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_resumed_adapters_take_bitwise_the_same_update(make_model, make_samples, tmp_path, dtype):
    path = make_model()
    with open_policy(path, dtype=dtype) as policy:
        samples = with_proximal(policy, make_samples(LENGTHS))
        train(policy, samples, counts_of(samples))
        save_checkpoint(policy, tmp_path / "step")
        after = train(policy, samples, counts_of(samples))
        policy.save_adapter(tmp_path / "one")
    with open_policy(path, dtype=dtype) as policy:
        policy.load_checkpoint(tmp_path / "step")
        assert train(policy, samples, counts_of(samples)) == after
        policy.save_adapter(tmp_path / "other")
    one, other = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("one", "other"))
    for name, tensor in one.items():
        assert torch.equal(tensor, other[name]) and tensor.dtype == getattr(torch, dtype)
    config = json.loads((tmp_path / "one" / "adapter_config.json").read_text())
    assert config["r"] == 4 and config["lora_alpha"] == 6.0 and config["peft_type"] == "LORA"


def train_on_ranks(
    context: Any, path: Path, samples: list[TrainSample], layout: dict[str, int], directory: Path
) -> list[dict[str, float]]:
    parallel = ParallelConfig(**layout)
    place = context.place
    with open_policy(path, parallel=parallel, keep_reference=True, place=place) as policy:
        share = split_over_ranks(samples, parallel.data)[policy.data_parallel_rank]
        found = train(policy, with_proximal(policy, share), counts_of(samples))
        policy.save_adapter(directory / "adapter")
        policy.save_hf(directory / "merged")
        return found


@pytest.mark.parametrize(
    "layout", [{"tensor": 2}, {"context": 2, "data": 2}, {"tensor": 2, "pipeline": 2}], ids=str
)
def test_ranks_train_the_same_adapters(rank_pool, make_model, make_samples, tmp_path, layout):
    path, samples = make_model("qwen3", tied=True), make_samples(LENGTHS)
    expected = rank_pool.run(1, train_on_ranks, path, samples, {}, tmp_path / "one")[0]
    num_ranks = ParallelConfig(**layout).world_size
    for found in rank_pool.run(num_ranks, train_on_ranks, path, samples, layout, tmp_path / "more"):
        for ours, theirs in zip(found, expected, strict=True):
            assert ours["loss"] == pytest.approx(theirs["loss"], abs=1e-5)
            assert ours["grad_norm"] == pytest.approx(theirs["grad_norm"], rel=1e-4)
    for name in ("adapter/adapter_model.safetensors", "merged/model.safetensors"):
        ours, theirs = load_file(tmp_path / "more" / name), load_file(tmp_path / "one" / name)
        assert set(ours) == set(theirs)
        for key, tensor in ours.items():
            torch.testing.assert_close(tensor, theirs[key], atol=1e-5, rtol=1e-5)


def train_a_family(context: Any, path: Path, layout: dict[str, int], directory: Path) -> list[Any]:
    """Train adapters on everything that can have one; this rank's metrics and logprobs after."""
    samples = family_samples()
    parallel = ParallelConfig(**layout)
    with open_policy(path, parallel=parallel, place=context.place) as policy:
        found = train(policy, with_proximal(policy, samples), counts_of(samples))
        policy.save_adapter(directory / "adapter")
        save_checkpoint(policy, directory / "checkpoint")
        num_adapted = sum(p.numel() for chunk in policy._engine.chunks for p in chunk.lora.parameters())
        return [found, policy.logprobs(samples), num_adapted]


def family_samples() -> list[TrainSample]:
    rng = np.random.default_rng(3)
    return [
        make_sample(
            rng.integers(0, 301, length),
            name=str(length),
            sampled=np.arange(length) > 2,
            behavior_logprobs=np.full(length, -5.0, dtype=np.float32),
            advantages=rng.normal(size=length).astype(np.float32),
        )
        for length in (17, 30)
    ]


@torch.no_grad()
def merge_by_hand(model: Any, adapters: dict[str, torch.Tensor]) -> None:
    for name, a in adapters.items():
        if name.endswith(".lora_A.weight"):
            module = model.get_submodule(
                name.removeprefix("base_model.model.").removesuffix(".lora_A.weight")
            )
            b = adapters[name.replace("lora_A", "lora_B")]
            module.weight += LORA.alpha / LORA.rank * b @ a


FAMILIES = [
    ("deepseek_v3", {"tensor": 2, "expert": 2}),
    ("glm4", {"tensor": 2, "pipeline": 2}),
]


@pytest.mark.parametrize(("family", "layout"), FAMILIES, ids=[name for name, _ in FAMILIES])
def test_every_linear_layer_of_a_family_is_adapted_as_peft_reads_it(rank_pool, tmp_path, family, layout):
    path = make_tiny(family, tmp_path / family, num_hidden_layers=2)
    ((expected, logprobs, num_adapted),) = rank_pool.run(1, train_a_family, path, {}, tmp_path / "one")
    num_ranks = ParallelConfig(**layout).world_size
    shape, tensor = ModelShape.read(path), layout["tensor"]
    assert num_adapted == adapter_parameters(shape, LORA, range(2), tensor=1)
    results = rank_pool.run(num_ranks, train_a_family, path, layout, tmp_path / "more")
    stages = [range(2)] if "pipeline" not in layout else [range(1), range(1, 2)]
    for rank, (found, columns, num_own) in enumerate(results):
        assert num_own == adapter_parameters(
            shape, LORA, stages[rank * len(stages) // num_ranks], tensor=tensor
        )
        for ours, theirs in zip(found, expected, strict=True):
            assert ours["loss"] == pytest.approx(theirs["loss"], abs=1e-5)
            assert ours["grad_norm"] == pytest.approx(theirs["grad_norm"], rel=1e-3)
        for one, other in zip(columns, logprobs, strict=True):
            np.testing.assert_allclose(one, other, atol=1e-4, rtol=0)
    adapters = load_file(tmp_path / "one" / "adapter" / "adapter_model.safetensors")
    sharded = load_file(tmp_path / "more" / "adapter" / "adapter_model.safetensors")
    assert set(adapters) == set(sharded)
    for name, tensor in adapters.items():
        torch.testing.assert_close(sharded[name], tensor, atol=2e-5, rtol=1e-4)
        assert tensor.any(), name

    # What four ranks wrote, one rank reads.
    with open_policy(path) as policy:
        policy.load_checkpoint(tmp_path / "more" / "checkpoint")
        policy.save_adapter(tmp_path / "again")
    again = load_file(tmp_path / "again" / "adapter_model.safetensors")
    for name, tensor in sharded.items():
        assert torch.equal(again[name], tensor), name

    model = transformers.AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    if family == "glm4":
        peft = pytest.importorskip("peft")
        model = peft.PeftModel.from_pretrained(model, tmp_path / "one" / "adapter").eval()
    else:
        # PEFT cannot read adapters on shared experts with transformers 5.
        merge_by_hand(model, adapters)
    with torch.no_grad():
        for sample, column in zip(family_samples(), logprobs, strict=True):
            tokens = torch.from_numpy(sample.token_ids).long()
            scores = model(input_ids=tokens[None]).logits[0, :-1].log_softmax(-1)
            scores = scores.gather(1, tokens[1:, None]).squeeze(1)[sample.sampled[1:]]
            np.testing.assert_allclose(column[sample.sampled], scores, atol=5e-5, rtol=0)


def test_a_target_that_the_model_lacks_is_refused(make_model):
    with pytest.raises(ValueError, match=r"'w1', but this model's linear layers are .*q_proj"):
        make_policy(make_model(), lora=LoraConfig(target_modules=("q_proj", "w1")))


@pytest.mark.parametrize(
    ("dtype", "rate", "low", "high"),
    [("bfloat16", 1e-6, 0.0, 0.5), ("float32", 1e-6, 0.99, 1.0), ("bfloat16", 0.1, 0.9, 1.0)],
)
def test_what_rounding_leaves_of_adapters_is_known(make_model, make_samples, dtype, rate, low, high):
    """Against the base weights, the merged ones and the adapters' own product."""
    path = make_model("qwen3")
    with open_policy(path, dtype=dtype) as policy:
        base = {name: tensor.clone() for name, tensor in policy.named_hf_tensors()}
        assert policy.adapter_correlation() is None, "B is 0"
        samples = with_proximal(policy, make_samples(LENGTHS))
        policy.train(samples, objective=Objective(), global_counts=counts_of(samples), learning_rate=rate)
        merged = {name: tensor.clone() for name, tensor in policy.named_hf_tensors()}
        found = policy.adapter_correlation()
        wanted = {
            f"{name}.weight": LORA.scale * (b.float() @ a.float())
            for adapter in policy._engine.model.lora.values()
            for name in adapter.targets
            for a, b in [adapter.pair(name)]
        }
    arrived = torch.cat([(merged[name].float() - base[name].float()).flatten() for name in wanted])
    added = torch.cat([delta.detach().flatten() for delta in wanted.values()])
    assert found == pytest.approx(
        float(arrived @ added / (arrived.norm() * added.norm()).clamp(min=1e-30)), abs=1e-3
    )
    assert low <= found <= high
