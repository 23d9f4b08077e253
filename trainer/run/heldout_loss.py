"""The loss of a run that is fine-tuned, on rows that are held out."""

from __future__ import annotations

from collections.abc import Mapping

from polyturn.configs.schema.run import RunConfig
from polyturn.rollout.fine_tuning.source import TaughtRow, TaughtSteps, episode_of
from polyturn.rollout.source import StepSource
from polyturn.trainer.credit.estimates import make_samples
from polyturn.trainer.data.samples import TrainSample
from polyturn.trainer.ranks.trainer import Trainer
from polyturn.trainer.run.progress import HELDOUT_LOSS


class HeldOutLoss:
    """The loss on rows that are held out, in nats a taught token, by the weights as they are."""

    def __init__(self, config: RunConfig, trainer: Trainer, source: StepSource) -> None:
        self._every = 0
        self._last = config.trainer.num_steps
        self._trainer = trainer
        self._samples: tuple[TrainSample, ...] = ()
        self.newest: Mapping[str, float] = {}
        """What was measured last; empty: nothing yet."""
        if isinstance(source, TaughtSteps) and config.supervised is not None:
            self._every = config.supervised.heldout_every_steps
            self._samples = _samples_of(source.rows.heldout, config.environment.id)

    def measure(self) -> dict[str, float]:
        """The loss; nothing where no rows are held out."""
        if not self._samples:
            return {}
        self.newest = {HELDOUT_LOSS: self._trainer.cross_entropy(self._samples)}
        return dict(self.newest)

    def after_step(self, step: int) -> dict[str, float]:
        """The same, if it is due after a step."""
        due = step == self._last or (self._every > 0 and step % self._every == 0)
        return self.measure() if due else {}

    def summary(self, *, before: Mapping[str, float] | None) -> dict[str, dict[str, float | None]]:
        """What was measured before and after the run, for `summary.json`."""
        losses = {"before": before, "after": self.newest}
        return {"heldout_loss": {when: (found or {}).get(HELDOUT_LOSS) for when, found in losses.items()}}


def _samples_of(rows: tuple[TaughtRow, ...], environment: str) -> tuple[TrainSample, ...]:
    episodes = [
        episode_of(row, f"heldout{number:08d}", environment=environment) for number, row in enumerate(rows)
    ]
    return make_samples(episodes)
