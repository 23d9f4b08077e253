"""The ranks of one model as Ray actors: who gets which share, who answers, and who is heard when one fails."""

from __future__ import annotations

import time
from typing import Any

import pytest
import ray

from polyturn.configs.loading.loader import load_config
from polyturn.configs.schema.trainer import ParallelConfig
from polyturn.trainer.ranks import group as rank_group
from polyturn.trainer.ranks.group import Call, RankGroup

pytestmark = pytest.mark.stack


class Rank:
    """Stands in for a trainer rank: what is tested is the group's part alone."""

    def __init__(self, *, config: Any, model_path: str, rank: int) -> None:
        self._rank = rank

    def take(self, share: str) -> tuple[int, str]:
        return self._rank, share

    def fail_on_last(self) -> None:
        if self._rank == 3:
            raise KeyError("this rank's own trouble")
        time.sleep(300)

    def close(self) -> None: ...


def test_shares_answers_and_failures(ray_session, tmp_path, monkeypatch):
    monkeypatch.setattr(rank_group, "CLOSE_TIMEOUT_S", 1.0)
    config = load_config("quickstart")
    group = RankGroup(
        Rank, config=config, model_path=tmp_path, parallel=ParallelConfig(tensor=1, data=2, pipeline=2)
    )
    assert group._on_all("take", "same") == [(rank, "same") for rank in range(4)]
    # Ranks 0 and 2 are the stages of the first copy, 1 and 3 those of the second.
    assert group._on_shards("take", ["first", "second"]) == [(0, "first"), (1, "second")]
    everything = group._start_on_shards("take", ["first", "second"])
    everything._answering = range(4)
    assert everything.results() == [(0, "first"), (1, "second"), None, None], (
        "one answer of each copy travels"
    )
    with pytest.raises(AttributeError, match="no attribute"):
        group._on_shards("nothing", ["first", "second"])
    failing = Call([rank.fail_on_last.remote() for rank in group._ranks], answering=[0])
    with pytest.raises(KeyError, match="this rank's own trouble"):
        failing.results()
    _, waiting = ray.wait(failing._references, num_returns=4, timeout=0)
    assert len(waiting) == 3, "the others are not waited for"
    group.close()
