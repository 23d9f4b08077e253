"""Ctrl-C: the first signal is a request, the second insists."""

from __future__ import annotations

import os
import signal

import pytest

from polyturn.tools.interruption import InterruptGuard


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_first_signal_asks_and_second_insists(number: signal.Signals) -> None:
    before = signal.getsignal(number)
    told: list[bool] = []
    with InterruptGuard() as guard:
        guard.subscribe(lambda: told.append(guard.requested))
        assert not guard.requested
        os.kill(os.getpid(), number)
        assert guard.requested
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), number)
    assert told == [True]
    assert signal.getsignal(number) == before
