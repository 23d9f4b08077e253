"""Reductions by hand, their denominators, and what splitting an update leaves of them."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest
import torch

from polyturn.configs.schema import objective as sections
from polyturn.trainer.algorithms.reductions import token_weights, weighted_sum
from polyturn.trainer.algorithms.tokens import GlobalCounts, TokenBatch
from polyturn.trainer.data.balance import cut_into_updates, share_out
from polyturn.trainer.data.samples import TrainSample, count_samples
from tests.support.samples import make_sample

# Four samples of three sequences of two prompts, with 2, 1, 3 and no trainable tokens.
LENGTHS = [2, 1, 3, 0]
SEQUENCES = ["a", "a", "b", "c"]
PROMPTS = ["p", "p", "q", "q"]
REDUCTIONS = {
    "token_mean": (sections.TokenMean(), [1 / 6] * 6),
    "sequence_mean": (sections.SequenceMean(kind="sequence_mean"), [1 / (2 * 3)] * 3 + [1 / (2 * 3)] * 3),
    "sequence_sum": (sections.SequenceSum(kind="sequence_sum"), [1 / 2] * 6),
    "sequence_sum_norm": (sections.SequenceSumNorm(kind="sequence_sum_norm", length=10), [1 / 20] * 6),
    "prompt_mean": (sections.PromptMean(kind="prompt_mean"), [1 / (2 * 3)] * 6),
    "token_sum": (sections.TokenSum(kind="token_sum"), [1.0] * 6),
}


def totals(ids: Sequence[str], lengths: Sequence[int]) -> list[int]:
    return [sum(n for n, other in zip(lengths, ids, strict=True) if other == own) for own in ids]


def make_batch(
    lengths: Sequence[int] = LENGTHS, sequences: Sequence[str] = SEQUENCES, prompts=PROMPTS
) -> TokenBatch:
    """Each sample's trainable tokens, with a masked one before each sample."""
    index = torch.arange(len(lengths)).repeat_interleave(torch.tensor(lengths) + 1)
    starts = torch.cat([torch.ones(1, dtype=torch.bool), index.diff() != 0])
    values = torch.linspace(1, 2, len(index), dtype=torch.float64)
    integers = torch.zeros(len(index), dtype=torch.int64)
    return TokenBatch(
        logprobs=values,
        entropies=values,
        mask=~starts,
        sequence_index=index,
        num_sequences=len(lengths),
        sequence_lengths=torch.tensor(totals(sequences, lengths))[index],
        prompt_lengths=torch.tensor(totals(prompts, lengths))[index],
        turns=integers,
        policy_versions=integers,
        advantages=values,
        behavior_logprobs=values,
        proximal_logprobs=values,
    )


def counts_of(lengths: Sequence[int] = LENGTHS, sequences=SEQUENCES, prompts=PROMPTS) -> GlobalCounts:
    return GlobalCounts.of(lengths, sequence_ids=sequences, prompt_ids=prompts)


def test_what_counts_is_what_has_a_trainable_token():
    counts = counts_of()
    assert (counts.num_tokens, counts.num_sequences, counts.num_prompts) == (6, 2, 2)
    assert counts.tokens_of_sequence == {"a": 3, "b": 3} and counts.tokens_of_prompt == {"p": 3, "q": 3}
    alone = GlobalCounts.of([2, 0, 3])
    assert (alone.num_tokens, alone.num_sequences, alone.num_prompts) == (5, 2, 2)


@pytest.mark.parametrize("name", REDUCTIONS)
def test_weights_by_hand(name):
    config, expected = REDUCTIONS[name]
    batch = make_batch()
    weights = token_weights(batch, counts_of(), config)
    assert weights[batch.mask].tolist() == pytest.approx(expected)
    assert (weights[~batch.mask] == 0).all()


def test_unequal_sequences_weigh_the_same_by_sequence_and_unequal_prompts_by_prompt():
    lengths, sequences, prompts = [1, 4, 2, 5], ["a", "b", "b", "c"], ["p", "p", "p", "q"]
    batch, counts = make_batch(lengths, sequences, prompts), counts_of(lengths, sequences, prompts)
    index = batch.sequence_index[batch.mask]

    def shares(name: str) -> list[float]:
        weights = token_weights(batch, counts, REDUCTIONS[name][0])[batch.mask]
        return [weights[index == sample].sum().item() for sample in range(4)]

    assert shares("token_mean") == pytest.approx([1 / 12, 4 / 12, 2 / 12, 5 / 12])
    # Sequence b is in two samples, and counts once.
    assert shares("sequence_mean") == pytest.approx([1 / 3, 4 / 18, 2 / 18, 1 / 3])
    assert shares("prompt_mean") == pytest.approx([1 / 14, 4 / 14, 2 / 14, 1 / 2])
    assert shares("sequence_sum") == pytest.approx([1 / 3, 4 / 3, 2 / 3, 5 / 3])


@pytest.mark.catalogue("B20")
def test_the_constant_norm_is_dr_grpos():
    """1 / B sum_i (1 / L) sum_t: of two rows with losses 1, 1 and 3 and L = 4."""
    lengths, sequences, prompts = [2, 1], ["a", "b"], ["p", "p"]
    batch, counts = make_batch(lengths, sequences, prompts), counts_of(lengths, sequences, prompts)
    config = sections.SequenceSumNorm(kind="sequence_sum_norm", length=4)
    values = torch.zeros(len(batch.mask), dtype=torch.float64)
    values[batch.mask] = torch.tensor([1.0, 1.0, 3.0], dtype=torch.float64)
    loss = weighted_sum(values, token_weights(batch, counts, config))
    assert loss.item() == pytest.approx((2 / 4 + 3 / 4) / 2)


def test_a_value_of_weight_zero_has_no_part_not_even_as_nan():
    values = torch.tensor([1.0, float("nan")], requires_grad=True)
    total = weighted_sum(values, torch.tensor([0.5, 0.0]))
    total.backward()
    assert total.item() == 0.5 and values.grad.tolist() == [0.5, 0.0]


def make_samples(seed: int) -> list[TrainSample]:
    """Episodes of one to three segments each, of 1 to 6 trainable tokens, in four groups."""
    generator = np.random.default_rng(seed)
    samples = []
    for episode in range(12):
        for segment in range(int(generator.integers(1, 4))):
            count = int(generator.integers(1, 7))
            names = {"group_id": f"g{episode % 4}", "sequence_id": f"e{episode}"}
            samples.append(make_sample(range(count + 1), name=f"{episode}/{segment}", **names))
    return samples


@pytest.mark.catalogue("B14")
@pytest.mark.parametrize("name", REDUCTIONS)
@pytest.mark.parametrize(("num_updates", "num_ranks"), [(1, 1), (1, 4), (3, 1), (3, 2)])
def test_weights_of_an_update_do_not_depend_on_its_split(name, num_updates, num_ranks):
    """Over ranks and micro-batches of one sample each: a token's weight is that in the whole update."""
    config = REDUCTIONS[name][0]
    samples = make_samples(1)
    shares = share_out(cut_into_updates(samples, num_updates), num_ranks)
    for update in range(num_updates):
        whole = [sample for rank in shares for sample in rank[update].samples]
        expected = {}
        counts = count_samples(whole)
        for sample, weight in zip(whole, _weights(whole, counts, config), strict=True):
            expected[sample.sample_id] = weight
        total = 0.0
        for rank in shares:
            assert rank[update].counts == counts
            for sample in rank[update].samples:
                (found,) = _weights([sample], rank[update].counts, config)
                assert found == pytest.approx(expected[sample.sample_id])
                total += found * sample.num_trainable
        sums = {
            "token_sum": counts.num_tokens,
            "sequence_sum": counts.num_tokens / counts.num_sequences,
            "sequence_sum_norm": counts.num_tokens / counts.num_sequences / 10,
        }
        assert total == pytest.approx(sums.get(name, 1.0))


def test_an_update_has_whole_sequences_and_every_sample_is_in_one():
    samples = make_samples(2)
    shares = share_out(cut_into_updates(samples, 3), 2)
    by_update = [{s.sequence_id for rank in shares for s in rank[update].samples} for update in range(3)]
    assert [len(found) for found in by_update] == [4, 4, 4] and len(set.union(*by_update)) == 12
    trained = sorted(s.sample_id for rank in shares for share in rank for s in share.samples)
    assert trained == sorted(sample.sample_id for sample in samples)


def _weights(samples: Sequence[TrainSample], counts: GlobalCounts, config) -> list[float]:
    """The weight of the tokens of each sample, which is one number."""
    batch = make_batch(
        [sample.num_trainable for sample in samples], ["x"] * len(samples), ["x"] * len(samples)
    )
    index = batch.sequence_index
    of_sequence = torch.tensor([counts.tokens_of_sequence[sample.sequence_id] for sample in samples])[index]
    of_prompt = torch.tensor([counts.tokens_of_prompt[sample.group_id] for sample in samples])[index]
    batch = replace(batch, sequence_lengths=of_sequence, prompt_lengths=of_prompt)
    weights = token_weights(batch, counts, config)
    result = []
    for sample in range(len(samples)):
        own = weights[(index == sample) & batch.mask]
        assert all(a == b for a, b in itertools.pairwise(own.tolist()))
        result.append(own[0].item())
    return result
