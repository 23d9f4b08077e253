"""What a metric decides in a run: which checkpoint is the best one, and whether the run has come where it should."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

import orjson

from polyturn.configs.errors import did_you_mean
from polyturn.configs.metrics.declared import undeclared
from polyturn.configs.metrics.table import METRICS
from polyturn.configs.schema.run import RunConfig
from polyturn.configs.schema.trainer import KeepBest, StopAt
from polyturn.rollout.whole_file import whole_file

Row = Mapping[str, float]


@dataclass(frozen=True, kw_only=True, slots=True)
class Best:
    """The best checkpoint of a run, as `best.json` has it."""

    step: int
    metric: str
    mode: str
    value: float

    @classmethod
    def read(cls, path: Path) -> Best | None:
        """What the file says; None where it says nothing that can be read."""
        try:
            found = cls(**orjson.loads(path.read_bytes()))
        except (OSError, orjson.JSONDecodeError, TypeError):
            return None
        return found if isinstance(found.step, int) and isinstance(found.value, int | float) else None

    def beats(self, other: Best | None) -> bool:
        """Whether this one is better; where both are alike the earlier one is."""
        if other is None or (other.metric, other.mode) != (self.metric, self.mode):
            return True
        return self.value > other.value if self.mode == "max" else self.value < other.value


class BestCheckpoint:
    """Follows which checkpoint is best, and which may yet turn out to be.

    States of a step that has a checkpoint:

        awaited -> candidate -> best (once its checkpoint is complete)
           |           |
           v           v
        let go      let go (another is better)

    A figure may come when later steps are finished already, as that of an evaluation beside training: until then the
    step's checkpoint is kept, too.
    """

    def __init__(self, config: KeepBest | None, path: Path) -> None:
        """`path` is the file that names the best one; a resumed run goes on with what it says."""
        self._config = config
        self._path = path
        self._awaited: set[int] = set()
        self._candidate: Best | None = None
        self.best = None if config is None else self._recorded(config)

    def is_by(self, prefix: str) -> bool:
        """Whether the metric is a figure under a prefix, as `heldout`."""
        return self._config is not None and self._config.metric.rpartition("/")[0] == prefix

    def expect(self, step: int) -> None:
        """The metric of a step will come later."""
        if self._config is not None:
            self._awaited.add(step)

    def report(self, step: int, figures: Row) -> None:
        """Figures of a step that has a checkpoint, or is about to have one."""
        if self._config is None:
            return
        value = figures.get(self._config.metric)
        if value is None:
            return
        self._awaited.discard(step)
        found = Best(step=step, metric=self._config.metric, mode=self._config.mode, value=float(value))
        if math.isfinite(found.value) and found.beats(self._candidate or self.best):
            self._candidate = found

    def give_up(self, step: int) -> None:
        """The metric of a step will not come, after all."""
        self._awaited.discard(step)

    def kept(self) -> frozenset[int]:
        """Steps whose checkpoints are not to be deleted."""
        named = (found.step for found in (self.best, self._candidate) if found is not None)
        return frozenset((*named, *self._awaited))

    def record(self, complete: Iterable[int]) -> Best | None:
        """Write down the candidate, once its checkpoint is complete; what was written, if anything was."""
        if self._candidate is None or self._candidate.step not in complete:
            return None
        self.best, self._candidate = self._candidate, None
        with whole_file(self._path) as file:
            file.write(orjson.dumps(asdict(self.best), option=orjson.OPT_INDENT_2))
        return self.best

    def _recorded(self, config: KeepBest) -> Best | None:
        """What another metric called the best one is not."""
        found = Best.read(self._path)
        return (
            found
            if found is not None and (found.metric, found.mode) == (config.metric, config.mode)
            else None
        )


def unknown_metrics(config: RunConfig) -> list[str]:
    """A sentence for each metric that the config waits for and no part of Polyturn makes.

    That is no mistake where an algorithm of one's own makes it; where none does, the run never stops by it, and no
    checkpoint is the best.
    """
    named = {"trainer.stop_at": config.trainer.stop_at, "checkpoint.keep_best": config.checkpoint.keep_best}
    known = [metric.name for metric in METRICS if "*" not in metric.name]
    return [
        f"{key}.metric: {section.metric!r} is no metric of docs/metrics.md; nothing comes of it unless an "
        f"algorithm of your own makes it{did_you_mean(section.metric, known)}"
        for key, section in named.items()
        if section is not None and undeclared([section.metric])
    ]


def reached(config: StopAt | None, figures: Row) -> str | None:
    """A sentence where the figures are where the run was to stop; None where they are not, or lack the metric."""
    if config is None:
        return None
    value = figures.get(config.metric)
    if value is None:
        return None
    if config.at_least is not None and value >= config.at_least:
        return f"{config.metric} is {value:.4g}, at least {config.at_least:g} (trainer.stop_at)"
    if config.at_most is not None and value <= config.at_most:
        return f"{config.metric} is {value:.4g}, at most {config.at_most:g} (trainer.stop_at)"
    return None
