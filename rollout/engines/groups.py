"""The models beside the policy that a run serves itself: each a group of engines with frozen weights."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Self

from polyturn.configs.models import resolve_model_path
from polyturn.configs.schema.engines import ServedModel
from polyturn.configs.schema.run import RunConfig
from polyturn.rollout.engines.launch import Engines, Launcher, LocalLauncher
from polyturn.rollout.engines.server import EngineSpec


def group_spec(config: RunConfig, model: ServedModel, *, log_directory: Path) -> EngineSpec:
    """What the engines of a served model have in common.

    Raises:
        ValueError: there is no such model.
    """
    assert model.path is not None, "a model of the run's own engines has a directory"
    return EngineSpec(
        section=f"{section_of(config, model)}.engines",
        config=model.engines,
        model_path=resolve_model_path(model.path, key=f"{section_of(config, model)}.path"),
        dtype=model.dtype,
        seeded=False,
        log_directory=log_directory / model.name,
        sglang=model.sglang,
        seed=config.seed,
    )


def section_of(config: RunConfig, model: ServedModel) -> str:
    """Where the config names it."""
    return f"teachers.{[teacher.name for teacher in config.teachers].index(model.name)}"


class ServedGroups:
    """All of them; a context manager that leaves none behind.

    The first engine that does not come up ends the start. None gets new weights.
    """

    def __init__(
        self,
        config: RunConfig,
        *,
        log_directory: Path,
        make_launcher: Callable[[EngineSpec], Launcher] | None = None,
    ) -> None:
        """Choose places; nothing starts. Raises `ValueError` where there are none, or a model is not there.

        Args:
            make_launcher: None: on this host, on the GPUs behind those of the policy's engines.
        """
        models = config.served_models
        self._models = models
        self._groups: dict[str, Engines] = {}
        next_gpu = config.engines.num_gpus
        for model in models:
            if not model.is_managed:
                continue
            spec = group_spec(config, model, log_directory=log_directory)
            launcher = make_launcher(spec) if make_launcher else LocalLauncher(spec, first_gpu=next_gpu)
            next_gpu += model.engines.num_gpus
            self._groups[model.name] = Engines(spec, launcher)

    def start(self) -> None:
        """Begin to start the engines."""
        for engines in self._groups.values():
            engines.start()

    def wait_ready(self) -> None:
        """Wait for all engines. Raises as `Engine.ready` does."""
        for engines in self._groups.values():
            engines.wait_ready()

    @property
    def urls(self) -> Mapping[str, tuple[str, ...]]:
        """Of every served model, by name, where it is asked, also of those that others serve."""
        return {
            model.name: tuple(self._groups[model.name].engine_urls if model.is_managed else model.urls)
            for model in self._models
        }

    def ended(self) -> list[str]:
        """Sentences of what has ended by itself, with the names of the models."""
        return [f"{name}: {how}" for name, engines in self._groups.items() for how in engines.ended()]

    def stop(self) -> None:
        """End every process; returns when they are gone. A second call does nothing."""
        with ExitStack() as stack:
            for engines in self._groups.values():
                stack.callback(engines.stop)

    def __enter__(self) -> Self:
        try:
            self.start()
            self.wait_ready()
        except BaseException:
            self.stop()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, fault: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()


def with_urls(config: RunConfig, urls: Mapping[str, tuple[str, ...]]) -> RunConfig:
    """The config in which every served model says where it is asked: what plays episodes reads it there."""

    teachers = [
        teacher.model_copy(update={"urls": list(urls.get(teacher.name, teacher.urls))})
        for teacher in config.teachers
    ]
    return config.model_copy(update={"teachers": teachers})
