"""MegatronPolicy on one rank: against transformers and plain torch, and its own exports and checkpoints."""

import gc
import json
import shutil
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import load_file

from polyturn.configs.schema.algorithm import AlgorithmConfig, EntropyTarget
from polyturn.configs.schema.objective import KLInLoss, SequenceMean, TokenMean
from polyturn.configs.schema.trainer import OptimizerConfig, ParallelConfig
from polyturn.trainer.algorithms.objective import Objective
from polyturn.trainer.algorithms.tokens import GlobalCounts
from polyturn.trainer.data.samples import TrainSample
from polyturn.trainer.megatron.policy import MegatronPolicy
from polyturn.trainer.models import hf_directory
from tests.support.megatron.policies import make_policy, save_checkpoint

LENGTHS = [5, 40, 17, 2, 33, 17, 60, 9]
# A large epsilon keeps AdamW smooth where a gradient is nearly 0, so that rounding does not show as a whole step.
SMOOTH = OptimizerConfig(learning_rate=0.01, epsilon=1e-3, weight_decay=0.1, warmup_updates=2, clip_grad=0.5)


@contextmanager
def open_policy(path: Path, **settings) -> Iterator[MegatronPolicy]:
    policy = make_policy(path, **settings)
    try:
        yield policy
    finally:
        policy.close()


def count(samples) -> GlobalCounts:
    return GlobalCounts.of(sample.num_trainable for sample in samples)


def with_proximal(policy: MegatronPolicy, samples, temperature: float = 1.0) -> list[TrainSample]:
    columns = policy.logprobs(samples, temperature=temperature)
    return [
        replace(sample, proximal_logprobs=column) for sample, column in zip(samples, columns, strict=True)
    ]


def train(policy: MegatronPolicy, samples, objective: Objective | None = None) -> dict[str, float]:
    return policy.train(samples, objective=objective or Objective(), global_counts=count(samples))


def weights_of(policy: MegatronPolicy) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in policy.named_hf_tensors()}


def assert_bitwise(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> None:
    assert set(ours) == set(theirs)
    for name, tensor in ours.items():
        assert torch.equal(tensor, theirs[name]), name


def hf_logprobs(model, sample: TrainSample, temperature: float) -> torch.Tensor:
    """Plain transformers: column [T] with gradient, entry t for token t, entry 0 is 0."""
    token_ids = torch.from_numpy(sample.token_ids).long()
    logits = model(input_ids=token_ids[None]).logits[0].float() / temperature
    scored = logits[:-1].log_softmax(-1).gather(1, token_ids[1:, None]).squeeze(1)
    return torch.cat([torch.zeros(1), scored])


def test_a_closed_policy_leaves_no_weights_behind(make_model, make_samples):
    with open_policy(make_model("qwen3", tied=True), optimizer=SMOOTH) as policy:
        train(policy, with_proximal(policy, make_samples(LENGTHS)))
        model = weakref.ref(policy._engine.model)
    del policy
    gc.collect()
    assert model() is None


@pytest.mark.catalogue("B23", "B26")
@pytest.mark.parametrize(
    ("family", "tied"), [("qwen3", True), ("qwen3", False), ("qwen2", True), ("llama", False)]
)
def test_logprobs_are_those_of_transformers(make_model, make_samples, family, tied):
    path = make_model(family, tied=tied)
    model = transformers.AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    samples = make_samples(LENGTHS)
    with open_policy(path) as policy:
        for temperature in (1.0, 0.6):
            for sample, column in zip(
                samples, policy.logprobs(samples, temperature=temperature), strict=True
            ):
                with torch.no_grad():
                    expected = hf_logprobs(model, sample, temperature).numpy()
                expected = np.where(sample.sampled, expected, 0.0)
                np.testing.assert_allclose(column, expected, atol=5e-6, rtol=0)


@pytest.mark.parametrize(
    ("family", "tied"), [("qwen3", True), ("qwen3", False), ("qwen2", True), ("llama", False)]
)
def test_weights_come_back_bit_for_bit(make_model, tmp_path, family, tied):
    path = make_model(family, tied=tied)
    original = load_file(path / "model.safetensors")
    out = tmp_path / "out"
    with open_policy(path) as policy:
        assert_bitwise(weights_of(policy), original)
        policy.save_hf(out)
        policy.save_hf(out)
    assert_bitwise(load_file(out / "model.safetensors"), original)
    assert {p.name for p in out.iterdir()} == {p.name for p in path.iterdir()}
    assert (out / "config.json").read_bytes() == (path / "config.json").read_bytes()
    assert [p.name for p in tmp_path.iterdir()] == ["out"], "nothing half-written is left"
    transformers.AutoModelForCausalLM.from_pretrained(out)


def test_a_large_model_is_written_in_shards(make_model, tmp_path, monkeypatch):
    monkeypatch.setattr(hf_directory, "MAX_SHARD_BYTES", 30_000)
    path = make_model()
    with open_policy(path) as policy:
        policy.save_hf(tmp_path / "out")
    assert len(list((tmp_path / "out").glob("*.safetensors"))) > 2
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert_bitwise(dict(model.named_parameters()), load_file(path / "model.safetensors"))
    with open_policy(tmp_path / "out") as policy:
        assert_bitwise(weights_of(policy), load_file(path / "model.safetensors"))
    next((tmp_path / "out").glob("model-00001-*")).unlink()
    with pytest.raises(ValueError, match="lacks model-00001"):
        make_policy(tmp_path / "out")


@pytest.mark.catalogue("B21")
def test_a_pack_is_its_sequences_one_by_one(make_model, make_samples):
    samples = make_samples(LENGTHS)
    stranger = make_samples([21, 40], seed=9)
    with open_policy(make_model()) as policy:
        packed = policy.logprobs(samples)
        alone = [policy.logprobs([sample])[0] for sample in samples]
        among_others = policy.logprobs([stranger[0], *samples[:3], stranger[1], *samples[3:]])
    for one, other in zip(packed, alone, strict=True):
        np.testing.assert_allclose(one, other, atol=5e-6, rtol=0)
    for one, other in zip(packed, among_others[1:4] + among_others[5:], strict=True):
        np.testing.assert_allclose(one, other, atol=5e-6, rtol=0)


def reference_update(model, optimizer, samples, objective: Objective) -> tuple[float, float]:
    """GRPO in plain torch, one sequence at a time; returns loss and gradient norm."""
    optimizer.zero_grad()
    counts = count(samples)
    total = torch.zeros(())
    for sample in samples:
        mask = torch.from_numpy(sample.sampled)
        logprobs = hf_logprobs(model, sample, objective.temperature)[mask]
        ratio = (logprobs - torch.from_numpy(sample.proximal_logprobs)[mask]).exp()
        bounded = ratio.clamp(1 - objective.loss.clip_low, 1 + objective.loss.clip_high)
        advantage = torch.from_numpy(sample.advantages)[mask]
        values = -torch.minimum(ratio * advantage, bounded * advantage)
        gap = logprobs - torch.from_numpy(sample.reference_logprobs)[mask]
        values = values + objective.kl.coefficient * gap.square() / 2
        token_ids = torch.from_numpy(sample.token_ids).long()[None]
        logits = model(input_ids=token_ids).logits[0, :-1][mask[1:]] / objective.temperature
        entropies = torch.distributions.Categorical(logits=logits).entropy()
        values = values - objective.entropy_coefficient * entropies
        if objective.reduction == TokenMean():
            total = total + values.sum() / counts.num_tokens
        else:
            total = total + values.mean() / counts.num_sequences
    total.backward()
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), SMOOTH.clip_grad)
    optimizer.step()
    return total.item(), norm.item()


@pytest.mark.parametrize(
    "reduction", [TokenMean(), SequenceMean(kind="sequence_mean")], ids=["token_mean", "sequence_mean"]
)
@pytest.mark.parametrize("max_tokens", [40, 8192])
def test_updates_are_those_of_plain_torch(make_model, make_samples, reduction, max_tokens):
    path = make_model("qwen3", tied=True)
    model = transformers.AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    decaying = [param for param in model.parameters() if param.dim() > 1]
    still = [param for param in model.parameters() if param.dim() == 1]
    optimizer = torch.optim.AdamW(
        [{"params": decaying}, {"params": still, "weight_decay": 0.0}],
        lr=SMOOTH.learning_rate,
        betas=(SMOOTH.beta1, SMOOTH.beta2),
        eps=SMOOTH.epsilon,
        weight_decay=SMOOTH.weight_decay,
    )
    objective = Objective(
        kl=KLInLoss(kind="in_loss", coefficient=0.1),
        entropy_coefficient=0.05,
        reduction=reduction,
        temperature=0.8,
    )
    with open_policy(path, optimizer=SMOOTH, max_tokens_per_gpu=max_tokens, keep_reference=True) as policy:
        samples = with_proximal(policy, make_samples(LENGTHS), 0.8)
        references = policy.reference_logprobs(samples, temperature=0.8)
        samples = [
            replace(sample, reference_logprobs=column)
            for sample, column in zip(samples, references, strict=True)
        ]
        for update in range(4):
            rate = SMOOTH.learning_rate * min((update + 1) / 2, 1.0)
            for group in optimizer.param_groups:
                group["lr"] = rate
            metrics = train(policy, samples, objective)
            loss, norm = reference_update(model, optimizer, samples, objective)
            assert metrics["loss"] == pytest.approx(loss, abs=2e-5)
            assert metrics["grad_norm"] == pytest.approx(norm, rel=1e-4)
            assert metrics["learning_rate"] == rate
            if update == 0:
                assert metrics["policy_kl"] < 1e-9 and metrics["clip_fraction"] == 0
        assert metrics["policy_kl"] > 1e-4 and metrics["reference_kl"] > 1e-4
        trained = weights_of(policy)
    expected = dict(model.named_parameters())
    for name, tensor in trained.items():
        torch.testing.assert_close(tensor, expected[name].detach(), atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_resumed_policy_takes_bitwise_the_same_update(make_model, make_samples, tmp_path, dtype):
    path = make_model()
    # Above what any distribution over the tiny vocabulary has, so that the bonus grows after every update.
    target = EntropyTarget(entropy=6.0, step=0.01)
    algorithm = AlgorithmConfig(kl=KLInLoss(kind="in_loss"), entropy_target=target)
    with open_policy(path, dtype=dtype, optimizer=SMOOTH, algorithm=algorithm) as policy:
        samples = with_proximal(policy, make_samples(LENGTHS))
        used = [train(policy, samples)["entropy_coefficient"] for _ in range(2)]
        assert used == [0.0, 0.01]
        save_checkpoint(policy, tmp_path / "step")
        saved = weights_of(policy)
        metrics = train(policy, samples)
        after = weights_of(policy)
    with open_policy(path, dtype=dtype, optimizer=SMOOTH, keep_reference=True, algorithm=algorithm) as policy:
        before = policy.logprobs(samples)
        policy.load_checkpoint(tmp_path / "step")
        assert policy.num_updates == 2
        assert_bitwise(weights_of(policy), saved)
        for one, other in zip(policy.reference_logprobs(samples), before, strict=True):
            assert np.array_equal(one, other), "the reference is the policy that the run began with"
        assert_bitwise(weights_of(policy), saved)
        assert train(policy, samples) == metrics
        assert metrics["entropy_coefficient"] == 0.02
        assert_bitwise(weights_of(policy), after)
    assert saved["model.norm.weight"].dtype == getattr(torch, dtype)


def test_a_checkpoint_that_does_not_fit_is_refused(make_model, make_samples, tmp_path):
    good = tmp_path / "good"
    with open_policy(make_model("qwen3", tied=True)) as policy:
        save_checkpoint(policy, good)
        unfinished = shutil.copytree(good, tmp_path / "unfinished")
        (unfinished / "trainer.json").unlink()
        with pytest.raises(ValueError, match="no finished trainer checkpoint"):
            policy.load_checkpoint(unfinished)
    with open_policy(make_model("llama", tied=False)) as policy:
        with pytest.raises(ValueError, match="another model"):
            policy.load_checkpoint(good)


@pytest.mark.catalogue("B30")
@pytest.mark.parametrize("column", ["behavior_logprobs", "proximal_logprobs"])
def test_a_number_that_is_not_finite_names_its_sample(make_model, make_samples, column):
    with open_policy(make_model()) as policy:
        samples = with_proximal(policy, make_samples(LENGTHS))
        before = weights_of(policy)
        values = getattr(samples[3], column).copy()
        values[1] = np.nan
        broken = [*samples[:3], replace(samples[3], **{column: values}), *samples[4:]]
        name = column.replace("_", " ").removesuffix("s")
        with pytest.raises(FloatingPointError, match=f"sample-3: the {name} of token 1 is nan"):
            train(policy, broken)
        assert_bitwise(weights_of(policy), before)
        values[:] = 0.0
        values[0] = np.nan
        harmless = [*samples[:3], replace(samples[3], **{column: values}), *samples[4:]]
        train(policy, harmless)


def test_a_logprob_that_is_not_finite_names_its_sample(make_model, make_samples):
    harmless, harmful = make_samples([5, 5])
    harmless, harmful = (
        replace(sample, token_ids=np.array(token_ids))
        for sample, token_ids in ((harmless, [1, 2, 3, 4, 5]), (harmful, [1, 2, 7, 4, 5]))
    )
    # The output layer is untied, so that only reading token 7 does harm.
    with open_policy(make_model("qwen3", tied=False)) as policy:
        with torch.no_grad():
            policy._engine.model.embedding.word_embeddings.weight[7] = np.nan
        with pytest.raises(FloatingPointError, match="sample sample-1") as caught:
            policy.logprobs([harmless, harmful])
    assert "sample-0" not in str(caught.value)


def test_a_sample_without_trainable_tokens_only_takes_part_in_nothing(make_model, make_samples):
    samples = make_samples(LENGTHS)
    silent = replace(samples[0], sample_id="silent", sampled=np.zeros(5, dtype=np.bool_))
    results = []
    for batch in (samples, [*samples, silent]):
        with open_policy(make_model(), optimizer=SMOOTH, max_tokens_per_gpu=5) as policy:
            scored = with_proximal(policy, batch)
            results.append(
                (
                    train(policy, scored, Objective(reduction=SequenceMean(kind="sequence_mean"))),
                    weights_of(policy),
                )
            )
    (metrics, weights), (other_metrics, other_weights) = results
    assert other_metrics == pytest.approx(metrics, abs=1e-6)
    for name, tensor in weights.items():
        torch.testing.assert_close(other_weights[name], tensor, atol=1e-6, rtol=1e-5)


def test_denominators_of_another_batch_are_noticed(make_model, make_samples):
    with open_policy(make_model()) as policy:
        samples = with_proximal(policy, make_samples(LENGTHS))
        counts = replace(count(samples), num_tokens=7)
        with pytest.raises(AssertionError, match="denominator of the update is 7"):
            policy.train(samples, objective=Objective(), global_counts=counts)


def test_what_cannot_be_trained_is_refused(make_model, tmp_path):
    path = make_model()
    with pytest.raises(ValueError, match=r"unknown key .megatron.hidden_sise., did you mean"):
        make_policy(path, megatron={"hidden_sise": 3}).close()
    cases = {
        "model_type": ("mamba", "model_type 'mamba' is not supported"),
        "hidden_act": ("gelu", "only 'silu'"),
        "use_sliding_window": (True, "sliding-window"),
    }
    for key, (value, message) in cases.items():
        other = shutil.copytree(path, tmp_path / key)
        config = json.loads((path / "config.json").read_text())
        (other / "config.json").write_text(json.dumps({**config, key: value}))
        with pytest.raises(ValueError, match=message):
            make_policy(other)
    with pytest.raises(ValueError, match=r"no config.json"):
        make_policy(tmp_path)
    with pytest.raises(ValueError, match=r"the layout tensor 2 has 2 rank\(s\), but 1 were started"):
        make_policy(path, parallel=ParallelConfig(tensor=2))


def test_user_fields_reach_the_model(make_model, make_samples):
    """Recomputing activations changes memory, not numbers."""
    samples = make_samples(LENGTHS)
    results = []
    for megatron in (
        {},
        {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1},
    ):
        with open_policy(make_model(), megatron=megatron) as policy:
            results.append(train(policy, with_proximal(policy, samples)))
    assert results[0] == results[1]
