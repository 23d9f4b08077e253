"""The ranks of one model as Ray actors: who gets which share, who answers, and who is heard when one fails."""

from __future__ import annotations

import time

import pytest
import ray
from ray.exceptions import RayActorError

from polyturn.configs.errors import RunFailure
from polyturn.configs.loading.loader import load_config
from polyturn.trainer.ranks import trainer
from polyturn.trainer.ranks.rank import Rank
from polyturn.trainer.ranks.trainer import Call, Ranks
from polyturn.trainer.run.cluster import reserve

pytestmark = pytest.mark.stack


class LoneRank(Rank):
    """Stands in for a trainer rank: what is tested is the group's part alone."""

    def take(self, share: str) -> tuple[int, str]:
        return self._rank, share

    def fail_on_last(self) -> None:
        if self._rank == 3:
            raise KeyError("this rank's own trouble")
        time.sleep(300)

    def close(self) -> None: ...


def test_shares_answers_and_failures(ray_session, tmp_path, monkeypatch):
    monkeypatch.setattr(trainer, "CLOSE_TIMEOUT_S", 1.0)
    config = load_config("quickstart", ["trainer.parallel={tensor: 1, data: 2, pipeline: 2}"])
    reservation = reserve(config)
    group = Ranks(
        LoneRank,
        config=config,
        model_path=tmp_path,
        parallel=config.trainer.parallel,
        seats=reservation.placement.policy,
        reservation=reservation,
    )
    assert group.on_all(lambda rank: rank.take("same")) == [(rank, "same") for rank in range(4)]
    # Ranks 0 and 2 are the stages of the first copy, 1 and 3 those of the second.
    assert group.start_on_shares(LoneRank.take, ["first", "second"]).results() == [
        (0, "first"),
        (1, "second"),
    ]
    everything = group.start_on_shares(LoneRank.take, ["first", "second"])
    everything._answering = range(4)
    assert everything.results() == [(0, "first"), (1, "second"), None, None], (
        "one answer of each copy travels"
    )
    with pytest.raises(AttributeError, match="no attribute"):
        group.start_on_shares(lambda rank, share: rank.nothing(share), ["first", "second"]).results()
    failing = Call([rank.run.remote(LoneRank.fail_on_last) for rank in group._ranks], answering=[0])
    with pytest.raises(KeyError, match="this rank's own trouble"):
        failing.results()
    _, waiting = ray.wait(failing._references, num_returns=4, timeout=0)
    assert len(waiting) == 3, "the others are not waited for"
    with pytest.raises(RunFailure, match=r"^trainer rank 0, 1, 2 has not come back within 0.1 s$"):
        Call(waiting, answering=[0]).results(within_s=0.1, done="come back")
    ray.kill(group._ranks[1])
    assert isinstance(group.find_death(), RayActorError), "although the others are busy for minutes"
    with pytest.raises(RayActorError):
        group.close()
    reservation.release()
