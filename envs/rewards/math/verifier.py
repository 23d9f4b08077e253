"""The verifier: what exact arithmetic decides at once, the rest in a pool of processes that can be killed.

Whether a label can be paid at all is asked before anything starts.
"""

from __future__ import annotations

import asyncio
import atexit
import functools
import logging
import os
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Literal, get_args

from polyturn.envs.rewards.math.decide import MAX_CHARACTERS, decide
from polyturn.envs.rewards.math.extract import gold_answer, readings
from polyturn.envs.rewards.math.pool import WorkerPool
from polyturn.envs.rewards.math.verdict import (
    UNDECIDED,
    Label,
    Reason,
    Undecided,
    Unreadable,
    Verdict,
    gold_texts,
)
from polyturn.tools.closing import Closing

_log = logging.getLogger(__name__)
MAX_INLINE = 400
"""Characters of an answer that is read in the calling thread: what is longer could hold it up for long."""

Mode = Literal["boxed", "text", "box_only"]
"""`boxed`: the prediction is an answer as it stands in a box; `text`: a whole reply; `box_only`: a whole reply in which
nothing but a box counts."""


class MathVerifier(Closing):
    """Says whether predictions are right. Safe in threads and in asyncio; uses no signals.

    Most pairs are decided in the calling thread in well below a millisecond; the others in a pool of processes, where
    each has so much processor time. The pool starts at its first use; `close` ends it, and it dies with this process.

    Args:
        num_workers: Processes of the pool.
        cpu_s: Seconds of processor time that a comparison in the pool may take; beyond them an answer is `too_costly`.
        wall_s: Seconds of the clock after which a worker is given up, and the comparison tried once more.
    """

    def __init__(self, *, num_workers: int = 2, cpu_s: float = 2.0, wall_s: float = 60.0) -> None:
        self.pool = WorkerPool(num_workers=num_workers, cpu_s=cpu_s, wall_s=wall_s)
        self._num_workers = num_workers
        self._threads: ThreadPoolExecutor | None = None

    def verify(self, gold: Label, prediction: str, *, mode: Mode = "text") -> Verdict:
        """Compare a prediction with the gold answer.

        Args:
            gold: The answer, or a solution with a box or `####`; or a list of right answers, of which one is enough.
            prediction: An answer or a reply, as `mode` says.
            mode: See `Mode`.

        Raises:
            ValueError: an unknown mode, or a label that is neither text nor number nor a list of such.
            RuntimeError: the processes cannot be started, or the verifier is closed.
        """
        started = time.perf_counter()
        pairs = _pairs(gold, prediction, mode)
        results: list[tuple[bool, Reason]] = []
        for text, answer in pairs:
            result = self._quickly(text, answer)
            results.append(self.pool.compare(gold_answer(text), answer) if result is None else result)
            if results[-1][0]:
                break
        return _verdict(results, pairs, started)

    async def verify_async(self, gold: Label, prediction: str, *, mode: Mode = "text") -> Verdict:
        """As `verify`, without holding up the event loop."""
        started = time.perf_counter()
        pairs = _pairs(gold, prediction, mode)
        results: list[tuple[bool, Reason]] = []
        for text, answer in pairs:
            result = self._quickly(text, answer)
            if result is None:
                if self._threads is None:
                    self._threads = ThreadPoolExecutor(self._num_workers, thread_name_prefix="math-verifier")
                compare = functools.partial(self.pool.compare, gold_answer(text), answer)
                result = await asyncio.get_running_loop().run_in_executor(self._threads, compare)
            results.append(result)
            if result[0]:
                break
        return _verdict(results, pairs, started)

    def warm(self) -> None:
        """Start the pool now, so that no verdict waits for it."""
        self.pool.warm()

    def close(self) -> None:
        """End the pool's processes. Closing twice does nothing."""
        self.pool.close()
        if self._threads is not None:
            self._threads.shutdown(wait=False, cancel_futures=True)

    def _quickly(self, gold: str, answer: str) -> tuple[bool, Reason] | None:
        """The result where no worker is needed for it."""
        gold = gold_answer(gold)
        if MAX_INLINE < max(len(gold), len(answer)) <= MAX_CHARACTERS:
            return None
        try:
            return decide(gold, answer, deep=False)
        except (Undecided, Unreadable):
            return None
        except Exception:  # noqa: BLE001
            # A reader that fails on a text must not give its author a way out of a wrong answer unseen.
            _log.exception("the verifier failed on %r and %r", gold[:MAX_INLINE], answer[:MAX_INLINE])
            return False, "failed"


def verify(gold: Label, prediction: str, *, mode: Mode = "text") -> Verdict:
    """Compare with the verifier that this process shares. See `MathVerifier.verify`."""
    return shared_verifier().verify(gold, prediction, mode=mode)


@functools.cache
def shared_verifier() -> MathVerifier:
    """The verifier of this process, closed when the process exits."""
    verifier = MathVerifier()
    atexit.register(verifier.close)
    os.register_at_fork(after_in_child=verifier.pool.forget)
    return verifier


def _answers(prediction: str, mode: Mode) -> tuple[str, ...]:
    """The answer of a prediction, in the ways in which it can be read; none where it has none."""
    if mode == "boxed":
        boxed = "\\boxed" in prediction or "\\fbox" in prediction
        return readings(prediction, box_only=True) if boxed else (prediction,)
    if mode not in get_args(Mode):
        raise ValueError(f"unknown mode {mode!r}; the modes are {', '.join(get_args(Mode))}")
    return readings(prediction, box_only=mode == "box_only")


def _pairs(gold: Label, prediction: str, mode: Mode) -> list[tuple[str, str]]:
    """What is compared until a pair is equal: each gold answer with each reading of the prediction."""
    # Any text is a gold answer here, if one that nothing equals: what a model wrote may be compared with it.
    golds = (gold,) if isinstance(gold, str) else gold_texts(gold)
    answers = [answer for answer in _answers(prediction, mode) if answer.strip()]
    return [(text, answer) for text in golds for answer in answers]


def _verdict(results: list[tuple[bool, Reason]], pairs: list[tuple[str, str]], started: float) -> Verdict:
    """The verdict on comparisons of which one is enough: undecided where one says nothing and none is right."""
    seconds = time.perf_counter() - started
    if not results:
        return Verdict(correct=False, reason="no_answer", seconds=seconds)
    correct, reason = max(results, key=lambda result: (result[0], result[1] in UNDECIDED))
    answer = pairs[len(results) - 1 if correct else 0][1]
    return Verdict(correct=correct, reason=reason, extracted=answer, seconds=seconds)


_WHY: dict[Reason, str] = {
    "no_answer": "it is empty",
    "unreadable": "it can be read neither as mathematics nor as words",
    "undefined": "it has no value",
    "too_large": "it is beyond the verifier's bounds",
    "too_costly": "comparing it takes too much processor time",
}


def unpayable_reason(label: Any) -> str | None:
    """Why no reply can be paid for a label, such as `((`; None where one can.

    A label is compared with itself in another spelling; of several right answers one that can be paid is enough.
    """
    try:
        golds = gold_texts(label)
    except ValueError as error:
        return str(error)
    reasons = [_unpayable(gold) for gold in golds]
    return None if None in reasons else reasons[0]


def _unpayable(gold: str) -> str | None:
    answer = gold_answer(gold)
    if answer.strip().lower() == "nan":
        return "'nan': a missing value that was made a text"
    correct, reason = _compared(answer, f"{{{answer}}}")
    if correct:
        return None
    return f"{answer!r:.100}: {_WHY.get(reason, 'it does not equal itself in another spelling')}"


def _compared(gold: str, spelled: str) -> tuple[bool, Reason]:
    try:
        return decide(gold, spelled, deep=False)
    except Undecided:  # irrational values: a worker could compare them
        return True, "symbolic"
    except Unreadable:
        verdict = shared_verifier().verify(gold, spelled, mode="boxed")
        return verdict.correct or not verdict.decided, verdict.reason
