"""Keeps the router of a run's engines going: one that has ended, or hangs, is started again at its address."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import Executor, Future

from polyturn.rollout.engines.engine_log import EngineLog
from polyturn.rollout.engines.launch import Engines
from polyturn.rollout.engines.server import ROUTER_START_TIMEOUT_S

LOOK_S = 0.5


class RouterKeeper:
    """Looks after the router when it is told to; where there is none it does nothing."""

    def __init__(
        self,
        engines: Engines,
        *,
        hung_after_s: float,
        log: EngineLog,
        helpers: Executor,
        clock: Callable[[], float],
    ) -> None:
        self._engines = engines
        self._hung_after_s = hung_after_s
        self._log = log
        self._helpers = helpers
        self._clock = clock
        self._looked = self._asked = self._answered = clock()
        self._is_starting = False
        """It was started again, and has not answered yet."""
        self._question: Future[bool] | None = None

    def look(self, worker_urls: Sequence[str]) -> None:
        """See to it that the router is there, and sends requests to these engines and no others."""
        now = self._clock()
        if not self._engines.has_router or not worker_urls or now < self._looked + LOOK_S:
            return
        self._looked = now
        if self._question is not None and self._question.done():
            if self._question.result():
                self._answered, self._is_starting = self._asked, False
            self._question = None
        if self._question is None:
            self._asked, self._question = now, self._helpers.submit(self._engines.router_answers)
        patience_s = self._hung_after_s
        if self._is_starting:
            patience_s = max(patience_s, ROUTER_START_TIMEOUT_S)
        how = self._engines.keep_router(worker_urls, is_hung=now - self._answered > patience_s)
        if how is None:
            return
        self._question, self._answered, self._is_starting = None, now, True
        self._log.count("engine/router_restarts")
        self._log.note("router", f"{how}; it is started again at its address")
