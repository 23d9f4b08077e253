"""The sinks that a config names, and what can be known of them before a run begins."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping

from polyturn.configs.errors import ConfigError
from polyturn.configs.schema.metrics import (
    MetricsConfig,
    MetricsSink,
    PrometheusMetrics,
    SinkPlugin,
    TensorBoardMetrics,
    TrackioMetrics,
    WandbMetrics,
)
from polyturn.envs.plugins import make_part
from polyturn.tools.secrets import read_secret
from polyturn.trainer.sinks.background import BackgroundSink
from polyturn.trainer.sinks.json_lines import JsonLinesSink
from polyturn.trainer.sinks.prometheus import PrometheusSink
from polyturn.trainer.sinks.protocol import METHODS, MetricSink, Row, SinkStart
from polyturn.trainer.sinks.tensorboard import TensorBoardSink
from polyturn.trainer.sinks.trackio import TrackioSink
from polyturn.trainer.sinks.weights_and_biases import WandbSink

PACKAGES: Mapping[str, str] = {
    "tensorboard": "tensorboardX",
    "wandb": "wandb",
    "trackio": "trackio",
    "prometheus": "prometheus_client",
}
"""What each kind needs, by the name of its module."""


def make_sink(config: MetricsSink) -> MetricSink:
    """The sink of a section; nothing of it is open yet. Raises `ValueError` for a plug-in that is none."""
    if isinstance(config, TensorBoardMetrics):
        return TensorBoardSink()
    if isinstance(config, WandbMetrics):
        return WandbSink(config)
    if isinstance(config, TrackioMetrics):
        return TrackioSink(config)
    if isinstance(config, PrometheusMetrics):
        return PrometheusSink(config)
    sink: MetricSink = make_part(METHODS, config.target, options=config.options)
    return sink


def sink_name(config: MetricsSink) -> str:
    """What messages and figures call it."""
    return config.target.rpartition(":")[2] if isinstance(config, SinkPlugin) else config.kind


def check_sinks(config: MetricsConfig) -> None:
    """That packages, plug-ins and keys are there.

    Raises:
        ConfigError: names the sink that could not be opened.
    """
    for sink in config.sinks:
        package = PACKAGES.get(sink.kind)
        if package is not None and importlib.util.find_spec(package) is None:
            raise ConfigError(
                f"metrics.sinks: {sink.kind} needs the package {package}; install it (pip install {package}), or "
                "leave the sink out"
            )
        try:
            if isinstance(sink, WandbMetrics) and sink.api_key_file is not None:
                read_secret(sink.api_key_file, option="api_key_file")
            make_sink(sink)
        except ValueError as error:
            raise ConfigError(f"metrics.sinks: {error}") from error


class RunSinks:
    """All that takes the rows of one run: `metrics.jsonl` at once, the others in their own time."""

    def __init__(self, config: MetricsConfig, start: SinkStart, file: JsonLinesSink) -> None:
        """`file`: cut at the step where the run goes on, as the others may read it."""
        self._file = file
        self._others = [
            BackgroundSink(
                sink_name(sink),
                make_sink(sink),
                start,
                queue_size=config.queue_size,
                close_timeout_s=config.close_timeout_s,
            )
            for sink in config.sinks
        ]

    def write(self, step: int, values: Row) -> None:
        """Write a row. Raises `OSError` where the disk of `metrics.jsonl` is full."""
        lost = {
            f"sink/{sink.name}/dropped": float(sink.num_dropped) for sink in self._others if sink.num_dropped
        }
        row = {**values, **lost}
        self._file.write(step, row)
        for sink in self._others:
            sink.write(step, row)

    def close(self) -> None:
        """Wait for what is not written yet, each for so long as it may take."""
        self._file.close()
        for sink in self._others:
            sink.close()
