"""Who waits has something to do meanwhile, and nothing is lost of what it waits for."""

from __future__ import annotations

import threading
from concurrent.futures import Future

import pytest

from polyturn.rollout.waiting import awaited


def test_something_is_done_until_the_result_is_there() -> None:
    future: Future[int] = Future()
    done: list[int] = []

    def meanwhile() -> None:
        done.append(len(done))
        if len(done) == 3:
            threading.Thread(target=future.set_result, args=(7,)).start()

    assert awaited(future, meanwhile, every_s=0.001) == 7
    assert len(done) >= 3


def test_a_timeout_of_the_work_itself_is_its_result() -> None:
    future: Future[int] = Future()
    future.set_exception(TimeoutError("the work's own"))
    with pytest.raises(TimeoutError, match="the work's own"):
        awaited(future, lambda: None)


def test_what_is_raised_meanwhile_ends_the_wait_and_the_work() -> None:
    future: Future[int] = Future()

    def fail() -> None:
        raise RuntimeError("no engine is left")

    with pytest.raises(RuntimeError, match="no engine is left"):
        awaited(future, fail, every_s=0.001)
    assert future.cancelled()
