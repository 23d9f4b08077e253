"""A small taskset in verifiers' own form: sums, an adder, a reward and a metric. Imports verifiers."""

from __future__ import annotations

import random
import re
from collections.abc import Iterable

import verifiers.v1 as vf


class SumData(vf.TaskData):
    """What is asked, and what is right."""

    answer: str


class AdderConfig(vf.ToolsetConfig):
    """Has no options."""


class Adder(vf.Toolset[AdderConfig]):
    """Adds."""

    TOOL_PREFIX = None

    @vf.tool
    async def add(self, a: int, b: int) -> int:
        """Add two numbers."""
        if max(a, b) > 10_000:
            raise ValueError("the adder has four digits")
        return a + b


class SumTask(vf.Task[SumData]):
    """The last boxed number counts."""

    @classmethod
    def toolsets(cls, config: vf.TaskConfig) -> list[vf.Toolset]:
        del config
        return [Adder(AdderConfig())]

    @vf.reward
    async def right(self, trace: vf.Trace) -> float:
        """Whether the only box holds the sum."""
        boxes = re.findall(r"\\boxed\{([^{}]*)\}", trace.last_reply)
        return float(len(boxes) == 1 and boxes[0] == self.data.answer)

    @vf.metric
    async def turns(self, trace: vf.Trace) -> float:
        """Messages of the model."""
        return float(trace.num_turns)


class SumsConfig(vf.TasksetConfig):
    """How many, and which."""

    size: int = 1000
    seed: int = 0


class Sums(vf.Taskset[SumTask, SumsConfig]):
    """Sums of two numbers."""

    def load(self) -> Iterable[SumTask]:
        rng = random.Random(self.config.seed)
        for number in range(self.config.size):
            a, b = rng.randint(10, 999), rng.randint(10, 999)
            prompt = f"What is {a} + {b}? Put the number into \\boxed{{}}."
            data = SumData(id=f"sum-{number}", prompt=prompt, answer=str(a + b))
            yield SumTask(data, self.config.task)
