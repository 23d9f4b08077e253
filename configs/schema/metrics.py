"""Where the figures of a run go, beside the row of each step in `metrics.jsonl`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import Field, NonNegativeInt, PositiveFloat, PositiveInt, model_validator

from polyturn.configs.schema.section import Plugin, Section


class TensorBoardMetrics(Section):
    """Events for TensorBoard, in `tensorboard/` of the run directory, with the overview as its custom scalars."""

    kind: Literal["tensorboard"]


class WandbMetrics(Section):
    """Weights & Biases (the package `wandb`)."""

    kind: Literal["wandb"]
    project: str = "polyturn"
    """The project there."""
    entity: str | None = None
    """The user or team; null: the key's own."""
    group: str | None = None
    """What the run is shown with; null: its name."""
    tags: list[str] = []
    """Of the run."""
    mode: Literal["online", "offline"] = "online"
    """offline: rows stay in `wandb/` of the run directory, for `wandb sync`."""
    base_url: str | None = None
    """A server of one's own; null: the public one."""
    api_key_file: Path | None = None
    """A file that holds the key and nothing else, or `env:NAME` for a variable; null: the key that the package finds
    (WANDB_API_KEY, or of `wandb login`)."""


class TrackioMetrics(Section):
    """trackio (the package of that name), on this machine or in a Space of Hugging Face."""

    kind: Literal["trackio"]
    project: str = "polyturn"
    """The project that `trackio show` lists."""
    space_id: str | None = None
    """A Space to write to; null: this machine, where TRACKIO_DIR says."""
    server_url: str | None = None
    """A trackio server of one's own to write to."""


class PrometheusMetrics(Section):
    """The newest row as an endpoint that Prometheus scrapes (the package `prometheus_client`)."""

    kind: Literal["prometheus"]
    host: str = "127.0.0.1"
    """The address to listen at. It takes no credentials: whoever reaches it reads the figures."""
    port: Annotated[int, Field(ge=0, lt=65536)] = 9464
    """0: a free one, which is told in the terminal."""


class SinkPlugin(Plugin):
    """A sink of one's own: a class with `open`, `write` and `close` (docs/metrics.md)."""


MetricsSink = Annotated[
    TensorBoardMetrics | WandbMetrics | TrackioMetrics | PrometheusMetrics | SinkPlugin,
    Field(discriminator="kind"),
]


class TimelineConfig(Section):
    """A trace of engines, episodes, trainer and weight sync for ui.perfetto.dev: `timeline/` of the run directory."""

    every_steps: NonNegativeInt = 0
    """Write a file after every so many steps, and after the last; 0: no timeline."""
    keep_files: PositiveInt = 4
    """The newest so many stay."""
    max_events: PositiveInt = 100_000
    """Of each kind between two files; the oldest go first."""


class MetricsConfig(Section):
    """Where the figures of each step go beside `metrics.jsonl` (docs/metrics.md). What a sink takes, and that it fails
    or hangs, is nothing to the run."""

    sinks: list[MetricsSink] = [TensorBoardMetrics(kind="tensorboard")]
    """Each has a thread of its own."""
    queue_size: PositiveInt = 256
    """Rows that wait for a slow sink; further ones are dropped, which is told once and counted."""
    close_timeout_s: PositiveFloat = 30.0
    """How long the end of a run waits for what sinks have not written yet."""
    timeline: TimelineConfig = TimelineConfig()

    @model_validator(mode="after")
    def _each_once(self) -> Self:
        kinds = [sink.kind for sink in self.sinks if sink.kind != "plugin"]
        for kind in kinds:
            if kinds.count(kind) > 1:
                raise ValueError(f"metrics.sinks: {kind} stands there twice")
        return self
