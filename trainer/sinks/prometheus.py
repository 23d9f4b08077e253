"""The newest row as gauges that Prometheus scrapes."""

from __future__ import annotations

import re
import threading
from collections.abc import Iterable
from typing import TYPE_CHECKING

from polyturn.configs.metrics.declared import find_metric
from polyturn.configs.schema.metrics import PrometheusMetrics
from polyturn.trainer.sinks.protocol import Row, SinkStart

if TYPE_CHECKING:
    from prometheus_client.core import GaugeMetricFamily


class PrometheusSink:
    """`GET http://HOST:PORT/metrics`. `engine/0/kv_use` is `polyturn_engine_kv_use{run="...",part="0"}`: one name for
    each metric that is declared, and what a run has in it as a label."""

    def __init__(self, config: PrometheusMetrics) -> None:
        self._config = config

    def open(self, start: SinkStart) -> None:
        from prometheus_client import CollectorRegistry, start_http_server

        self._row: dict[str, float] = {}
        self._run = start.name
        registry = CollectorRegistry()
        registry.register(self)
        self._server, self._thread = start_http_server(
            self._config.port, self._config.host, registry=registry
        )
        start.tell(f"metrics for Prometheus: http://{self._config.host}:{self._server.server_port}/metrics")

    def write(self, step: int, values: Row) -> None:
        # As a whole, so that what is scraped meanwhile is of one step.
        self._row = {"step": float(step), **values}

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()
        if self._thread is not threading.current_thread():
            self._thread.join()

    def collect(self) -> Iterable[GaugeMetricFamily]:
        """What the package asks for at each scrape."""
        return gauges(self._row, run=self._run)


def gauges(row: Row, *, run: str) -> list[GaugeMetricFamily]:
    """The figures of a row, one family for each declared metric."""
    from prometheus_client.core import GaugeMetricFamily

    families: dict[str, GaugeMetricFamily] = {}
    for key, value in row.items():
        found = find_metric(key)
        pattern = key if found is None else found.metric.name
        name = f"polyturn_{re.sub('_+', '_', re.sub('[^a-zA-Z0-9_]', '_', pattern)).strip('_')}"
        meaning = "" if found is None else f"{found.metric.meaning} ({found.metric.unit})"
        family = families.setdefault(name, GaugeMetricFamily(name, meaning, labels=["run", "part"]))
        family.add_metric([run, "/".join(found.parts) if found else ""], value)
    return list(families.values())
