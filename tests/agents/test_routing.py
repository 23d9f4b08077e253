"""The record of routed experts in the ledger: lengths, turn boundaries, and answers that do not hold together."""

from __future__ import annotations

import base64

import numpy as np
import pytest

from polyturn.agents.ledger import Ledger
from polyturn.agents.policy import Generation, PolicyFault
from polyturn.agents.sglang_policy import read_routing


def encoded(rows: np.ndarray) -> str:
    return base64.b64encode(rows.astype("<i4").tobytes()).decode()


def answer(first: int, num_tokens: int) -> np.ndarray | None:
    """The record of tokens first, first + 1, ...: token t was sent to experts [t, t + 100], in two layers."""
    rows = np.stack([np.arange(first, first + num_tokens), np.arange(first, first + num_tokens) + 100], 1)
    return read_routing(encoded(rows), num_tokens=num_tokens)


def generation(num_tokens: int, routed: np.ndarray | None = None) -> Generation:
    return Generation(
        token_ids=(7,) * num_tokens,
        logprobs=(-1.0,) * num_tokens,
        policy_versions=(0,) * num_tokens,
        finish_reason="stop",
        routed_experts=routed,
    )


@pytest.mark.catalogue("B40")
def test_the_record_goes_on_over_turns_and_lacks_the_last_token_alone():
    ledger = Ledger()
    ledger.append_observation([1, 2, 3])
    assert ledger.num_routed == 0
    # Tokens 0..4 of 5: no layer has seen the last one yet.
    ledger.append_generation(generation(2, answer(0, 4)))
    ledger.append_observation([4, 5])
    assert ledger.num_routed == 4
    # The next turn's record begins with the last token of the turn before.
    ledger.append_generation(generation(3, answer(4, 5)))
    array = ledger.to_segment().routed_experts
    assert array is not None and array.shape == (10, 2) and array.dtype == np.int16
    assert array[:9, 0].tolist() == list(range(9)) and array[:9, 1].tolist() == list(range(100, 109))
    assert array[9].tolist() == [-1, -1]


def test_without_a_record_there_is_no_column():
    ledger = Ledger()
    ledger.append_observation([1, 2, 3])
    ledger.append_generation(generation(2))
    assert ledger.to_segment().routed_experts is None


@pytest.mark.catalogue("B40")
def test_a_record_of_other_tokens_is_refused():
    ledger = Ledger()
    ledger.append_observation([1, 2, 3])
    with pytest.raises(AssertionError, match="no layer has seen the last token"):
        ledger.append_generation(generation(2, answer(0, 5)))
    with pytest.raises(PolicyFault, match="7 numbers, which is no record of 2 tokens"):
        read_routing(encoded(np.arange(7)), num_tokens=2)
    with pytest.raises(PolicyFault, match="name expert 40000"):
        read_routing(encoded(np.array([[40000, 1]])), num_tokens=1)
    with pytest.raises(PolicyFault, match="not base64"):
        read_routing("?!", num_tokens=1)
    assert read_routing("", num_tokens=0) is None
