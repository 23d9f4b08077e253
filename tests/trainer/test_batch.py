"""Splitting and packing: everything once, nothing too large, fair shares."""

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from polyturn.agents.ledger import Ledger
from polyturn.agents.policy import Generation
from polyturn.trainer.data.balance import pack, split_over_ranks, split_packs
from polyturn.trainer.data.samples import TrainSample
from tests.support.samples import make_sample, sample_of


def make_samples(lengths) -> list[TrainSample]:
    return [make_sample(range(length), name=f"s{i}") for i, length in enumerate(lengths)]


def ids(groups) -> list[str]:
    return sorted(sample.sample_id for group in groups for sample in group)


lengths_strategy = st.lists(st.integers(1, 60), min_size=1, max_size=30)


@given(lengths=lengths_strategy, max_tokens=st.integers(1, 100))
def test_packs_hold_every_sample_once_and_no_more_than_fits(lengths, max_tokens):
    samples = make_samples(lengths)
    packs = pack(samples, max_tokens)
    assert ids(packs) == ids([samples])
    for group in packs:
        assert sum(map(len, group)) <= max_tokens or len(group) == 1


def test_a_sample_that_is_too_long_is_alone_and_whole():
    packs = pack(make_samples([10, 50, 10]), 20)
    assert sorted([len(sample) for sample in group] for group in packs) == [[10, 10], [50]]


@given(lengths=lengths_strategy, extra=st.integers(0, 40))
def test_packs_can_be_made_more_without_losing_a_sample(lengths, extra):
    samples = make_samples(lengths)
    packs = pack(samples, 60)
    more = split_packs(packs, len(packs) + extra)
    assert len(more) == len(packs) + extra
    assert ids(more) == ids([samples])
    num_empty = sum(not group for group in more)
    assert num_empty == max(len(packs) + extra - len(samples), 0), "a pack is empty only when samples ran out"


def test_no_samples_make_empty_packs():
    assert pack([], 10) == [] and split_packs([], 2) == [[], []]


@pytest.mark.catalogue("B22")
@given(
    lengths=st.lists(st.integers(1, 30), min_size=1, max_size=7),
    num_ranks=st.integers(1, 3),
)
def test_shares_are_fair(lengths, num_ranks):
    samples = make_samples(lengths)
    shares = split_over_ranks(samples, num_ranks)
    assert ids(shares) == ids([samples])
    assert sum(map(bool, shares)) == min(len(samples), num_ranks)
    makespan = max(sum(map(len, share)) for share in shares)
    best = min(
        max(
            sum(length for length, r in zip(lengths, ranks, strict=True) if r == rank)
            for rank in range(num_ranks)
        )
        for ranks in itertools.product(range(num_ranks), repeat=len(lengths))
    )
    assert makespan <= 4 / 3 * best


def test_a_segment_becomes_a_sample():
    ledger = Ledger()
    ledger.append_observation([7, 8])
    ledger.append_generation(
        Generation(token_ids=(5, 6), logprobs=(-0.5, -0.25), policy_versions=(0, 0), finish_reason="stop")
    )
    ledger.append_observation([9])
    sample = sample_of(ledger.to_segment())
    assert sample.token_ids.tolist() == [7, 8, 5, 6, 9]
    assert sample.sampled.tolist() == [False, False, True, True, False]
    assert sample.behavior_logprobs.tolist() == [0.0, 0.0, -0.5, -0.25, 0.0]
    assert sample.policy_versions.tolist() == [-1, -1, 0, 0, -1] and sample.turns.tolist() == [0, 0, 0, 0, 1]
    assert sample.num_trainable == 2 and len(sample) == 5
    assert (sample.sample_id, sample.sequence_id, sample.group_id) == ("e/0", "e", "g")


def test_a_first_token_cannot_have_been_sampled():
    with pytest.raises(AssertionError, match="first token"):
        make_sample(range(2), sampled=np.array([True, False]))
