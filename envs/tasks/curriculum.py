"""The tasks of a run, position by position: a sampler draws, a gate admits, and what was drawn stays drawn.

Where neither adapts, the task at a position follows from the position and the seed, and there is nothing to keep. Where
one does, the draws depend on how earlier tasks went: each is then made once, in the order of positions, and is kept
until what came of it is known. All of that is the curriculum's state, which goes into the checkpoint; what is drawn
behind that is in a log, so that a crash does not have other tasks drawn than were begun.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from polyturn.configs.schema.curriculum import CurriculumConfig, OpenGate
from polyturn.envs.messages import TaskSource
from polyturn.envs.tasks.admission import AdmissionGate, make_gate
from polyturn.envs.tasks.draw_log import DrawLog, LoggedDraw
from polyturn.envs.tasks.order import Draw, DrawOrder
from polyturn.envs.tasks.rates import SuccessRates, read_difficulties
from polyturn.envs.tasks.samplers import TaskSampler, make_sampler, pure_order

MAX_PASSED_OVER = 4096
"""After so many draws in a row that a gate did not admit, the next one is played all the same."""


class Curriculum:
    """Draws that depend on how earlier ones went. Its methods may be called from several threads."""

    def __init__(
        self, sampler: TaskSampler, gate: AdmissionGate | None, rates: SuccessRates, *, num_tasks: int
    ) -> None:
        self._sampler = sampler
        self._num_tasks = num_tasks
        self._gate = gate
        self._rates = rates
        self._lock = threading.Lock()
        self._open: dict[int, Draw] = {}
        """What was drawn and of which it is not known what came of it, by position."""
        self._next = 0
        self._num_sampled = 0
        self._num_forced = 0
        self._log: DrawLog | None = None

    def keep_draws(self, path: Path) -> None:
        """Keep draws in a file from here on, and draw again what stands there of positions that are not drawn yet."""
        with self._lock:
            self._log = DrawLog(path, position=self._next)

    def close(self) -> None:
        """Close the file of the draws."""
        with self._lock:
            if self._log is not None:
                self._log.close()
                self._log = None

    def __getitem__(self, position: int, /) -> Draw:
        """What stands at a position. Raises `LookupError` for one of which it is known already what came of it."""
        with self._lock:
            while self._next <= position:
                self._open[self._next] = self._draw_at(self._next)
                self._next += 1
            if position not in self._open:
                raise LookupError(f"what was drawn at position {position} is not kept any more")
            return self._open[position]

    def observe(self, position: int, rewards: Sequence[float]) -> None:
        """What came of a draw: the rewards of its episodes that did not fail. Each position is observed once."""
        with self._lock:
            task_index = self._open.pop(position).task_index
            self._rates.observe(task_index, rewards)
            self._sampler.observe(task_index, rewards)
            if self._gate is not None:
                self._gate.observe(task_index, rewards)

    @property
    def metrics(self) -> dict[str, float]:
        """Figures of all draws so far: those that the gate passed over, and those that it had to let pass."""
        with self._lock:
            return {
                "curriculum/passed_over": float(self._num_sampled - self._next),
                "curriculum/forced": float(self._num_forced),
                "curriculum/known_tasks": float(sum(1 for _ in self._rates.known())),
            }

    def state(self) -> dict[str, Any]:
        """All that draws from here on follow from beside the seed, as JSON has it."""
        with self._lock:
            return {
                "next": self._next,
                "num_sampled": self._num_sampled,
                "num_forced": self._num_forced,
                "open": {str(position): [d.task_index, d.epoch] for position, d in self._open.items()},
                "rates": self._rates.state(),
                "sampler": self._sampler.state(),
                "gate": None if self._gate is None else self._gate.state(),
            }

    def restore(self, state: Mapping[str, Any]) -> None:
        """Go on from a state: the draws that were open are as they were."""
        with self._lock:
            self._next = int(state["next"])
            self._num_sampled = int(state["num_sampled"])
            self._num_forced = int(state["num_forced"])
            self._open = {int(position): Draw(*drawn) for position, drawn in state["open"].items()}
            self._rates.restore(state["rates"])
            self._sampler.restore(state["sampler"])
            if self._gate is not None:
                self._gate.restore(state["gate"])

    def _draw_at(self, position: int) -> Draw:
        """The draw of the log, or else a new one, which goes there."""
        if self._log is None:
            return self._draw()
        logged = self._log.take(position)
        if logged is None:
            draw = self._draw()
            self._log.append(position, LoggedDraw(draw=draw, num_sampled=self._num_sampled))
            return draw
        drawn = self._sample()
        if drawn.task_index != logged.draw.task_index:
            # By what is known now it would be another task; for the sampler that one is over.
            self._sampler.observe(drawn.task_index, ())
        self._num_sampled = logged.num_sampled
        return logged.draw

    def _draw(self) -> Draw:
        """The next draw that the gate admits; after many that it does not, the one that comes then."""
        for _ in range(MAX_PASSED_OVER):
            draw = self._sample()
            if self._gate is None or self._gate.admits(draw.task_index):
                return draw
            # For the sampler it is over.
            self._sampler.observe(draw.task_index, ())
        self._num_forced += 1
        return self._sample()

    def _sample(self) -> Draw:
        """Raises `ValueError` for what a plug-in may not give."""
        draw = self._sampler.draw(self._num_sampled)
        if not isinstance(draw, Draw) or not 0 <= draw.task_index < self._num_tasks:
            raise ValueError(
                f"the task sampler drew {draw!r}; it must give a Draw of one of the {self._num_tasks} tasks"
            )
        self._num_sampled += 1
        return draw


def make_curriculum(config: CurriculumConfig, tasks: TaskSource, *, seed: int) -> DrawOrder:
    """What a config says of the order of tasks: a `Curriculum` where draws depend on results.

    Raises:
        ValueError: the source is empty, a plug-in is none, or the file of difficulties cannot be used.
    """
    order = pure_order(config, tasks, seed=seed)
    if order is not None and isinstance(config.gate, OpenGate):
        return order
    rates = SuccessRates(success_reward=config.success_reward, memory=config.memory)
    if config.difficulties is not None:
        num_known = rates.begin_with(tasks, read_difficulties(config.difficulties))
        if not num_known:
            raise ValueError(f"{config.difficulties} knows none of the tasks: it is of others")
    sampler = make_sampler(config, tasks, seed=seed, rates=rates)
    return Curriculum(sampler, make_gate(config, tasks, rates=rates), rates, num_tasks=len(tasks))
