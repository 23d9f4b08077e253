"""The models beside the policy that a run serves itself: each a group of engines with frozen weights."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from polyturn.configs.models import resolve_model_path
from polyturn.configs.schema.engines import ServedModel
from polyturn.configs.schema.run import EVALUATION_ENGINES, RunConfig
from polyturn.configs.schema.tasks import JudgeReward
from polyturn.rollout.engines.launch import BroughtUp, Engines, Launcher, LocalLauncher
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
    for section, models in (("teachers", [*config.teachers]), ("judges", config.judges)):
        names = [other.name for other in models]
        if model.name in names:
            return f"{section}.{names.index(model.name)}"
    if model.name == EVALUATION_ENGINES:
        return "evaluation"
    raise AssertionError(f"{model.name} is of no section")


class ServedGroups(BroughtUp):
    """All of them; a context manager that leaves none behind.

    The first engine that does not come up ends the start. None gets new weights.
    """

    def __init__(
        self,
        config: RunConfig,
        *,
        log_directory: Path,
        make_launcher: Callable[[EngineSpec, str], Launcher] | None = None,
        judges_alone: bool = False,
    ) -> None:
        """Choose places; nothing starts. Raises `ValueError` where there are none, or a model is not there.

        Args:
            make_launcher: of a spec and the model's name; None: on this host, on the GPUs behind those of the
                policy's engines.
            judges_alone: Whether nothing is trained, so that no teacher is needed.
        """
        models = config.judges if judges_alone else config.served_models
        self._models = models
        self._groups: dict[str, Engines] = {}
        next_gpu = config.engines.num_gpus
        for model in models:
            if not model.is_managed:
                continue
            spec = group_spec(config, model, log_directory=log_directory)
            launcher = (
                make_launcher(spec, model.name) if make_launcher else LocalLauncher(spec, first_gpu=next_gpu)
            )
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


def with_urls(config: RunConfig, urls: Mapping[str, tuple[str, ...]]) -> RunConfig:
    """The config in which every teacher, and every reward that a judge gives, says where it is asked: what plays
    episodes reads it there."""

    teachers = [
        teacher.model_copy(update={"urls": list(urls.get(teacher.name, teacher.urls))})
        for teacher in config.teachers
    ]
    at_judges = {
        judge.name: [f"{url.rstrip('/').removesuffix('/v1')}/v1" for url in urls.get(judge.name, ())]
        for judge in config.judges
    }
    served: RunConfig = _at_judges(config, at_judges)
    return served.model_copy(update={"teachers": teachers})


@contextmanager
def judged(config: RunConfig, *, log_directory: Path) -> Iterator[RunConfig]:
    """The config with the judges that it names served on this host meanwhile; nothing is trained."""
    with ServedGroups(config, log_directory=log_directory, judges_alone=True) as groups:
        yield with_urls(config, groups.urls)


def judge_rewards(value: Any) -> Iterator[JudgeReward]:
    """All judges' rewards anywhere in a part of a config."""
    if isinstance(value, JudgeReward):
        yield value
    elif isinstance(value, BaseModel):
        yield from judge_rewards(list(dict(value).values()))
    elif isinstance(value, Mapping):
        yield from judge_rewards(list(value.values()))
    elif isinstance(value, list | tuple):
        for item in value:
            yield from judge_rewards(item)


def _at_judges(value: Any, urls: Mapping[str, list[str]]) -> Any:
    """The part of a config with the addresses in every judge's reward that names one of them."""
    if isinstance(value, JudgeReward):
        found = urls.get(value.judge or "")
        return value.model_copy(update={"judge": None, "urls": found}) if found else value
    if not any(True for _ in judge_rewards(value)):
        return value
    if isinstance(value, BaseModel):
        return value.model_copy(update={name: _at_judges(part, urls) for name, part in dict(value).items()})
    if isinstance(value, Mapping):
        return {name: _at_judges(part, urls) for name, part in value.items()}
    return [_at_judges(part, urls) for part in value]
