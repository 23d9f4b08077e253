"""Shared prefixes computed once: scores and gradients are those of the separate computation."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from polyturn.configs.schema.trainer import ParallelConfig
from polyturn.trainer.data.prefix_tree import PrefixTree, build_tree
from polyturn.trainer.data.samples import TrainSample, count_samples
from tests.support.megatron.layout_runs import SMOOTH, Run, run_layouts
from tests.support.megatron.ranks_pool import RankContext
from tests.support.megatron.tiny_families import HAS_EXPERTS, make_tiny

TOLERANCE = 1e-5
SETTINGS = {"max_tokens_per_gpu": 170}


@pytest.fixture(scope="module")
def samples(make_samples: Callable[..., list[TrainSample]]) -> list[TrainSample]:
    """Two groups with a prompt each; one episode branches twice, one is a copy, one stands alone.

    What is trainable was drawn for each by itself: also within the prefixes, and differently in equal ones.
    """
    made = make_samples([50, 61, 44, 80, 70, 33, 47, 50, 25])
    tokens = [sample.token_ids.copy() for sample in made]
    for other in (1, 2, 3, 4):
        tokens[other][:30] = tokens[0][:30]
    tokens[4][:64] = tokens[3][:64]
    tokens[6][:20] = tokens[5][:20]
    tokens[7] = tokens[0]
    return [replace(sample, token_ids=ids) for sample, ids in zip(made, tokens, strict=True)]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    made: dict[str, Path] = {}

    def make(family: str) -> Path:
        if family not in made:
            scale = 0.05 if family in HAS_EXPERTS else 0.2
            made[family] = make_tiny(family, tmp_path_factory.mktemp(family), initializer_range=scale)
        return made[family]

    return make


@pytest.fixture(scope="module")
def separate(rank_pool: Any, tiny: Any, samples: list[TrainSample]) -> Callable[[str], Run]:
    """The separate computation on one rank."""
    made: dict[str, Run] = {}

    def run(family: str) -> Run:
        if family not in made:
            arguments = (tiny(family), [ParallelConfig()], samples, SETTINGS)
            ((made[family],),) = rank_pool.run(1, run_layouts, *arguments)
        return made[family]

    return run


def compare(ranks: list[Run], expected: Run) -> None:
    scored: dict[str, tuple[np.ndarray, np.ndarray]] = {}
    for rank in ranks:
        scored |= {name: (column, rank.after[name]) for name, column in rank.before.items()}
    assert scored.keys() == expected.before.keys()
    for name, (before, after) in scored.items():
        np.testing.assert_allclose(before, expected.before[name], atol=TOLERANCE, rtol=TOLERANCE)
        np.testing.assert_allclose(after, expected.after[name], atol=TOLERANCE, rtol=TOLERANCE)
    for ours, theirs in zip(ranks[0].metrics, expected.metrics, strict=True):
        assert ours == pytest.approx(theirs, rel=TOLERANCE, abs=TOLERANCE)
        assert theirs["grad_norm"] > 0.01
    assert ranks[0].weights is not None and expected.weights is not None
    for name, tensor in ranks[0].weights.items():
        torch.testing.assert_close(tensor, expected.weights[name], atol=TOLERANCE, rtol=TOLERANCE, msg=name)


@pytest.mark.stack
@pytest.mark.parametrize("family", ["qwen3", "glm4", "deepseek_v3"])
def test_a_family_trains_on_trees_as_on_samples(rank_pool, tiny, samples, separate, family):
    settings = {**SETTINGS, "shared_prefix": "tree"}
    ((run,),) = rank_pool.run(1, run_layouts, tiny(family), [ParallelConfig()], samples, settings)
    compare([run], separate(family))


@pytest.mark.stack
def test_grouping_alone_changes_no_gradient(rank_pool, tiny, samples, separate):
    settings = {**SETTINGS, "shared_prefix": "group"}
    ((run,),) = rank_pool.run(1, run_layouts, tiny("qwen3"), [ParallelConfig()], samples, settings)
    compare([run], separate("qwen3"))


@pytest.mark.stack
@pytest.mark.parametrize(
    ("family", "layouts"),
    [
        ("qwen3", [{"tensor": 2, "pipeline": 2}, {"tensor": 2, "data": 2}]),
        ("qwen3_moe", [{"tensor": 2, "expert": 2, "data": 2}]),
    ],
)
def test_layouts_train_on_trees_as_one_rank_on_samples(rank_pool, tiny, samples, separate, family, layouts):
    parallel = [ParallelConfig(**layout) for layout in layouts]
    settings = {**SETTINGS, "shared_prefix": "tree"}
    ranks = rank_pool.run(4, run_layouts, tiny(family), parallel, samples, settings)
    for number in range(len(layouts)):
        compare([rank[number] for rank in ranks], separate(family))


@pytest.mark.stack
def test_layers_computed_again_follow_the_tree_too(rank_pool, tiny, samples, separate):
    recompute = {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}
    # Latent attention makes its embeddings within the layer.
    settings = {**SETTINGS, "shared_prefix": "tree", "megatron": recompute}
    ((run,),) = rank_pool.run(1, run_layouts, tiny("deepseek_v3"), [ParallelConfig()], samples, settings)
    compare([run], separate("deepseek_v3"))


def attend_naively(tree: PrefixTree, query, key, value, scale):
    """Each sample by itself, with plain softmax."""
    repeats = query.size(1) // key.size(1)
    outputs = {}
    for path in tree.paths:
        q, k, v = (x[path] for x in (query, key, value))
        k, v = (x.repeat_interleave(repeats, 1) for x in (k, v))
        scores = scale * torch.einsum("lhd,khd->hlk", q, k)
        scores = scores.masked_fill(torch.ones(len(path), len(path), dtype=torch.bool).triu(1), -torch.inf)
        output = torch.einsum("hlk,khd->lhd", scores.softmax(-1), v).flatten(1)
        outputs |= dict(zip(path.tolist(), output, strict=True))
    return torch.stack([outputs[place] for place in range(tree.num_tokens)])


@pytest.mark.parametrize("plain", [False, True])
@pytest.mark.parametrize(("groups", "width"), [(2, 8), (4, 6)])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-5)])
def test_tree_attention_is_attention_in_each_sample(
    samples, monkeypatch, dtype, tolerance, groups, width, plain
):
    from polyturn.trainer.megatron import tree_attention

    if plain:
        monkeypatch.setattr(tree_attention, "_kernel", lambda _query: tree_attention._PlainKernel())
    tree = build_tree([sample.token_ids for sample in samples], min_shared=4)
    assert len(tree.nodes) > len(samples)
    generator = torch.Generator().manual_seed(1)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(tree.num_tokens, *shape, dtype=dtype, generator=generator).requires_grad_()

    inputs = random(4, 8), random(groups, 8), random(groups, width)
    weights = random(4 * width).detach()
    ours = tree_attention.attend_tree(*inputs, nodes=tree.nodes, scale=0.3)
    theirs = attend_naively(tree, *inputs, 0.3)
    torch.testing.assert_close(ours, theirs, atol=tolerance, rtol=tolerance)
    for left, right in zip(
        torch.autograd.grad((ours * weights).sum(), inputs),
        torch.autograd.grad((theirs * weights).sum(), inputs),
        strict=True,
    ):
        torch.testing.assert_close(left, right, atol=tolerance, rtol=tolerance)


def test_bfloat16_gathers_in_float32(samples):
    from polyturn.trainer.megatron.tree_attention import attend_tree

    tree = build_tree([sample.token_ids for sample in samples])
    query, key, value = (torch.randn(tree.num_tokens, 4, 16).bfloat16() for _ in range(3))
    ours = attend_tree(query, key, value, nodes=tree.nodes, scale=0.25)
    theirs = attend_naively(tree, query.float(), key.float(), value.float(), 0.25)
    assert ours.dtype == torch.bfloat16
    torch.testing.assert_close(ours.float(), theirs, atol=2e-2, rtol=2e-2)


@pytest.mark.stack
def test_a_model_with_another_attention_is_refused(tiny):
    from tests.support.megatron.policies import make_policy

    with pytest.raises(ValueError, match="apply_rope_fusion"):
        make_policy(tiny("qwen3"), shared_prefix="tree", megatron={"apply_rope_fusion": True})


def with_routing(samples: list[TrainSample]) -> list[TrainSample]:
    """A record of four layers with two of eight experts: common prefixes went one way, but for one sample."""
    rng = np.random.default_rng(3)
    tree = build_tree([sample.token_ids for sample in samples], min_shared=1)
    ways = rng.permuted(np.tile(np.arange(8), (tree.num_tokens, 4, 1)), axis=2)[..., :2]
    routing = [ways[path].reshape(len(path), -1).astype(np.int16) for path in tree.paths]
    routing[2][10:] = (routing[2][10:] + 1) % 8
    for record in routing:
        record[-1] = -1
    return [replace(s, routed_experts=record) for s, record in zip(samples, routing, strict=True)]


@pytest.mark.catalogue("B40")
def test_tokens_that_were_routed_apart_are_not_one(samples):
    from polyturn.trainer.data.balance import prefix_keys

    plain = build_tree(prefix_keys(samples))
    routed = build_tree(prefix_keys(with_routing(samples)))
    # The third sample shares 30 tokens, of which it was sent the common way with the first 10 only.
    assert routed.num_tokens - plain.num_tokens >= 30
    assert routed.sharing.num_separate_tokens - routed.num_tokens > 100
    keys = prefix_keys(with_routing(samples))
    assert (keys[0][:30] == keys[1][:30]).all() and (keys[0][:10] == keys[2][:10]).all()
    assert (keys[0][10:30] != keys[2][10:30]).all()


@pytest.mark.stack
def test_routing_is_replayed_on_trees(rank_pool, tiny, samples):
    routed = with_routing(samples)
    settings = {**SETTINGS, "routing_replay": True}
    arguments = (tiny("qwen3_moe"), [ParallelConfig()], routed)
    ((apart,),) = rank_pool.run(1, run_layouts, *arguments, settings)
    ((tree,),) = rank_pool.run(1, run_layouts, *arguments, {**settings, "shared_prefix": "tree"})
    compare([tree], apart)
    ((unrecorded,),) = rank_pool.run(1, run_layouts, tiny("qwen3_moe"), [ParallelConfig()], samples, SETTINGS)
    assert any(np.abs(apart.before[name] - column).max() > 1e-3 for name, column in unrecorded.before.items())


def train_critics(context: RankContext, path: Path, samples: list[TrainSample]) -> list[Any]:
    """The values, metrics and values after two updates of a critic on samples, and of one on trees."""
    from tests.support.megatron.policies import make_critic

    found = []
    with context.joined(ParallelConfig()):
        for mode in ("off", "tree"):
            critic = make_critic(path, optimizer=SMOOTH, max_tokens_per_gpu=170, shared_prefix=mode)
            before = critic.values(samples)
            scored = [
                replace(s, values=v, returns=np.cos(s.behavior_logprobs))
                for s, v in zip(samples, before, strict=True)
            ]
            metrics = [critic.train(scored, global_counts=count_samples(scored)) for _ in range(2)]
            found.append((before, metrics, critic.values(samples)))
    return found


@pytest.mark.stack
def test_a_critic_learns_on_trees_as_on_samples(rank_pool, tiny, samples):
    (found,) = rank_pool.run(1, train_critics, tiny("llama"), samples)
    apart, tree = found
    for ours, theirs in ((tree[0], apart[0]), (tree[2], apart[2])):
        for one, other in zip(ours, theirs, strict=True):
            np.testing.assert_allclose(one, other, atol=TOLERANCE, rtol=TOLERANCE)
    for one, other in zip(tree[1], apart[1], strict=True):
        assert one == pytest.approx(other, rel=TOLERANCE, abs=TOLERANCE)
        assert other["grad_norm"] > 0.01
