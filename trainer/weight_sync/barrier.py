"""The barrier of a weight update: no engine goes on with a request until all may."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import wait
from contextlib import contextmanager

from polyturn.rollout.engines.control import PauseMode
from polyturn.trainer.weight_sync.engine_calls import EngineCalls

RELEASE_TIMEOUT_S = 10.0
"""How long engines are told to go on, where something else has already failed."""


@contextmanager
def frozen(
    engines: EngineCalls, mode: PauseMode, *, may_go_on: Callable[[], bool] = lambda: True
) -> Iterator[None]:
    """No engine goes on with a request meanwhile.

    An engine's answer to a pause says that it was passed on, not that it took hold, so each is asked something more
    that its scheduler answers, which takes commands in their order.

    Args:
        engines: their time-out is the deadline of the barrier.
        mode: what becomes of requests under way; with `abort` engines are drained, else frozen.
        may_go_on: asked at the end; where not, engines stay as they are.

    Raises:
        WeightSyncError: names the engines that did not stop, or did not go on, and what each last answered.
    """
    try:
        engines.ask(lambda engine: engine.pause(mode), doing="stop for new weights")
        engines.ask(lambda engine: engine.settle(), doing="settle for new weights")
        yield
    except BaseException:
        # What went wrong is known already; whoever can go on does.
        if may_go_on():
            wait(engines.start(lambda engine: engine.go_on()).values(), timeout=RELEASE_TIMEOUT_S)
        raise
    if may_go_on():
        engines.ask(lambda engine: engine.go_on(), doing="go on with new weights")
