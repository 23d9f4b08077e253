"""Sources that are no plain file: functions, slices and mixtures of others; and the source that a config describes."""

from __future__ import annotations

import bisect
import functools
import itertools
import math
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from polyturn.configs.schema.tasks import TaskSourceConfig
from polyturn.envs.messages import Task, TaskSource, no_such_task, where_of
from polyturn.envs.plugins import Signature, check_signature, load_object
from polyturn.envs.rewards.factory import make_reward
from polyturn.envs.tasks.files import FileTasks, JsonlTasks, ParquetTasks
from polyturn.envs.tasks.rows import RowKeys, RowReader, read_environment

ENDLESS = 1 << 62
"""The length of a source without an end: no run comes to it."""
SIGNATURE = Signature(
    what="generator of tasks",
    arguments=("index", "seed"),
    text="def generate(index: int, seed: int) -> Task | Mapping[str, Any]",
)

Generator = Callable[[int, int], Task | Mapping[str, Any]]
"""Task `index` of the sequence that `seed` names: the same arguments give the same task."""


class GeneratedTasks:
    """Tasks of a procedure, made when they are asked for. With no size there is no end to them.

    A mapping that the function returns is read as a row of a task file.
    """

    def __init__(
        self,
        function: Generator,
        *,
        size: int | None = None,
        seed: int = 0,
        name: str | None = None,
        reader: RowReader | None = None,
    ) -> None:
        """
        Raises:
            ValueError: the function has another signature, or does not give the same task twice, or `size` is below 1.
        """
        self.name = str(name or getattr(function, "__name__", type(function).__name__))
        if size is not None and size < 1:
            raise ValueError(f"{self.name}: size must be at least 1, or None for no end, not {size}")
        check_signature(SIGNATURE, function, self.name)
        self._function = function
        self._size = size
        self._seed = seed
        self._reader = reader or RowReader()
        if self[0] != self[0]:
            raise ValueError(
                f"{self.name}: task 0 was another one when made again; a task must follow from index and seed alone"
            )

    @property
    def is_endless(self) -> bool:
        return self._size is None

    def __len__(self) -> int:
        return ENDLESS if self._size is None else self._size

    def __getitem__(self, index: int, /) -> Task:
        if not 0 <= index < len(self):
            raise IndexError(f"{self.name}: there is no task {index}, there are {len(self)}")
        made: Any = self._function(index, self._seed)
        if isinstance(made, Task):
            return made
        if not isinstance(made, Mapping):
            raise ValueError(f"{self.name}: it must return a Task or a mapping, not {type(made).__name__}")
        return self._reader.read(
            dict(made), f"{self.name}: task {index}", default_id=f"{self.name}-{self._seed}-{index}"
        )

    def find(self, task_id: str) -> Task:
        """The task with that id, if its id ends in its index. Raises `ValueError` if there is none."""
        number = task_id.rpartition("-")[2]
        if number.isdecimal() and int(number) < len(self) and self[int(number)].task_id == task_id:
            return self[int(number)]
        raise no_such_task(task_id)


class MixtureTasks:
    """Sources one after the other by position; drawn from in proportion to their weights (`draw_order`).

    A source is not used up: those that are drawn from more often than their size begin another epoch of their own.
    """

    def __init__(
        self,
        sources: Sequence[TaskSource],
        *,
        weights: Sequence[float] | None = None,
        names: Sequence[str] | None = None,
    ) -> None:
        """
        Args:
            sources: At least one, none empty.
            weights: One for each, positive; None: each source's size, as if they were one file.
            names: For messages.

        Raises:
            ValueError: any of this does not hold.
        """
        self.sources = tuple(sources)
        self.names = tuple(names or (f"source {index}" for index in range(len(self.sources))))
        if not self.sources:
            raise ValueError("a mixture needs at least one source")
        for name, source in zip(self.names, self.sources, strict=True):
            if len(source) == 0:
                raise ValueError(f"{name}: the source is empty")
        self.weights = tuple(map(float, weights if weights is not None else map(len, self.sources)))
        if len(self.weights) != len(self.sources):
            raise ValueError(
                f"{len(self.weights)} weights for {len(self.sources)} sources: there must be one each"
            )
        for name, weight in zip(self.names, self.weights, strict=True):
            if not (math.isfinite(weight) and weight > 0):
                raise ValueError(f"{name}: a weight must be a positive number, not {weight:g}")
        self._starts = [0, *itertools.accumulate(len(source) for source in self.sources)]

    def __len__(self) -> int:
        return self._starts[-1]

    def __getitem__(self, index: int, /) -> Task:
        if not 0 <= index < len(self):
            raise IndexError(f"there is no task {index}, the mixture has {len(self)}")
        source = bisect.bisect_right(self._starts, index) - 1
        return self.sources[source][index - self._starts[source]]

    def start(self, source: int) -> int:
        """The position of a source's first task."""
        return self._starts[source]

    def find(self, task_id: str) -> Task:
        """The task with that id, of the first source that has it. Raises `ValueError` if none has."""
        for source in self.sources:
            find = getattr(source, "find", None)
            try:
                if find is not None:
                    return find(task_id)
            except ValueError:
                continue
        raise no_such_task(task_id)


_SLICE = re.compile(r"(?P<path>.*)@\[(?P<inside>.*)\]", re.DOTALL)
_BOUNDS = re.compile(r"\s*(?P<first>-?[0-9][0-9_]*)?\s*:\s*(?P<last>-?[0-9][0-9_]*)?\s*")


def split_slice(text: str) -> tuple[str, slice | None]:
    """The path and the slice of `path@[a:b]`. As in Python, ends may be negative or left out.

    Raises:
        ValueError: what stands after `@` is no slice.
    """
    found = _SLICE.fullmatch(text)
    if found is None:
        if "@[" in text or text.endswith("@"):
            raise ValueError(f"{text!r}: a slice is written path@[first:end], as in tasks.jsonl@[0:100]")
        return text, None
    bounds = _BOUNDS.fullmatch(found["inside"])
    if bounds is None:
        raise ValueError(
            f"{text!r}: '[{found['inside']}]' is no slice: two whole numbers around a colon, as in [0:100], [:-50]"
        )
    first, last = (None if end is None else int(end) for end in (bounds["first"], bounds["last"]))
    return found["path"], slice(first, last)


class SlicedTasks:
    """A run of tasks of another source.

    Raises:
        ValueError: it would be empty.
    """

    def __init__(self, source: TaskSource, part: slice, *, name: str = "the source") -> None:
        self.source = source
        self._range = range(len(source))[part]
        if not self._range:
            shown = f"[{_end(part.start)}:{_end(part.stop)}]"
            raise ValueError(f"{name}: the slice {shown} holds none of its {len(source):,} tasks")

    def __len__(self) -> int:
        return len(self._range)

    def __getitem__(self, index: int, /) -> Task:
        if not 0 <= index < len(self._range):
            raise IndexError(f"there is no task {index}, the slice has {len(self._range)}")
        return self.source[self._range[index]]

    def where(self, index: int) -> str:
        """Where a task stands, for messages."""
        return where_of(self.source, self._range[index])

    def find(self, task_id: str) -> Task:
        """The task with that id. Raises `ValueError` if there is none in the slice."""
        for index in range(len(self)):
            if self[index].task_id == task_id:
                return self[index]
        raise no_such_task(task_id)


def _end(bound: int | None) -> str:
    return "" if bound is None else str(bound)


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
