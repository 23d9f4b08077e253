"""Evaluations beside training: which are due, which are under way, and what those say that have ended.

    due -> under way -> ended, with a figure in the row of the step that is finished then
     |         |
     v         v
   skipped   stopped, with the run

One evaluation of a suite is under way at a time. What is due while the one before is still under way is skipped and
counted: a queue of them would fall behind for ever. On engines of their own, which have one version at a time, so is
whatever is due while any is under way.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import orjson

from polyturn.agents.ledger import UNSAMPLED_VERSION
from polyturn.configs.errors import ConfigError, did_you_mean
from polyturn.configs.schema.run import RunConfig
from polyturn.rollout.evaluation.held_out import EvaluationResult
from polyturn.rollout.suites import HELDOUT, Suite, suites_of
from polyturn.rollout.waiting import Meanwhile, awaited, nothing

Result = EvaluationResult | None
"""None: it was stopped with the run."""
Play = Callable[[Suite, int], "Future[Result]"]
"""Begins to play a suite after a step."""


@dataclass(frozen=True, kw_only=True, slots=True)
class UnderWay:
    """An evaluation that has begun."""

    suite: Suite
    step: int
    """The finished step whose weights it is of."""
    version: int
    """The policy version that the engines had when it began."""
    result: Future[Result]


@dataclass(frozen=True, kw_only=True, slots=True)
class Ended:
    """An evaluation that has ended."""

    suite: Suite
    step: int
    version: int
    lag: int
    """Steps that were finished while it was played."""
    result: EvaluationResult

    @property
    def is_pinned(self) -> bool:
        """Whether all that was sampled is of the version that was to be evaluated; so it is where none is recorded."""
        return {self.result.oldest_version, self.result.newest_version} <= {self.version, UNSAMPLED_VERSION}

    @property
    def sentence(self) -> str:
        """For people."""
        late = f", {self.lag} step{'s' * (self.lag > 1)} ago" if self.lag else ""
        mixed = "" if self.is_pinned else ", answered by other weights, too"
        return f"{self.suite.title} during training (step {self.step}{late}{mixed}): {self.result.sentence}"

    @property
    def figures(self) -> dict[str, float]:
        """For `metrics.jsonl`."""
        counted = {f"env/{name}": value for name, value in self.result.metrics.items()}
        numbers = {
            name: float(value)
            for name, value in asdict(self.result).items()
            if not isinstance(value, str | Mapping)
        }
        own = {"step": self.step, "version": self.version, "lag": self.lag, "pinned": self.is_pinned}
        return {
            f"{self.suite.prefix}/{name}": value
            for name, value in (
                counted | numbers | {name: float(value) for name, value in own.items()}
            ).items()
        }


class Evaluations:
    """The evaluations between the steps of a run."""

    def __init__(self, suites: Sequence[Suite], play: Play, log: Path) -> None:
        """`log` is the file to which a line is appended for every evaluation that ended."""
        self._suites = suites
        self._play = play
        self._log = log
        self._under_way: list[UnderWay] = []
        self._num_skipped: dict[str, int] = {}

    def begin(self, step: int, *, engine_step: int, version: int) -> list[Suite]:
        """Begin what is due after a step, but for suites that are still under way; the suites that have begun.

        Args:
            engine_step: The step after which the engines got their weights.
            version: Of those.
        """
        busy = {one.suite.name for one in self._under_way if not one.result.done()}
        begun = []
        for suite in self._suites:
            if not suite.is_due(step):
                continue
            if suite.name in busy:
                self._count_skipped(suite)
                continue
            result = self._play(suite, engine_step)
            self._under_way.append(UnderWay(suite=suite, step=engine_step, version=version, result=result))
            begun.append(suite)
        return begun

    def is_due(self, step: int) -> bool:
        """Whether anything is to be played after a step."""
        return any(suite.is_due(step) for suite in self._suites)

    def skip(self, step: int) -> None:
        """Count all that is due after a step as skipped."""
        for suite in self._suites:
            if suite.is_due(step):
                self._count_skipped(suite)

    def wait(self, meanwhile: Meanwhile = nothing) -> None:
        """Wait until nothing is under way, and do something meanwhile. Raises what one of them raised."""
        for evaluation in self._under_way:
            awaited(evaluation.result, meanwhile)

    def collect(self, step: int) -> list[Ended]:
        """Those that have ended since the last call, once `step` is finished; what was stopped is left out.

        Raises:
            RolloutError: every episode of one failed.
        """
        ended = []
        for evaluation in [one for one in self._under_way if one.result.done()]:
            self._under_way.remove(evaluation)
            result = evaluation.result.result()
            if result is not None:
                ended.append(
                    Ended(
                        suite=evaluation.suite,
                        step=evaluation.step,
                        version=evaluation.version,
                        lag=step - evaluation.step,
                        result=result,
                    )
                )
        self._write(ended)
        return ended

    @property
    def are_under_way(self) -> bool:
        """Whether any is, and has not ended."""
        return not all(one.result.done() for one in self._under_way)

    @property
    def figures(self) -> dict[str, float]:
        """How many were skipped so far, by suite: for rows in which nothing has ended, too."""
        return {f"{prefix}/skipped": float(count) for prefix, count in self._num_skipped.items()}

    def _count_skipped(self, suite: Suite) -> None:
        self._num_skipped[suite.prefix] = self._num_skipped.get(suite.prefix, 0) + 1

    def _write(self, ended: Sequence[Ended]) -> None:
        if not ended:
            return
        self._log.parent.mkdir(exist_ok=True)
        with self._log.open("ab") as file:
            for one in ended:
                line = {"suite": one.suite.name or HELDOUT, "step": one.step, "version": one.version}
                file.write(orjson.dumps({**line, "lag": one.lag, **asdict(one.result)}) + b"\n")


def check_evaluations(config: RunConfig) -> None:
    """Raise ConfigError where a run is to stop, or to keep a checkpoint, by a figure of an evaluation that it has not,
    or to evaluate while its engines rest.

    Figures of other kinds are not known before they are there.
    """
    waits, has_own_engines = config.evaluation.waits, config.evaluation.engines is not None
    if waits != "until_done" and not config.rollout.play_while_training and not has_own_engines:
        raise ConfigError(
            f"evaluation.training_waits={waits} evaluates while the trainer trains, when the engines rest: set "
            "rollout.play_while_training=true, or the other to until_done, or give evaluation.engines"
        )
    keep, stop = config.checkpoint.keep_best, config.trainer.stop_at
    if stop is not None and stop.metric.partition("/")[0] == HELDOUT:
        _suite_measured(config, stop.metric, "trainer.stop_at.metric")
    if keep is None or keep.metric.partition("/")[0] != HELDOUT:
        return
    key, every = "checkpoint.keep_best.metric", config.checkpoint.every_steps
    suite = _suite_measured(config, keep.metric, key)
    if suite.every_steps % every:
        raise ConfigError(
            f"{key}: {keep.metric} is measured after every {suite.every_steps} steps, but there is a checkpoint after "
            f"every {every}: let checkpoint.every_steps divide the other"
        )
    if suite.every_steps % config.weight_sync.every_steps and not has_own_engines:
        raise ConfigError(
            f"{key}: {keep.metric} is measured after every {suite.every_steps} steps, but the engines get weights "
            f"after every {config.weight_sync.every_steps}: let weight_sync.every_steps divide the other"
        )
    if config.evaluation.mixes_versions:
        raise ConfigError(
            f"{key}: with evaluation.training_waits=never several versions may answer, and {keep.metric} is of no "
            "one checkpoint; set it to before_sync, or give evaluation.engines"
        )


def _suite_measured(config: RunConfig, metric: str, key: str) -> Suite:
    """The evaluation that a metric is a figure of. Raises ConfigError where there is none between steps."""
    suites = {suite.prefix: suite for suite in suites_of(config)}
    prefix, _, figure = metric.rpartition("/")
    if prefix not in suites:
        hint = did_you_mean(prefix, suites) or f"; there are {', '.join(suites)}"
        raise ConfigError(f"{key}: there is no evaluation {prefix!r}{hint}")
    known = [
        field.name for field in fields(EvaluationResult) if field.name not in ("method", "policy", "metrics")
    ]
    if figure not in known:
        hint = did_you_mean(figure, known) or f"; it has {', '.join(known)}"
        raise ConfigError(f"{key}: {prefix} has no figure {figure!r}{hint}")
    suite = suites[prefix]
    if not suite.every_steps:
        raise ConfigError(
            f"{key}: {metric} is not measured between steps: set evaluation.every_steps, or every_steps of the suite"
        )
    return suite
