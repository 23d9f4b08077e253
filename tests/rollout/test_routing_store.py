"""Records of an engine in journal and trajectories: columns that are there only when something was recorded."""

from __future__ import annotations

import numpy as np
import pyarrow.parquet as pq
import pytest

from polyturn.agents.episode import Episode, Outcome
from polyturn.agents.ledger import Ledger
from polyturn.agents.policy import Generation
from polyturn.agents.sampling_support import SamplingSupport
from polyturn.rollout.store import TrajectoryStore


def episode(name: str, routed: np.ndarray | None = None, support: SamplingSupport | None = None) -> Episode:
    ledger = Ledger()
    ledger.append_observation([1, 2])
    ledger.append_generation(
        Generation(
            token_ids=(3, 4),
            logprobs=(-1.0, -2.0),
            policy_versions=(0, 0),
            finish_reason="stop",
            routed_experts=routed,
            support=support,
        )
    )
    return Episode(
        episode_id=name,
        group_id="g",
        env_id="env",
        task_id="task",
        seed=0,
        outcome=Outcome.COMPLETED,
        stop_reason="terminated",
        reward=1.0,
        segments=(ledger.to_segment(),),
    )


@pytest.mark.catalogue("B40")
@pytest.mark.parametrize(
    "routed", [np.arange(6, dtype=np.int16).reshape(3, 2), None], ids=["recorded", "bare"]
)
def test_the_record_survives_journal_and_trajectories(tmp_path, routed):
    store = TrajectoryStore(tmp_path)
    # One episode of an engine that records, one of a policy that does not.
    episodes = [episode("one", routed), episode("two")]
    for each in episodes:
        store.journal(1, each)
    assert store.journaled(1) == episodes
    store.write_step(1, episodes)
    assert store.read_step(1) == episodes
    assert ("routed_experts" in pq.read_schema(store.path(1)).names) == (routed is not None)
    store.close()


@pytest.mark.catalogue("B24")
@pytest.mark.parametrize(
    ("sizes", "token_ids"), [([2, 1], [9, 3, 4]), ([0, 3], [4, 6, 7]), ([0, 0], [])], ids=str
)
def test_what_tokens_were_drawn_from_survives_journal_and_trajectories(tmp_path, sizes, token_ids):
    support = SamplingSupport(sizes=np.array(sizes), token_ids=np.array(token_ids))
    routed = np.arange(6, dtype=np.int16).reshape(3, 2)
    store = TrajectoryStore(tmp_path)
    episodes = [episode("one", support=support), episode("two"), episode("three", routed, support)]
    for each in episodes:
        store.journal(1, each)
    assert store.journaled(1) == episodes
    store.write_step(1, episodes)
    assert store.read_step(1) == episodes
    (segment,) = store.read_step(1)[0].segments
    assert segment.support is not None and segment.support.sizes.tolist() == [0, 0, *sizes]
    store.write_step(2, episodes[1:2])
    assert not {"support_sizes", "support_token_ids"} & set(pq.read_schema(store.path(2)).names)
    store.close()
