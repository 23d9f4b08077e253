"""What was sampled is trained on, whatever its value; what was not is not, whatever it looks like."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from polyturn.agents.ledger import Ledger, Segment
from polyturn.agents.policy import Generation
from polyturn.trainer.algorithms.objective import Objective, evaluate_objective
from polyturn.trainer.battery.rows import Row, count, random_rows, to_batch
from polyturn.trainer.credit.off_policy import drop_unusable
from tests.support.samples import sample_of

END = 0
"""The token that ends a turn, which is also the one that a tokenizer without padding pads with."""


def two_turns(*, forged: tuple[int, ...] = (5, END, 6)) -> Segment:
    """A prompt, a turn that ends, an observation with an end in its text, and a turn that was cut."""
    ledger = Ledger()
    ledger.append_observation([END, 1])
    for token_ids, reason in (((7, END), "stop"), ((8, 9), "length")):
        ledger.append_generation(
            Generation(
                token_ids=token_ids,
                logprobs=(-0.5,) * len(token_ids),
                policy_versions=(0,) * len(token_ids),
                finish_reason=reason,
            )
        )
        if reason == "stop":
            ledger.append_observation(forged)
    return ledger.to_segment()


@pytest.mark.catalogue("B27")
def test_an_end_that_was_sampled_is_trained_on_and_a_forged_one_is_not() -> None:
    sample = sample_of(two_turns())
    assert sample.token_ids.tolist() == [END, 1, 7, END, 5, END, 6, 8, 9]
    assert sample.sampled.tolist() == [False, False, True, True, False, False, False, True, True]
    assert sample.num_trainable == 4
    other = sample_of(two_turns(forged=(5, 5, 6)))
    assert np.array_equal(sample.sampled, other.sampled)


@pytest.mark.catalogue("B31")
def test_a_token_without_a_usable_logprob_leaves_the_denominators() -> None:
    sample = sample_of(two_turns())
    logprobs = sample.behavior_logprobs.copy()
    logprobs[[3, 4]] = [-np.inf, np.nan]  # one sampled, one not
    usable, metrics = drop_unusable({"s": replace(sample, behavior_logprobs=logprobs)})
    assert usable["s"].sampled.tolist() == [False, False, True, False, False, False, False, True, True]
    assert metrics == {"offpolicy/unusable_tokens": 1.0}


def moved(row: Row, by: float) -> Row:
    """The row with a policy that has moved since its tokens were drawn."""
    logprobs = row.columns["logprobs"]
    return row.having(proximal_logprobs=logprobs - by, behavior_logprobs=logprobs - by)


@pytest.mark.catalogue("B29", "B32")
def test_the_ratio_is_one_before_the_first_update_and_only_then() -> None:
    for by in (0.0, 0.25):
        rows = [moved(row, by) for row in random_rows(0)]
        counts = count(rows)
        batch = to_batch(rows, counts)
        result = evaluate_objective(batch, Objective(), counts)
        ratio = (result.sums["ratio"] / counts.num_tokens).item()
        assert ratio == pytest.approx(np.exp(by), rel=1e-12)
        assert (result.sums["policy_kl"].item() == 0) == (by == 0)
        assert (result.sums["clip_fraction"].item() == 0) == (by == 0)
