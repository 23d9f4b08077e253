"""Weights & Biases, online or as files for `wandb sync`."""

from __future__ import annotations

import hashlib
from typing import Any

from polyturn.configs.metrics.overview import OVERVIEW, headlines
from polyturn.configs.schema.metrics import WandbMetrics
from polyturn.tools.secrets import read_secret
from polyturn.trainer.sinks.protocol import Row, SinkStart
from polyturn.trainer.sinks.sessions import service_run

MAX_ID_LETTERS = 64


class WandbSink:
    """A run of the same name; the curves of the overview stand in a section of their own there.

    The key is handed to the package in memory. NaN and infinities are sent as they are.
    """

    def __init__(self, config: WandbMetrics) -> None:
        self._config = config

    def open(self, start: SinkStart) -> None:
        import wandb

        config = self._config
        key = None if config.api_key_file is None else read_secret(config.api_key_file, option="api_key_file")
        found = service_run("wandb", start)
        settings: dict[str, Any] = {"console": "off", "save_code": False, "disable_git": True, "silent": True}
        if config.base_url is not None:
            settings["base_url"] = config.base_url
        if key is not None:
            settings["api_key"] = key
        self._run = wandb.init(
            project=config.project,
            entity=config.entity,
            group=config.group or start.name,
            tags=config.tags,
            name=found.name,
            id=_identifier(found.name, str(start.run_dir)),
            resume="allow",
            mode=config.mode,
            dir=str(start.run_dir),
            config=dict(start.config),
            settings=wandb.Settings(**settings),
        )
        for curve in OVERVIEW:
            for name in curve.names:
                if curve.better and "*" not in name:
                    self._run.define_metric(name, summary="max" if curve.better == "up" else "min")
        self._found = found
        for step, row in found.missing:
            self.write(step, row)

    def write(self, step: int, values: Row) -> None:
        self._found.note(step)
        self._run.log({**values, **headlines(values)}, step=step)

    def close(self) -> None:
        import wandb

        self._run.finish()
        # Its service would outlive the run.
        wandb.teardown()


def _identifier(name: str, place: str) -> str:
    """Of a run there: the same whenever it is resumed, another one for a run of that name elsewhere."""
    digest = hashlib.sha256(place.encode()).hexdigest()[:8]
    return f"{name[: MAX_ID_LETTERS - 9]}-{digest}"
