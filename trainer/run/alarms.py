"""Alarms: what in a step's figures is amiss, in a sentence with what to do about it.

An alarm is a threshold of the config against one figure of the row that goes to `metrics.jsonl`. What is not in a row,
as the load of engines that do not tell it, sets none off.
"""

from __future__ import annotations

import fnmatch
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from statistics import fmean, median_low
from types import TracebackType
from typing import Literal, Self

from polyturn.configs.schema.alarms import AlarmsConfig

Row = Mapping[str, float]
LONGEST_PAUSE = "rollout/longest_pause_s"
ALL_ALIKE = 0.5
"""A mean reward above this says that uniform groups are of tasks that are too easy."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Alarm:
    """Something amiss in a step."""

    name: str
    """The option that sets its threshold."""
    sentence: str
    """What is amiss, by how much, and what to do about it."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Kind:
    """One alarm that there is."""

    figure: str
    """Its key in the row; a `*` stands for each engine."""
    sentence: str
    """What is amiss and what to do about it, to be formatted with the figure's `value`."""
    is_live: bool = False
    """`StallWatch` has shown it while it lasted; it goes off after one step, whatever `alarms.after_steps` says."""

    over_engines: Literal["max", "imbalance", "slowness"] = "max"
    """What is made of the figures of several engines: the largest, or that over the mean, or over the median."""

    def value(self, row: Row) -> float | None:
        """The figure in a row; None where it is not there."""
        found = [row[key] for key in fnmatch.filter(row, self.figure)]
        if not found:
            return None
        if self.over_engines == "max":
            return max(found)
        usual = fmean(found) if self.over_engines == "imbalance" else median_low(found)
        return max(found) / usual if usual else 1.0

    def says(self, value: float, row: Row) -> str:
        """The sentence, about a step's row."""
        mean = row.get("reward/mean", 0.0)
        return self.sentence.format(value=value, mean=mean, side="easy" if mean > ALL_ALIKE else "hard")


KINDS: Mapping[str, Kind] = {
    "stall_s": Kind(
        figure=LONGEST_PAUSE,
        sentence="no episode ended for {value:.0f} s: an engine, an environment or a tool holds them up; logs/ has the "
        "engines', and engines.request_timeout_s and environment.hook_timeout_s end sooner what hangs",
        is_live=True,
    ),
    "failed_attempts": Kind(
        figure="rollout/failed_attempts",
        sentence="{value:.0%} of the step's attempts failed: `error` in trajectories/ and journal/ says why; each was "
        "paid for and none is trained on",
    ),
    "uniform_groups": Kind(
        figure="group/uniform",
        sentence="in {value:.0%} of the groups all rewards are alike, at a mean of {mean:.3g}: tasks are too {side} "
        "for the policy; draw others with curriculum.sampler.kind=difficulty, or play more rollout.samples_per_prompt",
    ),
    "truncated_episodes": Kind(
        figure="outcome/truncated",
        sentence="{value:.0%} of the episodes were ended by a limit: `stop_reason` in trajectories/ names it; raise "
        "environment.max_turns, max_tokens_per_turn or max_tokens_per_episode, or see whether answers grow without end",
    ),
    "kv_use": Kind(
        figure="engine/*/kv_use_max",
        sentence="{value:.0%} of an engine's KV cache was in use: requests wait or lose their cache; lower "
        "rollout.max_concurrent_requests, raise sglang.mem_fraction_static, or start more engines.num_engines",
    ),
    "rank_imbalance": Kind(
        figure="train/rank_imbalance",
        sentence="the busiest rank has {value:.2f} times the tokens of the mean one, and all wait for it: samples that "
        "are longer than others cannot be divided; set trainer.balance.method=karmarkar_karp, or less "
        "trainer.parallel.data and more trainer.parallel.context",
    ),
    "lost_tokens": Kind(
        figure="ledger/lost_tokens",
        sentence="{value:.0f} sampled tokens of the step are in no segment, and nothing is trained on them: an agent "
        "gave up calls that the engines had answered",
    ),
    "engines_missing": Kind(
        figure="engine/missing",
        sentence="{value:.0f} engine(s) are missing: lost and not replaced yet, or given up; what "
        "became of each stands in logs/engines.jsonl, and its own log beside it",
    ),
    "engine_slowness": Kind(
        figure="engine/*/token_seconds",
        sentence="the slowest engine takes {value:.1f} times as long for a token as the median one: see what else its "
        "host or GPU does; `polyturn engines remove` takes it out, `add` starts another one",
        over_engines="slowness",
    ),
    "engine_imbalance": Kind(
        figure="engine/*/running",
        sentence="the busiest engine has {value:.2f} times the requests of the mean one: see engines.router.policy, "
        "and whether an engine was replaced or is slower than the others",
        over_engines="imbalance",
    ),
}
"""By the option that sets the threshold."""


def alarms_of(row: Row, config: AlarmsConfig) -> list[Alarm]:
    """What is beyond its threshold in the row of one step."""
    found = []
    for name, threshold in thresholds(config).items():
        kind = KINDS[name]
        value = kind.value(row)
        if value is not None and value > threshold:
            sentence = f"{kind.says(value, row)} (alarms.{name}={threshold:g})"
            found.append(Alarm(name=name, sentence=sentence))
    return found


def thresholds(config: AlarmsConfig) -> dict[str, float]:
    """By the names of the alarms, of those that are not turned off."""
    found = config.model_dump(exclude={"after_steps"})
    return {name: threshold for name, threshold in found.items() if threshold is not None}


class AlarmMonitor:
    """Follows the alarms of a run over its steps, and shows each once when it goes off."""

    def __init__(self, config: AlarmsConfig, show: Callable[[str], None]) -> None:
        self._config = config
        self._show = show
        self._steps_beyond: dict[str, int] = {}

    def watch(self, step: int, row: Row) -> dict[str, float]:
        """Show what goes off with this step; the figures for its row: `alarm/NAME` is 1 while one lasts.

        An alarm that is over may go off again, and is shown again.
        """
        beyond = {alarm.name: alarm for alarm in alarms_of(row, self._config)}
        self._steps_beyond = {name: self._steps_beyond.get(name, 0) + 1 for name in beyond}
        for name, alarm in beyond.items():
            if self._steps_beyond[name] == self._steps_needed(name) and not KINDS[name].is_live:
                self._show(f"alarm at step {step}: {alarm.sentence}")
        return {
            f"alarm/{name}": float(self._steps_beyond.get(name, 0) >= self._steps_needed(name))
            for name in thresholds(self._config)
            if KINDS[name].value(row) is not None
        }

    def _steps_needed(self, name: str) -> int:
        return 1 if KINDS[name].is_live else self._config.after_steps


class StallWatch:
    """Says while it lasts that no episode ends; a context manager around the time in which some are awaited.

    `tick` is called at the end of every episode, from any thread.
    """

    def __init__(self, config: AlarmsConfig, show: Callable[[str], None]) -> None:
        self._limit = config.stall_s
        self._show = show
        self._changed = threading.Condition()
        self._open = False
        self.longest_pause_s = 0.0
        """Between two episodes that ended, or an end of the watch and an episode."""

    def __enter__(self) -> Self:
        self._open = True
        self._last = time.monotonic()
        self._thread = threading.Thread(target=self._watch, name="stall watch", daemon=True)
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, fault: BaseException | None, trace: TracebackType | None
    ) -> None:
        with self._changed:
            self._note_end()
            self._open = False
            self._changed.notify()
        self._thread.join()

    def tick(self) -> None:
        """An episode has ended."""
        with self._changed:
            self._note_end()
            self._changed.notify()

    def _note_end(self) -> None:
        ended = time.monotonic()
        self.longest_pause_s = max(self.longest_pause_s, ended - self._last)
        self._last = ended

    def _watch(self) -> None:
        """Show each pause once, when it has lasted for the limit."""
        shown = None
        with self._changed:
            while self._open:
                waited = time.monotonic() - self._last
                if self._limit is None or shown == self._last:
                    self._changed.wait()
                elif waited < self._limit:
                    self._changed.wait(self._limit - waited)
                else:
                    shown = self._last
                    self._show(f"alarm: {KINDS['stall_s'].says(waited, {})} (alarms.stall_s={self._limit:g})")
