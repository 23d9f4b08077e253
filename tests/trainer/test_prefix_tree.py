"""Shared prefixes as a tree: what stands in it, who sees whom, and which samples come together."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from polyturn.configs.errors import ConfigError
from polyturn.configs.loading.loader import load_config
from polyturn.trainer.data.balance import pack_by_prefix, split_over_ranks
from polyturn.trainer.data.prefix_tree import MIN_SHARED, Sharing, build_tree
from polyturn.trainer.data.samples import TrainSample
from polyturn.trainer.run.model_checks import check_shared_prefix
from tests.support.samples import make_sample


@st.composite
def branching(draw: st.DrawFn) -> list[np.ndarray]:
    """Sequences that branch from each other, some of them equal to one or the beginning of one."""
    tokens = st.lists(st.integers(0, 2), min_size=1, max_size=8)
    made = [np.array(draw(tokens) * 4, dtype=np.int64)]
    for _ in range(draw(st.integers(0, 7))):
        parent = draw(st.sampled_from(made))
        cut = draw(st.integers(0, len(parent)))
        made.append(
            np.array([*parent[:cut], *draw(tokens)] if draw(st.booleans()) else parent[: max(cut, 1)])
        )
    return made


@pytest.mark.catalogue("B39")
@given(branching(), st.sampled_from([1, 2, 5, 16]))
@settings(max_examples=150, deadline=None)
def test_every_token_sees_its_own_prefix_and_nothing_else(
    sequences: list[np.ndarray], min_shared: int
) -> None:
    tree = build_tree(sequences, min_shared=min_shared)
    visible = np.zeros((tree.num_tokens, tree.num_tokens), dtype=bool)
    for node in tree.nodes:
        own = slice(node.start, node.end)
        visible[own, own] |= np.tri(node.end - node.start, dtype=bool)
        visible[node.end : node.descendants_end, own] = True
    for sequence, path in zip(sequences, tree.paths, strict=True):
        np.testing.assert_array_equal(tree.token_ids[path], sequence)
        np.testing.assert_array_equal(tree.positions[path], np.arange(len(sequence)))
        for place, token in enumerate(path):
            np.testing.assert_array_equal(np.flatnonzero(visible[token]), path[: place + 1])
    assert tree.sharing.num_pairs == visible.sum()
    assert tree.sharing.num_separate_pairs == sum(len(s) * (len(s) + 1) // 2 for s in sequences)
    if min_shared == 1:
        assert tree.num_tokens == len({tuple(s[: i + 1]) for s in sequences for i in range(len(s))})


def test_no_samples_make_an_empty_tree_and_a_thousand_nested_ones_a_deep_one() -> None:
    assert build_tree([]).num_tokens == 0
    whole = np.random.default_rng(0).integers(0, 50, 20_000)
    tree = build_tree([whole[: 20 * (i + 1)] for i in range(1000)])
    assert tree.num_tokens == 20_000 and len(tree.nodes) == 1000


def test_what_is_saved_goes_by_what_tokens_and_pairs_cost() -> None:
    tree = build_tree([np.arange(20), np.arange(20)])
    assert tree.sharing == Sharing(
        num_tokens=20, num_pairs=210, num_separate_tokens=40, num_separate_pairs=420
    )
    both = tree.sharing + Sharing.none([40])
    assert both.saved_fraction(token=1.0) == 0.25
    assert both.saved_fraction(pair=1.0) == pytest.approx(210 / (420 + 820))
    assert Sharing().saved_fraction(token=1.0) == 0.0


def groups(
    rng: np.random.Generator, num_groups: int, size: int, *, prompt: int, answer: int
) -> list[TrainSample]:
    made = []
    for _ in range(num_groups):
        start = rng.integers(0, 1000, prompt)
        made += [np.concatenate([start, rng.integers(0, 1000, rng.integers(1, answer))]) for _ in range(size)]
    order = rng.permutation(len(made))
    return [make_sample(made[place], name=str(number)) for number, place in enumerate(order)]


@pytest.mark.parametrize("limit", [100, 400, 5000])
def test_packs_hold_each_sample_once_and_keep_to_their_limit_as_trees(limit: int) -> None:
    samples = groups(np.random.default_rng(1), 6, 5, prompt=80, answer=60)
    packs = pack_by_prefix(samples, limit)
    assert sorted(s.sample_id for pack in packs for s in pack) == sorted(s.sample_id for s in samples)
    for pack in packs:
        assert len(pack) == 1 or build_tree([s.token_ids for s in pack]).num_tokens <= limit
    if limit == 5000:
        assert len(packs) == 1


def test_samples_that_share_a_prompt_are_in_one_pack() -> None:
    samples = groups(np.random.default_rng(2), 8, 4, prompt=64, answer=20)
    packs = pack_by_prefix(samples, 64 + 4 * 20 + 4 * MIN_SHARED)
    prompts = [{tuple(s.token_ids[:64]) for s in pack} for pack in packs]
    assert len(packs) > 1 and sum(map(len, prompts)) == 8


@pytest.mark.parametrize("num_ranks", [1, 2, 4, 7])
def test_ranks_share_groups_out_whole_where_that_is_balanced(num_ranks: int) -> None:
    samples = groups(np.random.default_rng(3), 8, 4, prompt=200, answer=20)
    shares = split_over_ranks(samples, num_ranks, shared_prefix="tree")
    assert sorted(s.sample_id for share in shares for s in share) == sorted(s.sample_id for s in samples)
    loads = [build_tree([s.token_ids for s in share]).num_tokens for share in shares]
    apart = [
        build_tree([s.token_ids for s in share]).num_tokens for share in split_over_ranks(samples, num_ranks)
    ]
    assert max(loads) <= max(apart)
    if num_ranks in (1, 2, 4):
        assert sum(loads) == build_tree([s.token_ids for s in samples]).num_tokens


def test_one_group_is_divided_rather_than_left_to_one_rank() -> None:
    samples = groups(np.random.default_rng(4), 1, 8, prompt=20, answer=400)
    shares = split_over_ranks(samples, 4, shared_prefix="tree")
    assert all(shares) and sum(map(len, shares)) == 8
    few = split_over_ranks(samples[:2], 4, shared_prefix="tree")
    assert sorted(map(len, few)) == [0, 0, 1, 1]
    assert split_over_ranks([], 2, shared_prefix="tree") == [[], []]


@given(st.lists(st.integers(1, 60), min_size=4, max_size=12), st.integers(1, 4))
@settings(max_examples=30, deadline=None)
def test_samples_that_share_nothing_are_split_as_ever(lengths: list[int], num_ranks: int) -> None:
    rng = np.random.default_rng(5)
    samples = [make_sample(rng.integers(0, 10**6, length), name=str(i)) for i, length in enumerate(lengths)]
    shares = split_over_ranks(samples, num_ranks, shared_prefix="tree")
    best = max(sum(map(len, share)) for share in split_over_ranks(samples, num_ranks))
    assert max(sum(map(len, share)) for share in shares) <= best + MIN_SHARED * len(samples)


def test_what_has_no_trees_is_refused_before_the_start(tmp_path, monkeypatch) -> None:

    def check(*changes: str) -> None:
        check_shared_prefix(load_config("quickstart", ["trainer.shared_prefix=tree", *changes]))

    check()
    with pytest.raises(ConfigError, match="apply_rope_fusion counts from 0"):
        check("megatron.apply_rope_fusion=true", "trainer.device=cuda")
    (tmp_path / "transformer_engine").mkdir()
    (tmp_path / "transformer_engine" / "__init__.py").touch()
    monkeypatch.syspath_prepend(tmp_path)
    check()
    with pytest.raises(ConfigError, match="set it to group"):
        check("trainer.device=cuda")


def test_a_layout_that_divides_sequences_is_refused_with_the_way_out() -> None:
    with pytest.raises(ValueError, match="shared_prefix: group"):
        load_config("quickstart", ["trainer.shared_prefix=tree", "trainer.parallel.context=2"])
    config = load_config("quickstart", ["trainer.shared_prefix=group"])
    assert config.trainer.shared_prefix == "group"
