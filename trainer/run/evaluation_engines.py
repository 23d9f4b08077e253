"""Engines that play evaluations alone: each begins with the trainer's newest weights, and keeps them until it ends.

    trainer -> a Hugging Face directory -> the engines load it -> the evaluations of that step
    (waits)                                (nobody waits)

So evaluations are of one version, and neither the next step nor its weights wait for them.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from pathlib import Path

from polyturn.agents.episode import Episode
from polyturn.configs.models import resolve_model_path
from polyturn.configs.schema.run import EVALUATION_ENGINES, RunConfig
from polyturn.rollout.evaluation.held_out import EvaluationResult
from polyturn.rollout.evaluation.worker import EvaluationWorker
from polyturn.rollout.suites import Suite
from polyturn.trainer.ranks.trainer import Trainer
from polyturn.trainer.weight_sync.engine_calls import EngineCalls


class EvaluationEngines:
    """Gives the engines their weights, and plays evaluations on them."""

    def __init__(
        self, worker: EvaluationWorker, loader: ThreadPoolExecutor, *, load: Callable[[Path, int], None]
    ) -> None:
        """`load` has every engine load a Hugging Face directory as a version, in a thread of `loader`."""
        self._worker = worker
        self._loader = loader
        self._load = load
        self._loading: Future[None] | None = None

    def take(self, trainer: Trainer, directory: Path, *, version: int) -> None:
        """Have the evaluations that begin from now on played by the weights that the trainer has, which are of
        `version`. They are written to `directory`; none may be under way."""
        trainer.save_hf(directory)
        self._loading = self._loader.submit(self._load, directory, version)

    def evaluate(
        self,
        suite: Suite,
        *,
        step: int,
        trajectories: Path,
        on_episode: Callable[[Episode], None] | None = None,
    ) -> Future[EvaluationResult | None]:
        """As `StepSource.evaluate`; raises `WeightSyncError`, too, where an engine did not take the weights."""
        return self._worker.evaluate(
            suite, step=step, trajectories=trajectories, on_episode=on_episode, after=self._loading
        )

    def stop(self) -> None:
        """Let no further episode start. May be called from a signal handler."""
        self._worker.stop()

    def halt(self) -> None:
        """End all evaluations that are under way."""
        self._worker.halt()


@contextmanager
def evaluation_engines(
    config: RunConfig, urls: Mapping[str, Sequence[str]], *, written_to: Path
) -> Iterator[EvaluationEngines | None]:
    """The engines of `evaluation.engines`, which run already; None where evaluations are played on those of the run.

    Args:
        urls: of the models beside the policy, by name.
        written_to: the folder of what they load, which goes at the end.
    """
    if config.evaluation.engines is None:
        yield None
        return
    own = urls[EVALUATION_ENGINES]
    load = partial(_load, own, timeout_s=config.evaluation.engines.start_timeout_s)
    worker = EvaluationWorker(config, model_path=resolve_model_path(config.model.path), urls=own)
    try:
        with ThreadPoolExecutor(max_workers=1, thread_name_prefix="evaluation-weights") as loader, worker:
            yield EvaluationEngines(worker, loader, load=load)
    finally:
        shutil.rmtree(written_to, ignore_errors=True)


def _load(urls: Sequence[str], directory: Path, version: int, *, timeout_s: float) -> None:
    with EngineCalls(urls, timeout_s=timeout_s) as engines:
        engines.ask(
            lambda engine: engine.update_weights_from_disk(model_path=str(directory), weight_version=version),
            doing=f"load {directory}",
        )
        engines.check_version(version)
