"""What a metric is, and finding the one that a name in a row of `metrics.jsonl` belongs to."""

from __future__ import annotations

import functools
import re
from collections.abc import Iterable
from dataclasses import dataclass

from polyturn.configs.metrics.table import HEALTHY, METRICS, Healthy, Metric

OF_ENVIRONMENT = "environment/"
"""What a name begins with that is told of one environment of a mixture: its id and another metric follow."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Found:
    """The declared metric that a name belongs to."""

    metric: Metric
    parts: tuple[str, ...]
    """What stands for each `*` of its name, and what a name has beside it: `("0",)` of `engine/0/kv_use`."""

    @property
    def healthy(self) -> Healthy | None:
        """Where its value should be; None where that cannot be said."""
        return HEALTHY.get(self.metric.name)


@functools.cache
def find_metric(name: str) -> Found | None:
    """The declared metric of a name; None where there is none.

    A name of its own goes before a pattern, and the pattern with the most letters before others.
    """
    if name.startswith(OF_ENVIRONMENT):
        return _of_environment(name.removeprefix(OF_ENVIRONMENT))
    matches = []
    for metric, pattern in _patterns():
        found = pattern.fullmatch(name)
        if found is not None:
            matches.append((metric, tuple(part for part in found.groups() if part)))
    if not matches:
        return None
    metric, parts = max(matches, key=lambda match: _num_letters(match[0].name))
    return Found(metric=metric, parts=parts)


def _of_environment(name: str) -> Found | None:
    """Of an environment's id, which may have slashes in it, and a metric."""
    parts = name.split("/")
    for end in range(1, len(parts)):
        inner = find_metric("/".join(parts[end:]))
        if inner is not None:
            return Found(metric=inner.metric, parts=("/".join(parts[:end]), *inner.parts))
    return None


def undeclared(names: Iterable[str]) -> list[str]:
    """The names that no declared metric has. `step` numbers the rows and is none."""
    return sorted(name for name in names if name != "step" and find_metric(name) is None)


@functools.cache
def _patterns() -> tuple[tuple[Metric, re.Pattern[str]], ...]:
    return tuple((metric, re.compile(_expression(metric.name))) for metric in METRICS)


def _expression(name: str) -> str:
    """As a regular expression with a group for each part that a name may have there."""
    return re.escape(name).replace(r"\[\*/\]", "(?:(.+?)/)?").replace(r"\*", "(.+?)")


def _num_letters(name: str) -> int:
    return len(name.replace("[*/]", "").replace("*", ""))
