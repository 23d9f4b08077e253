"""The demo's environment with searches that take time, as remote tools do: the time is slept, no processor's."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

import polyturn
from polyturn.envs.tool_env import StepResult
from polyturn.envs.two_hop.env import TwoHopSearchEnv

LONGEST_S = 12.0


def long_tailed(draws: np.random.Generator) -> float:
    """Mostly a quarter of a second, seldom many: log-normal with a deviation of 1.5, at most `LONGEST_S`."""
    return min(LONGEST_S, 0.25 * math.exp(1.5 * draws.standard_normal()))


def even(draws: np.random.Generator) -> float:
    """About a second, as a search engine behind a queue."""
    return float(draws.uniform(0.5, 1.5))


LATENCIES: Mapping[str, Callable[[np.random.Generator], float]] = {"long_tailed": long_tailed, "even": even}


class SlowSearchEnv(TwoHopSearchEnv):
    """Two searches and an answer; how long a search takes follows from the episode's seed. Held-out ones take none."""

    def __init__(self, *, latency: str = "even", **options: Any) -> None:
        """`latency` is a key of `LATENCIES`, or `none`."""
        super().__init__(**options)
        self._latency = LATENCIES.get(latency)

    async def step_async(self, action: polyturn.AssistantMessage) -> StepResult:
        """As the environment's, after the time that its tool takes."""
        if action.tool_calls and self._latency is not None and self.task.task_id.startswith("train"):
            await asyncio.sleep(self._latency(self.np_random))
        return await super().step_async(action)


def register() -> str:
    """Register the environment; its id."""
    polyturn.register("benchmark/SlowSearch-v0", SlowSearchEnv, nondeterministic=False)
    return "benchmark/SlowSearch-v0"
