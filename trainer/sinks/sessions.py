"""Runs at services that take rows and never take them back: which one a resumed run goes on with.

A resume may go back to an older step. Where the service has later rows than that, a new run is begun there, with all
rows up to that step, so that no step is in it twice and none is of weights that are gone.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from polyturn.rollout.whole_file import whole_file
from polyturn.trainer.sinks.protocol import Row, SinkStart


@dataclass(slots=True)
class ServiceRun:
    """The run at a service that rows go to."""

    file: Path
    name: str
    """As the run directory; with `-2` and so on behind it where it was begun anew."""
    missing: Sequence[tuple[int, Row]]
    """Rows that the service does not have yet."""
    number: int

    def note(self, step: int) -> None:
        """The row of a step is about to be sent: said before, as one that is lost does less harm than one twice."""
        with whole_file(self.file) as file:
            file.write(json.dumps({"number": self.number, "last_step": step}).encode())


def service_run(service: str, start: SinkStart) -> ServiceRun:
    """Which run at the service goes on at `start`. The run directory remembers it in `sinks/SERVICE.json`."""
    file = start.run_dir / "sinks" / f"{service}.json"
    number, sent = 1, 0
    if file.exists():
        found = json.loads(file.read_bytes())
        number, sent = found["number"], found["last_step"]
    if sent > start.last_step:
        number, sent = number + 1, 0
    file.parent.mkdir(exist_ok=True)
    return ServiceRun(
        file=file,
        name=start.name if number == 1 else f"{start.name}-{number}",
        missing=[(step, row) for step, row in start.history() if step > sent],
        number=number,
    )
