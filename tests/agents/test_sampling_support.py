"""What tokens were drawn from, in the ledger: over turns, branches and generations that were cut off."""

from __future__ import annotations

import numpy as np
import pytest

from polyturn.agents.ledger import Ledger, Segment
from polyturn.agents.policy import FinishReason, Generation
from polyturn.agents.sampling_support import SamplingSupport


def generation(
    *rows: list[int], is_recorded: bool = True, finish_reason: FinishReason = "stop"
) -> Generation:
    """The first token of each row, drawn from the row."""
    support = SamplingSupport(
        sizes=np.array([len(row) for row in rows]),
        token_ids=np.array([token for row in rows for token in row]),
    )
    return Generation(
        token_ids=np.array([row[0] for row in rows]),
        logprobs=np.full(len(rows), -1.0),
        policy_versions=np.zeros(len(rows)),
        finish_reason=finish_reason,
        support=support if is_recorded else None,
    )


def rows_of(segment: Segment) -> list[list[int]]:
    assert segment.support is not None
    return [part.tolist() for part in np.split(segment.support.token_ids, segment.support.offsets[1:-1])]


@pytest.mark.catalogue("B24")
def test_each_sampled_token_keeps_its_row_and_no_other_has_one():
    ledger = Ledger()
    ledger.append_observation([1, 2])
    ledger.append_generation(generation([7, 8], [9]))
    ledger.append_observation([3])
    ledger.append_generation(generation([5, 6], is_recorded=False))
    ledger.append_generation(generation([4, 7, 8]))
    segment = ledger.to_segment()
    assert segment.token_ids.tolist() == [1, 2, 7, 9, 3, 5, 4]
    assert rows_of(segment) == [[], [], [7, 8], [9], [], [], [4, 7, 8]]


@pytest.mark.catalogue("B24")
def test_a_branch_has_the_rows_of_what_is_sampled_in_it():
    ledger = Ledger()
    ledger.append_observation([1])
    ledger.append_generation(generation([7, 8]))
    ledger.branch([1, 7, 2])
    ledger.append_generation(generation([9, 3]))
    first, second = ledger.to_segments()
    assert rows_of(first) == [[], [7, 8]]
    assert rows_of(second) == [[], [], [], [9, 3]]


def test_nothing_is_stored_where_nothing_was_left_out():
    ledger = Ledger()
    ledger.append_observation([1])
    ledger.append_generation(generation([7, 8], is_recorded=False))
    assert ledger.to_segment().support is None


@pytest.mark.catalogue("B24")
def test_parts_of_an_aborted_generation_stay_aligned():
    """An engine may abort before the first token, which has no record then."""
    nothing = generation(is_recorded=False, finish_reason="abort")
    parts = [generation([7, 8], [9, 1, 2], finish_reason="abort"), nothing, generation([4, 5])]
    joined = Generation.joined(parts, "stop")
    assert joined.token_ids.tolist() == [7, 9, 4]
    assert joined.support == SamplingSupport(
        sizes=np.array([2, 3, 2]), token_ids=np.array([7, 8, 9, 1, 2, 4, 5])
    )
    assert Generation.joined([nothing, nothing], "stop").support is None


def test_rows_are_taken_by_mask_and_by_index():
    support = generation([7, 8], [9], [4, 5, 6]).support
    assert support is not None
    chosen = SamplingSupport(sizes=np.array([2, 3]), token_ids=np.array([7, 8, 4, 5, 6]))
    assert support.take(np.array([True, False, True])) == chosen == support.take(np.array([0, 2]))
    assert support.take(np.array([], dtype=np.int64)) == SamplingSupport.unrestricted(0)
