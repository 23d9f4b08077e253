"""What is unhealthy in a run, for the table under its progress: alarms that last, figures beyond their range."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from polyturn.configs.metrics.declared import find_metric
from polyturn.configs.metrics.table import WATCHED
from polyturn.configs.schema.alarms import AlarmsConfig
from polyturn.trainer.run.alarms import KINDS, Row

ALARM = "alarm/"


@dataclass(frozen=True, kw_only=True, slots=True)
class Finding:
    """A figure that is not as it should be."""

    name: str
    """Its key in the row."""
    value: float
    healthy: str
    """Where it should be, such as `at most 0.05`."""
    sentence: str
    """What it means, and what to do about it."""
    page: str
    """Where it is explained."""
    is_alarm: bool

    @property
    def line(self) -> str:
        """For a display of lines."""
        return f"{self.name} is {self.value:.4g}, healthy is {self.healthy}: {self.sentence} ({self.page})"


def findings(row: Row, config: AlarmsConfig) -> list[Finding]:
    """What is unhealthy in the row of a step, alarms first. A figure that is not finite is.

    Of figures that are of one metric (of several engines, turns or environments) the first one stands for all.
    """
    found: dict[str, Finding] = {}
    for name, value in row.items():
        if name.startswith(ALARM) and value:
            finding = _of_alarm(name.removeprefix(ALARM), row, config)
            found[finding.name] = finding
    watched = set(WATCHED)
    for name, value in row.items():
        metric = find_metric(name)
        if metric is None or metric.metric.name in watched:
            continue
        if metric.healthy is None:
            if not math.isfinite(value):
                found.setdefault(metric.metric.name, _not_a_number(name, value, metric.metric.page))
        elif not metric.healthy.holds(value):
            finding = Finding(
                name=name,
                value=value,
                healthy=metric.healthy.text,
                sentence=metric.healthy.otherwise,
                page=f"docs/{metric.metric.page}",
                is_alarm=False,
            )
            found.setdefault(metric.metric.name, finding)
    return sorted(found.values(), key=lambda one: not one.is_alarm)


def _of_alarm(alarm: str, row: Row, config: AlarmsConfig) -> Finding:
    kind = KINDS[alarm]
    value = kind.value(row)
    assert value is not None, "an alarm is of a figure of the row"
    return Finding(
        name=kind.figure,
        value=value,
        healthy=f"at most {getattr(config, alarm):g}",
        sentence=kind.says(value, row),
        page="docs/training.md#alarms",
        is_alarm=True,
    )


def _not_a_number(name: str, value: float, page: str) -> Finding:
    sentence = "it is no finite number: what it is made of has overflowed, or is missing"
    return Finding(
        name=name,
        value=value,
        healthy="a finite number",
        sentence=sentence,
        page=f"docs/{page}",
        is_alarm=False,
    )


class HealthMonitor:
    """Follows what is unhealthy over the steps of a run."""

    def __init__(self, config: AlarmsConfig) -> None:
        self._config = config
        self._num_steps: Mapping[str, int] = {}

    def watch(self, row: Row) -> list[Finding]:
        """What has been unhealthy in so many steps in a row as `alarms.after_steps` says, with this one; alarms, which
        have waited for as long, at once."""
        now = findings(row, self._config)
        self._num_steps = {one.name: self._num_steps.get(one.name, 0) + 1 for one in now}
        return [one for one in now if one.is_alarm or self._num_steps[one.name] >= self._config.after_steps]
