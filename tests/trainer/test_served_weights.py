"""When engines are looked after while they get new weights."""

from contextlib import contextmanager
from types import SimpleNamespace

from polyturn.configs.loading.loader import load_config
from polyturn.rollout.engines.membership import Membership
from polyturn.trainer.run import served_weights
from polyturn.trainer.run.checks import RunChecks
from polyturn.trainer.run.served_weights import ServedWeights
from polyturn.trainer.run.stopwatch import Stopwatch
from polyturn.trainer.weight_sync import SyncReport


class Keeper:
    """One engine serves; says whether it is looked after."""

    def __init__(self):
        self.num_quiet = 0
        self.admitted = []
        self.members = Membership(serving={0: "http://engine0"}, leaving={})
        self.behind = {}

    @contextmanager
    def quiet(self):
        self.num_quiet += 1
        try:
            yield
        finally:
            self.num_quiet -= 1

    def examine(self):
        return []

    def admit(self, number, version):
        self.admitted.append((number, version))

    def check(self):
        pass


def test_an_engine_that_hangs_is_noticed_before_it_takes_weights_and_not_while_it_does(monkeypatch):
    """Waiting for it at the barrier, its whole deadline would pass before anybody looked at it."""
    keeper, seen = Keeper(), []

    def note(what):
        seen.append((what, keeper.num_quiet > 0))

    @contextmanager
    def frozen(engines, mode, *, may_go_on):
        note("stops")
        yield
        note("goes on")

    def activate():
        note("takes weights")
        return SyncReport(
            version=1,
            num_tensors=1,
            num_bytes=1,
            seconds=0.1,
            pause_seconds=0.1,
            checksums={},
            directory=None,
        )

    monkeypatch.setattr(served_weights, "frozen", frozen)
    config = load_config("quickstart", ["checks.weights_equal=false"])
    served = ServedWeights(
        config,
        keeper=keeper,
        turns=None,
        trainer=SimpleNamespace(
            set_engines=lambda urls: note("joins"),
            prepare_weights=lambda version: note("is prepared"),
            activate_weights=activate,
        ),
        worker=None,
        heldout=SimpleNamespace(is_playing=True),
        checks=RunChecks(config.checks),
        progress=None,
        step=0,
        version=0,
    )
    assert served.sync_if_due(1, 1, Stopwatch()) is not None
    assert seen == [
        ("joins", True),
        ("is prepared", False),
        ("stops", False),
        ("takes weights", True),
        ("goes on", False),
    ]
    assert keeper.admitted == [(0, 1)] and keeper.num_quiet == 0
