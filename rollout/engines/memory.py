"""The memory of engines whose GPUs are somebody else's by turns: given up when idle, taken back in two steps."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial

from polyturn.rollout.engines.control import EngineControl, MemoryTag
from polyturn.rollout.engines.process import EngineError

BESIDE_WEIGHTS: tuple[MemoryTag, ...] = ("kv_cache", "cuda_graph")
"""What an engine needs to answer, beside its weights."""
WEIGHTS: tuple[MemoryTag, ...] = ("weights",)
ALL: tuple[MemoryTag, ...] = (*WEIGHTS, *BESIDE_WEIGHTS)


class EngineMemory:
    """That of all engines of a run. What was done already is not done again, engine by engine.

    An engine with a request under way does not survive that its memory is released, so it is emptied and kept empty
    first: what it has under way is answered with the tokens that it has, and what comes later waits in the server until
    `resume_cache`. To a router in front it is as healthy as before.

    Every call raises `EngineError` for all engines that failed, or did not do it in time.
    """

    def __init__(self, engines: Sequence[EngineControl], *, num_sharing: int, timeout_s: float) -> None:
        """`num_sharing`: how many of them, the last ones, are to give memory up; the others only stand still."""
        self._engines = engines
        self._sharing = set(engines[len(engines) - num_sharing :])
        self._timeout_s = timeout_s

    def release(self) -> None:
        """Give up weights, KV and graphs. The contents are lost."""
        self._on_all(self._release, "given its memory up")

    def give_up_weight_updates(self) -> None:
        """Close what a trainer left open when it died, where the weights are still there to be closed."""
        self._on_all(_give_up_weight_update, "closed the weight update")

    def resume_weights(self) -> None:
        """Take back the memory of the weights, which are then to be sent; nothing is answered yet."""
        self._on_all(_resume_weights, "taken the memory of its weights back")

    def resume_cache(self) -> None:
        """Take back all the rest, and go on answering."""
        self._on_all(_resume_cache, "taken the memory of its KV back")

    def _release(self, engine: EngineControl, deadline: float) -> None:
        if engine.released >= set(ALL):
            return
        load = engine.load()
        if load.num_running or load.num_waiting:
            engine.pause("abort", timeout_s=_left(engine, deadline))
        # This also empties the scheduler of what it has begun since, and stops it.
        engine.pause("retract", timeout_s=_left(engine, deadline))
        if engine in self._sharing:
            engine.release_memory(ALL, timeout_s=_left(engine, deadline))

    def _on_all(self, change: Callable[[EngineControl, float], None], done: str) -> None:
        deadline = time.monotonic() + self._timeout_s
        faults = []
        with ThreadPoolExecutor(max_workers=max(1, len(self._engines))) as threads:
            calls = [threads.submit(partial(change, engine, deadline)) for engine in self._engines]
            for engine, call in zip(self._engines, calls, strict=True):
                fault = call.exception()
                if isinstance(fault, EngineError):
                    faults.append(f"{engine.url} has not {done}: {fault}")
                elif fault is not None:
                    raise fault
        if faults:
            raise EngineError("; ".join(faults))


def _left(engine: EngineControl, deadline: float) -> float:
    left = deadline - time.monotonic()
    if left <= 0:
        raise EngineError(f"{engine.url} took longer than engines.turn_timeout_s")
    return left


def _give_up_weight_update(engine: EngineControl, _deadline: float) -> None:
    if "weights" not in engine.released:
        engine.give_up_weight_update()


def _resume_weights(engine: EngineControl, deadline: float) -> None:
    engine.resume_memory(WEIGHTS, timeout_s=_left(engine, deadline))


def _resume_cache(engine: EngineControl, deadline: float) -> None:
    engine.resume_memory(BESIDE_WEIGHTS, timeout_s=_left(engine, deadline))
    engine.go_on()
