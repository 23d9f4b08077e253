"""What the line of an episode says of it: tokens as they are paid for, and whose a failure is."""

from __future__ import annotations

import numpy as np
import pytest

from polyturn.agents.episode import Episode, Outcome
from polyturn.agents.ledger import Ledger
from polyturn.agents.policy import Generation
from polyturn.rollout.evaluation.records import Failure
from polyturn.rollout.evaluation.scoring import Prices, evaluation_prompt, failure_of, played_place, scored
from polyturn.rollout.groups import episode_id

IDENTITY = episode_id(evaluation_prompt(12).group_id, 3, 1)


def episode(**fields: object) -> Episode:
    values: dict[str, object] = {
        "outcome": Outcome.COMPLETED,
        "reward": 1.0,
        "stop_reason": "terminated",
        **fields,
    }
    return Episode(
        episode_id=IDENTITY,
        group_id=evaluation_prompt(12).group_id,
        env_id="E-v0",
        task_id="t",
        seed=0,
        **values,
    )


def test_every_request_has_the_conversation_so_far_as_its_prompt() -> None:
    """Two turns: a prompt of 3 and an answer of 2, then a result of 1 and an answer of 3."""
    ledger = Ledger()
    for observed, sampled in ((3, 2), (1, 3)):
        ledger.append_observation(np.arange(observed))
        columns = np.zeros(sampled)
        ledger.append_generation(
            Generation(token_ids=columns, logprobs=columns - 1, policy_versions=columns, finish_reason="stop")
        )
    line = scored(
        episode(segments=tuple(ledger.to_segments())),
        entry="one",
        prices=Prices(prompt=1e6, completion=1e6, cached_prompt=0.0),
    )
    assert (line.num_prompt_tokens, line.num_completion_tokens) == (3 + 6, 5)
    assert line.cost == pytest.approx(9 - 3 + 5), "the second request's first 3 tokens were known"
    assert played_place(episode()) == (12, 3, 1) and (line.task_index, line.sample) == (12, 3)


@pytest.mark.parametrize(
    ("part", "failure"),
    [
        ("grade", Failure.SCORER),
        ("reward", Failure.SCORER),
        ("tool 'search'", Failure.INFRASTRUCTURE),
        ("", Failure.INFRASTRUCTURE),
    ],
)
def test_whose_a_failure_is(part: str, failure: Failure) -> None:
    failed = episode(
        outcome=Outcome.FAILED,
        reward=None,
        stop_reason="environment_fault",
        failed_part=part,
        error="gone\nat",
    )
    line = scored(failed, entry="one", prices=None)
    assert failure_of(failed) is line.failure is failure
    assert (line.score, line.cost, line.error) == (None, None, "gone")
    assert failure_of(episode()) is Failure.NONE
