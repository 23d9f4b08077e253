"""From what a config says of tasks to a source of them."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from pathlib import Path

from polyturn.configs.schema.tasks import TaskSourceConfig
from polyturn.envs.tasks.files import FileTasks
from polyturn.envs.tasks.generated import GeneratedTasks
from polyturn.envs.tasks.jsonl import JsonlTasks
from polyturn.envs.tasks.mixture import MixtureTasks
from polyturn.envs.tasks.parquet import ParquetTasks
from polyturn.envs.tasks.rows import RowKeys, RowReader, read_environment
from polyturn.envs.tasks.slices import SlicedTasks, split_slice
from polyturn.envs.tasks.types import TaskSource

PARQUET_SUFFIXES = (".parquet", ".pq")


def open_tasks(sources: Sequence[TaskSourceConfig]) -> TaskSource:
    """The source that a config describes; several are a mixture. A file that did not change is opened once.

    Raises:
        ValueError: a source that is missing or empty, a row that is wrong, weights for some sources only.
    """
    if not sources:
        raise ValueError("the list of task sources is empty")
    opened = [open_source(source) for source in sources]
    if len(opened) == 1:
        return opened[0]
    weights = [source.weight for source in sources]
    given = [weight for weight in weights if weight is not None]
    names = [source_name(source) for source in sources]
    if given and len(given) < len(weights):
        without = names[weights.index(None)]
        raise ValueError(f"{without}: it has no weight but another source has; give all sources one, or none")
    endless = [n for n, s in zip(names, opened, strict=True) if getattr(s, "is_endless", False)]
    if endless and not given:
        raise ValueError(f"{endless[0]}: a generator without a size needs a weight beside other sources")
    return MixtureTasks(opened, weights=given or None, names=names)


def open_source(source: TaskSourceConfig) -> TaskSource:
    """One source. Raises `ValueError`."""
    if (source.path is None) == (source.generator is None):
        raise ValueError("a source of tasks has either a 'path' or a 'generator'")
    name = source_name(source)
    if source.path is not None and (source.size is not None or source.seed):
        raise ValueError(f"{name}: size and seed are options of a generator; a part of a file is path@[a:b]")
    if source.path is None:
        return _open_generator(source, name)
    path, part = split_slice(source.path)
    file = Path(path).expanduser()
    if not file.is_file():
        raise ValueError(f"{path}: no such task file")
    stat = file.stat()
    opened = _open_file(source.model_dump_json(exclude={"weight"}), path, (stat.st_mtime_ns, stat.st_size))
    return opened if part is None else SlicedTasks(opened, part, name=path)


def source_name(source: TaskSourceConfig) -> str:
    """What a source is called in messages."""
    return source.path or source.generator or "a source"


# Checking every row of a large file takes seconds, and a run opens it for several purposes.
@functools.lru_cache(maxsize=16)
def _open_file(described: str, path: str, stamp: tuple[int, int]) -> FileTasks:
    del stamp
    source = TaskSourceConfig.model_validate_json(described)
    file = Path(path).expanduser()
    kind = ParquetTasks if file.suffix in PARQUET_SUFFIXES else JsonlTasks
    return kind(file, reader=_reader(source), check_rows=source.check_rows)


def _open_generator(source: TaskSourceConfig, name: str) -> GeneratedTasks:
    from polyturn.envs.plugins import load_object

    function = load_object(name)
    return GeneratedTasks(
        function, size=source.size, seed=source.seed, name=name.rpartition(":")[2], reader=_reader(source)
    )


def _reader(source: TaskSourceConfig) -> RowReader:
    keys = RowKeys(
        prompt=source.prompt_key,
        label=source.label_key,
        needs_label=source.needs_label,
        id=source.id_key,
        metadata=source.metadata_key,
        environment=source.environment_key,
        reward=source.reward_key,
        others=source.other_keys,
    )
    rewards = {}
    reward = None
    if source.reward is not None or source.rewards:
        from polyturn.envs.rewards.factory import make_reward

        for name, choice in source.rewards.items():
            try:
                rewards[name] = make_reward(choice)
            except ValueError as error:
                raise ValueError(f"{source_name(source)}: rewards.{name}: {error}") from error
        reward = None if source.reward is None else make_reward(source.reward)
    environments = {}
    for name, environment in source.environments.items():
        try:
            environments[name] = read_environment(environment.model_dump())
        except ValueError as error:
            raise ValueError(f"{source_name(source)}: environments.{name}: {error}") from error
    return RowReader(
        keys,
        environment=None if source.environment is None else read_environment(source.environment.model_dump()),
        reward=reward,
        environments=environments,
        rewards=rewards,
        trusted=source.trusted_rows,
    )
