"""The tables of docs/metrics.md, from what is declared."""

from __future__ import annotations

from collections.abc import Iterator

from polyturn.configs.metrics.overview import OVERVIEW
from polyturn.configs.metrics.table import HEALTHY, METRICS, WATCHED, Metric
from polyturn.configs.schema.alarms import AlarmsConfig


def metrics_markdown() -> str:
    """The curves of the overview, then every metric: name, unit, meaning, healthy range, the module that makes it."""
    return "\n".join([*_curves(), "", *_metrics()]) + "\n"


def _curves() -> Iterator[str]:
    yield "| curve | shows |\n| --- | --- |"
    for curve in OVERVIEW:
        yield f"| {curve.title} | {', '.join(f'`{name}`' for name in curve.names)} |"


def _metrics() -> Iterator[str]:
    yield "| metric | unit | what it is | healthy | made in |\n| --- | --- | --- | --- | --- |"
    for metric in METRICS:
        yield (
            f"| `{metric.name}` | {metric.unit} | [{metric.meaning}]({metric.page}) | {_healthy(metric)} "
            f"| [{metric.owner.rpartition('/')[2]}](../{metric.owner}) |"
        )


def _healthy(metric: Metric) -> str:
    """Where its value should be, by the defaults of the alarms; empty where that cannot be said."""
    if metric.name in WATCHED:
        alarm = WATCHED[metric.name]
        return f"at most {getattr(AlarmsConfig(), alarm):g} (`alarms.{alarm}`)"
    return HEALTHY[metric.name].text if metric.name in HEALTHY else ""
