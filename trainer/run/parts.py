"""The processes of a run, begun one after the other and ended together: Ray, the engines, and what gives steps."""

from __future__ import annotations

import logging
import uuid
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing, contextmanager
from pathlib import Path

import ray

from polyturn.configs.models import resolve_model_path
from polyturn.configs.schema.run import RunConfig
from polyturn.configs.sizing.served import managed_models
from polyturn.rollout.engines.engine_log import EngineLog
from polyturn.rollout.engines.groups import ServedGroups
from polyturn.rollout.engines.keeper import EngineKeeper
from polyturn.rollout.engines.launch import Engines, ExternalLauncher
from polyturn.rollout.engines.process import EngineError
from polyturn.rollout.engines.ray_launcher import RayLauncher
from polyturn.rollout.engines.reservation import Reservation, SharedPath
from polyturn.rollout.engines.server import EngineSpec
from polyturn.rollout.fine_tuning.source import TaughtRows, TaughtSteps, load_rows
from polyturn.rollout.player import RolloutError
from polyturn.rollout.replay import ReplayedSteps
from polyturn.rollout.source import StepSource
from polyturn.rollout.worker import RolloutWorker
from polyturn.trainer.models.quantization import starts_engines
from polyturn.trainer.run.cluster import reserve, start_ray
from polyturn.trainer.run.directory import RunDirectory
from polyturn.trainer.run.failures import sentence_of
from polyturn.trainer.run.ray_reaper import start_reaper
from polyturn.trainer.weight_sync import WeightSyncError

logger = logging.getLogger(__name__)


def begin_ray(
    stack: ExitStack, config: RunConfig, directory: RunDirectory, *, trains: bool = True
) -> Reservation:
    """Join the config's Ray cluster, or start one, until the stack ends; what the run takes of it.

    `trains`: whether ranks of the trainer will be started.
    """
    start_ray(config)
    if config.cluster.address is None:
        stack.callback(start_reaper(directory.logs / "reaper.log").stop)
    stack.callback(ray.shutdown)
    with shared_paths(config, directory) as paths:
        reservation = reserve(config, shared_paths=paths, trains=trains)
    stack.callback(ignoring_dead_actors(reservation.release))
    return reservation


@contextmanager
def shared_paths(config: RunConfig, directory: RunDirectory) -> Iterator[list[SharedPath]]:
    """The paths that every node of a cluster must see. By a file in it meanwhile, the run directory is told from
    another one of that name."""
    models = {"model.path": config.model.path, "model.reference_path": config.model.reference_path}
    models |= {f"{model.name}.path": model.path for model in managed_models(config)}
    probe = directory.logs / f".seen-{uuid.uuid4().hex}"
    probe.touch()
    try:
        yield [
            SharedPath(what="the run directory", path=directory.path, probe=probe),
            *(
                SharedPath(what=key, path=found, probe=found / "config.json")
                for key, path in models.items()
                if path is not None
                for found in [resolve_model_path(path, key=key)]
            ),
        ]
    finally:
        probe.unlink()


def begin_engines(
    stack: ExitStack, config: RunConfig, directory: RunDirectory, reservation: Reservation
) -> Engines:
    """Start the engines, until the stack ends; they are to be waited for."""
    model_path = resolve_model_path(config.model.path)
    served = _engine_model(config, model_path, directory)
    spec = EngineSpec.from_config(config, model_path=served, log_directory=directory.logs)
    external = config.engines.urls
    launcher = ExternalLauncher(spec, external) if external else RayLauncher(spec, reservation)
    engines = Engines(spec, launcher)
    stack.callback(ignoring_dead_actors(engines.stop))
    engines.start()
    return engines


def begin_groups(
    stack: ExitStack, config: RunConfig, directory: RunDirectory, reservation: Reservation
) -> ServedGroups:
    """Start the engines of the models beside the policy, until the stack ends; they are to be waited for."""
    groups = ServedGroups(
        config,
        log_directory=directory.logs,
        make_launcher=lambda spec, name: RayLauncher(spec, reservation, group=name),
    )
    stack.callback(ignoring_dead_actors(groups.stop))
    groups.start()
    return groups


@contextmanager
def kept_engines(
    config: RunConfig,
    directory: RunDirectory,
    engines: Engines | None,
    source: StepSource,
    tell: Callable[[str], None],
) -> Iterator[EngineKeeper | None]:
    """What looks after the engines of a run, as long as `source` asks them; None where there are none."""
    if engines is None:
        yield None
        return
    assert isinstance(source, RolloutWorker), "engines are there to be played on"
    keeper = EngineKeeper(
        engines,
        config.engines.replace,
        players=source,
        directory=directory.path,
        log=EngineLog(directory.logs, tell),
        start_timeout_s=config.engines.start_timeout_s,
        drain_s=config.engines.request_timeout_s,
        are_fixed=config.shares_gpus,
        are_updated_elsewhere=config.engines.updates == "external",
    )
    with closing(keeper):
        yield keeper


class StartingWeights:
    """The `Weights` of a run that does not train: engines start with all that they ever serve."""

    def bring(self, url: str, admit: Callable[[int], None]) -> bool:
        del url
        admit(0)
        return True

    def serves(self, url: str) -> bool:
        del url
        return True


@contextmanager
def step_source(
    config: RunConfig, engines: Engines | None, rows: TaughtRows | None = None
) -> Iterator[StepSource]:
    """What gives the run its steps: they are played on the engines, or where there are none made of rows, or replayed.

    Args:
        rows: As of `train`.
    """
    if config.supervised is not None:
        yield TaughtSteps(config, rows or load_rows(config))
        return
    if engines is None:
        assert config.rollout.replay is not None, "without engines there is something to replay"
        yield ReplayedSteps(config.rollout.replay, samples_per_prompt=config.rollout.samples_per_prompt)
        return
    with RolloutWorker(
        config,
        model_path=resolve_model_path(config.model.path),
        url=engines.request_urls,
        engine_urls=engines.engine_urls,
    ) as worker:
        yield worker


@contextmanager
def naming_what_ended(*served: Engines | ServedGroups | None) -> Iterator[None]:
    """Where something fails, and the router or an engine has ended, say that first: the one follows from the other."""
    try:
        yield
    except (EngineError, RolloutError, WeightSyncError, ray.exceptions.RayError) as failure:
        ended = [how for each in served if each is not None for how in each.ended()]
        if not ended:
            raise
        raise EngineError(f"{'; '.join(ended)}: {sentence_of(failure)}") from failure


def ignoring_dead_actors(close: Callable[[], None]) -> Callable[[], None]:
    """On the way out an actor may have died already: that must not hide why."""

    def attempt() -> None:
        try:
            close()
        except (ray.exceptions.RayError, RuntimeError) as fault:
            logger.info("closing: %s", sentence_of(fault))

    return attempt


def _engine_model(config: RunConfig, model_path: Path, directory: RunDirectory) -> Path:
    """What engines must be started from to take the weights that are synced: the model, or it in FP8, or out of FP8,
    made once a run."""
    from polyturn.trainer.models.hf_directory import FP8Cast, read_config, write_unquantised

    dtype = config.weight_sync.dtype
    if starts_engines(read_config(model_path), dtype):
        return model_path
    if not directory.engine_model.exists():
        if dtype == "fp8_block":
            FP8Cast(model_path).write(directory.engine_model)
        else:
            write_unquantised(model_path, directory.engine_model, dtype=config.model.dtype)
    return directory.engine_model
