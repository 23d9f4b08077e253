"""trackio: a database on this machine, or a Space of Hugging Face."""

from __future__ import annotations

from polyturn.configs.metrics.overview import headlines
from polyturn.configs.schema.metrics import TrackioMetrics
from polyturn.trainer.sinks.protocol import Row, SinkStart
from polyturn.trainer.sinks.sessions import service_run


class TrackioSink:
    """A run of the same name; the curves of the overview stand in a section of their own there."""

    def __init__(self, config: TrackioMetrics) -> None:
        self._config = config

    def open(self, start: SinkStart) -> None:
        import trackio

        found = service_run("trackio", start)
        self._run = trackio.init(
            project=self._config.project,
            name=found.name,
            group=start.name,
            space_id=self._config.space_id,
            server_url=self._config.server_url,
            config=dict(start.config),
            resume="allow",
            embed=False,
            auto_log_gpu=False,
            auto_log_cpu=False,
        )
        self._found = found
        for step, row in found.missing:
            self.write(step, row)

    def write(self, step: int, values: Row) -> None:
        self._found.note(step)
        self._run.log({**values, **headlines(values)}, step=step)

    def close(self) -> None:
        self._run.finish()
