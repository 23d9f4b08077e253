"""Two ranks over gloo, tensor-parallel and data-parallel, against one rank."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import ray
import torch
from safetensors.torch import load_file

from polyturn.configs.kl import KLInLoss
from polyturn.configs.optimizer import OptimizerConfig
from polyturn.configs.parallel import ParallelConfig
from polyturn.configs.reductions import SequenceMean
from polyturn.trainer.algorithms.objective import Objective
from polyturn.trainer.algorithms.reductions import GlobalCounts
from polyturn.trainer.batch import TrainSample, split_over_ranks

pytestmark = pytest.mark.stack

LENGTHS = [5, 40, 17, 3, 33, 17, 61]
SMOOTH = OptimizerConfig(learning_rate=0.01, epsilon=1e-3, weight_decay=0.1, clip_grad=0.5)
OBJECTIVE = Objective(
    kl=KLInLoss(kind="in_loss", coefficient=0.1),
    entropy_coefficient=0.05,
    reduction=SequenceMean(kind="sequence_mean"),
    temperature=0.8,
)
NUM_UPDATES = 3
SETTINGS: dict[str, Any] = {"optimizer": SMOOTH, "keep_reference": True, "max_tokens_per_gpu": 64}


class Rank:
    """One rank's process."""

    def free_port(self) -> int:
        import socket

        with socket.socket() as listener:
            listener.bind(("127.0.0.1", 0))
            return listener.getsockname()[1]

    def open(self, path: Path, **settings: Any) -> None:
        from polyturn.trainer.megatron.policy import MegatronPolicy

        torch.set_num_threads(1)
        if hasattr(self, "policy"):
            self.close()
        self.policy = MegatronPolicy(path, **SETTINGS, **settings)

    def close(self) -> None:
        self.policy.close()
        del self.policy

    def score(self, samples: list[TrainSample]) -> list[TrainSample]:
        columns = self.policy.logprobs(samples, temperature=OBJECTIVE.temperature)
        references = self.policy.reference_logprobs(samples, temperature=OBJECTIVE.temperature)
        return [
            replace(sample, proximal_logprobs=column, reference_logprobs=reference)
            for sample, column, reference in zip(samples, columns, references, strict=True)
        ]

    def train(
        self, samples: list[TrainSample], counts: GlobalCounts, num_updates: int
    ) -> list[dict[str, float]]:
        return [
            self.policy.train(samples, objective=OBJECTIVE, global_counts=counts) for _ in range(num_updates)
        ]

    def failure(self, samples: list[TrainSample], counts: GlobalCounts) -> str:
        try:
            self.policy.train(samples, objective=OBJECTIVE, global_counts=counts)
        except FloatingPointError as error:
            return str(error)
        return ""

    def call(self, method: str, *args: Any) -> Any:
        return getattr(self.policy, method)(*args)

    def weights(self) -> dict[str, torch.Tensor]:
        return {name: tensor.clone() for name, tensor in self.policy.named_hf_tensors()}


class Ranks:
    """Both of them, from outside."""

    def __init__(self, actors: list[Any], parallel: ParallelConfig) -> None:
        self.actors = actors
        self.parallel = parallel

    def all(self, method: str, *args: Any, **kwargs: Any) -> list[Any]:
        return ray.get([getattr(actor, method).remote(*args, **kwargs) for actor in self.actors], timeout=120)

    def open(self, path: Path) -> None:
        port = ray.get(self.actors[0].free_port.remote())
        calls = [
            actor.open.remote(path, parallel=self.parallel, rank=rank, world_size=2, master_port=port)
            for rank, actor in enumerate(self.actors)
        ]
        ray.get(calls, timeout=120)

    def each(self, method: str, shares: list[Any], *args: Any) -> list[Any]:
        """Call with a share per data-parallel rank."""
        calls = [
            getattr(actor, method).remote(shares[rank // self.parallel.tensor], *args)
            for rank, actor in enumerate(self.actors)
        ]
        return ray.get(calls, timeout=120)


def start_actors() -> list[Any]:
    return [ray.remote(Rank).options(num_cpus=1).remote() for _ in range(2)]


@pytest.fixture(scope="module")
def actors(ray_session) -> list[Any]:
    return start_actors()


@pytest.fixture(params=["tensor", "data"])
def ranks(request, actors) -> Ranks:
    return Ranks(actors, ParallelConfig(**{request.param: 2}))


def assert_bitwise(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> None:
    assert set(ours) == set(theirs)
    for name, tensor in ours.items():
        assert torch.equal(tensor, theirs[name]), name


@pytest.mark.catalogue("B19")
@pytest.mark.parametrize("tied", [True, False])
def test_two_ranks_train_like_one(ranks, make_model, make_samples, tmp_path, tied):
    path = make_model("qwen3", tied=tied)
    samples = make_samples(LENGTHS)
    counts = GlobalCounts.of(sample.num_trainable for sample in samples)
    one = Rank()
    one.open(path)
    expected_samples = one.score(samples)
    expected = one.train(expected_samples, counts, NUM_UPDATES)
    expected_weights = one.weights()
    one.close()

    ranks.open(path)
    for weights in ranks.all("weights"):
        assert_bitwise(weights, load_file(path / "model.safetensors"))
    # Three of the data-parallel ranks' samples against four, so that they pack into different numbers.
    shares = split_over_ranks(samples, ranks.parallel.data)
    scored = ranks.each("score", shares)
    by_id = {sample.sample_id: sample for sample in expected_samples}
    for sample in (sample for part in scored for sample in part):
        other = by_id[sample.sample_id]
        for column in ("proximal_logprobs", "reference_logprobs"):
            np.testing.assert_allclose(getattr(sample, column), getattr(other, column), atol=5e-6, rtol=0)

    shares = scored[:: ranks.parallel.tensor]
    found = ranks.each("train", shares, counts, NUM_UPDATES)
    assert found[0] == found[1], "metrics are global"
    for ours, theirs in zip(found[0], expected, strict=True):
        assert ours == pytest.approx(theirs, rel=1e-3, abs=1e-5)
    ranks.all("call", "save_checkpoint", tmp_path / "checkpoint")
    weights, other_weights = ranks.all("weights")
    assert_bitwise(weights, other_weights)
    for name, tensor in weights.items():
        torch.testing.assert_close(tensor, expected_weights[name], atol=1e-5, rtol=1e-4)
    ranks.all("call", "save_hf", tmp_path / "out")
    assert_bitwise(load_file(tmp_path / "out" / "model.safetensors"), weights)

    after = ranks.each("train", shares, counts, 1)
    after_weights = ranks.all("weights")[0]
    ranks.all("close")
    ranks.open(path)
    ranks.all("call", "load_checkpoint", tmp_path / "checkpoint")
    assert_bitwise(ranks.all("weights")[1], weights)
    assert ranks.each("train", shares, counts, 1) == after
    assert_bitwise(ranks.all("weights")[0], after_weights)
    ranks.all("close")


@pytest.mark.catalogue("B30")
def test_every_rank_names_the_sample_that_is_not_finite(ranks, make_model, make_samples):
    samples = make_samples(LENGTHS)
    counts = GlobalCounts.of(sample.num_trainable for sample in samples)
    ranks.open(make_model())
    shares = ranks.each("score", split_over_ranks(samples, ranks.parallel.data))[:: ranks.parallel.tensor]
    broken = shares[-1][0]
    shares[-1][0] = replace(broken, advantages=np.full(len(broken), np.nan, dtype=np.float32))
    for text in ranks.each("failure", shares, counts):
        assert f"sample {broken.sample_id}: the advantage of token" in text
    ranks.all("close")


def test_packs_with_nothing_to_train_keep_the_ranks_in_step(ranks, make_model, make_samples):
    """One rank has a single pack and the other three, one of them without a trainable token."""
    path = make_model()
    samples = make_samples([10, 50, 50, 50])
    samples[2] = replace(samples[2], sampled=np.zeros(50, dtype=np.bool_))
    counts = GlobalCounts.of(sample.num_trainable for sample in samples)
    one = Rank()
    one.open(path)
    expected = one.train(one.score(samples), counts, 2)
    one.close()
    ranks.open(path)
    shares = [samples[:1], samples[1:]] if ranks.parallel.data == 2 else [samples]
    found = ranks.each("train", ranks.each("score", shares)[:: ranks.parallel.tensor], counts, 2)
    for ours, theirs in zip(found[0], expected, strict=True):
        assert ours == pytest.approx(theirs, rel=1e-3, abs=1e-5)
    ranks.all("close")
