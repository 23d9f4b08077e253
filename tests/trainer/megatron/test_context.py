"""The shares of context-parallel ranks, and where ranks stand in a layout."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from polyturn.configs.schema.trainer import ParallelConfig
from polyturn.trainer.megatron.attention import (
    ContextSlice,
    TorchPackedAttention,
    block_mask,
    lay_out_context,
    whole_order,
)
from polyturn.trainer.megatron.packing import make_packed_batch

CPU = torch.device("cpu")


@settings(deadline=None, max_examples=40)
@given(size=st.integers(1, 4), chunks=st.lists(st.integers(1, 9), min_size=1, max_size=6))
def test_every_token_is_one_ranks_and_all_have_the_same_work(size, chunks):
    lengths = [2 * size * chunk for chunk in chunks]
    parts = [ContextSlice(size=size, rank=rank).positions(lengths) for rank in range(size)]
    assert torch.equal(torch.cat(parts).sort().values, torch.arange(sum(lengths)))
    assert torch.equal(torch.cat(parts)[whole_order(lengths, size)], torch.arange(sum(lengths)))
    starts = torch.tensor([0, *itertools.accumulate(lengths)])
    work = []
    for part in parts:
        begins = starts[torch.searchsorted(starts, part, right=True) - 1]
        work.append(int((part - begins + 1).sum()))
    # A token looks at as many keys as its position says.
    assert len(set(work)) == 1


@settings(deadline=None, max_examples=40)
@given(size=st.integers(2, 4), chunks=st.lists(st.integers(1, 5), min_size=1, max_size=6), data=st.data())
def test_a_chunk_sees_the_keys_up_to_its_own_end(size, chunks, data):
    lengths = [2 * size * chunk for chunk in chunks]
    part = ContextSlice(size=size, rank=data.draw(st.integers(0, size - 1)))
    layout = lay_out_context(lengths, part)
    places = part.positions(lengths)
    sequence_of = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
    seen = torch.cat([batch.queries for batch in layout.batches])
    assert torch.equal(seen[layout.scatter], torch.arange(len(places)))
    for batch in layout.batches:
        queries = places[batch.queries].view(batch.num_chunks, -1)
        keys = batch.keys.view(batch.num_chunks, -1)
        for own, visible in zip(queries, keys, strict=True):
            same = (sequence_of == sequence_of[own[0]]).nonzero().flatten()
            assert torch.equal(visible, same[same <= own[-1]])
            assert torch.equal(own, visible[-len(own) :])


def bare_attention() -> TorchPackedAttention:
    """The module without a config and the groups that Megatron-core would want."""
    module = TorchPackedAttention.__new__(TorchPackedAttention)
    torch.nn.Module.__init__(module)
    module.scale = 0.3
    return module


def saved_bytes(compute: Callable[[], torch.Tensor]) -> tuple[int, torch.Tensor]:
    """What is kept for the backward pass, each storage counted once, and the output."""
    kept: dict[int, int] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        output = compute()
    return sum(kept.values()), output


@pytest.mark.parametrize("groups", [1, 4])
def test_what_a_chunk_keeps_grows_with_its_tokens_and_not_with_their_square(groups: int) -> None:
    attention, sizes = bare_attention(), []
    for length in (5, 300, 600, 1200):
        generator = torch.Generator().manual_seed(length)
        shapes = ((length, 4, 8), (2 * length, groups, 8), (2 * length, groups, 8))
        tensors = [torch.randn(shape, generator=generator).requires_grad_() for shape in shapes]
        mask = block_mask(2 * length, tensors[0])
        kept, output = saved_bytes(
            lambda tensors=tensors, mask=mask, n=length: attention._attend(*tensors, 1, n, mask=mask)
        )
        sizes.append(kept)
        query, key, value = (tensor.transpose(0, 1)[None] for tensor in tensors)
        causal = torch.ones(length, 2 * length, dtype=torch.bool).tril(length)
        expected = torch.nn.functional.scaled_dot_product_attention(
            query, key, value, attn_mask=causal, scale=0.3, enable_gqa=groups != 4
        )[0].transpose(0, 1)
        weights = torch.randn(output.shape, generator=generator)
        torch.testing.assert_close(output, expected.reshape(length, -1), atol=2e-6, rtol=2e-6)
        ours, theirs = (
            torch.autograd.grad(result.reshape(length, -1), tensors, weights) for result in (output, expected)
        )
        torch.testing.assert_close(ours, theirs, atol=2e-5, rtol=2e-5)
    assert sizes[3] - sizes[2] <= 2.1 * (sizes[2] - sizes[1]), sizes


@settings(deadline=None, max_examples=40)
@given(
    lengths=st.lists(st.integers(2, 30), min_size=0, max_size=6),
    size=st.integers(1, 4),
    tensor=st.integers(1, 2),
)
def test_every_trainable_token_is_scored_by_one_rank(make_samples, lengths, size, tensor):
    samples = make_samples(lengths)
    parallel = ParallelConfig(tensor=tensor, context=size)
    whole = make_packed_batch(samples, device=CPU)
    ranks = [
        make_packed_batch(
            samples,
            device=CPU,
            multiple=parallel.pack_multiple(),
            part=ContextSlice(size=size, rank=rank),
        )
        for rank in range(size)
    ]
    owned = torch.cat([rank.own_rows for rank in ranks])
    assert torch.equal(owned.sort().values, torch.arange(whole.num_rows))
    for rank in ranks:
        assert rank.input_ids.numel() % tensor == 0 and rank.input_ids.numel() == ranks[0].input_ids.numel()
        assert torch.equal(rank.targets, whole.targets[rank.own_rows])
        assert torch.equal(rank.sample_of_row, whole.sample_of_row)
        for name in ("input_ids", "position_ids"):
            ours, theirs = getattr(rank, name)[0], getattr(whole, name)[0]
            assert torch.equal(ours[rank.rows], theirs[whole.rows][rank.own_rows]), name


LAYOUTS: list[dict[str, Any]] = [
    {},
    {"tensor": 2, "context": 2, "data": 3, "pipeline": 2, "expert": 4},
    {"tensor": 2, "context": 2, "data": 2, "pipeline": 2, "expert": 2, "expert_tensor": 2},
    {"tensor": 8, "pipeline": 4, "context": 2, "expert": 16},
]


@pytest.mark.parametrize("axes", LAYOUTS, ids=lambda axes: "-".join(axes) or "one")
def test_ranks_stand_where_megatron_puts_them(axes):
    from megatron.core.parallel_state import RankGenerator

    parallel = ParallelConfig(**axes)
    order = "tp-cp-ep-dp-pp"
    dense = RankGenerator(
        tp=parallel.tensor, ep=1, dp=parallel.data, pp=parallel.pipeline, cp=parallel.context, order=order
    )
    stage = parallel.world_size // parallel.pipeline
    copies = stage // (parallel.expert * parallel.expert_tensor)
    experts = RankGenerator(
        tp=parallel.expert_tensor, ep=parallel.expert, dp=copies, pp=parallel.pipeline, cp=1, order=order
    )
    for generator, token, axis in (
        (dense, "tp", "tensor"),
        (dense, "cp", "context"),
        (dense, "dp", "data"),
        (dense, "pp", "pipeline"),
        (experts, "ep", "expert"),
    ):
        groups = generator.get_ranks(token)
        assert sum(map(len, groups)) == parallel.world_size
        for group in groups:
            places = [getattr(parallel.place(rank), axis) for rank in group]
            assert places == list(range(len(group))), axis
    firsts = [parallel.place(rank) for rank in parallel.first_ranks()]
    assert [place.data for place in firsts] == list(range(parallel.data))
    assert all(place.tensor == place.context == place.pipeline == 0 for place in firsts)


@pytest.mark.parametrize(
    ("axes", "sentence"),
    [
        ({"virtual_pipeline": 2}, "virtual_pipeline is 2, but pipeline is 1"),
        ({"tensor": 2, "expert": 4}, "expert x expert_tensor = 4 x 1 must divide tensor x context x data"),
        ({"pipeline": 4, "expert": 2}, "the ranks of one pipeline stage"),
        ({"data": 0}, "greater than 0"),
    ],
)
def test_impossible_layouts_are_refused_with_the_reason(axes, sentence):
    with pytest.raises(ValueError, match=sentence):
        ParallelConfig(**axes)
