"""What decides the result of an evaluation beside what is written in its config: the contents of files, and the tasks.

A resume compares it with what is there: episodes of two questions, or of two models, are no evaluation of one.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Mapping
from itertools import islice
from pathlib import Path
from typing import Any

from polyturn.configs.schema.run import RunConfig
from polyturn.envs.messages import TaskSource
from polyturn.envs.tasks.order import task_digest

MAX_READ = 64 * 1024 * 1024
"""A file beyond is told by its size, its beginning and its end."""
EDGE = 1024 * 1024
MAX_FILES = 10_000
"""Of a directory."""
DECIDING = ("seed", "environment", "agent", "reward", "model", "judges", "evaluation")
"""The sections of a run's config that an episode of an evaluation depends on; where engines run is another matter."""


def deciding(config: RunConfig) -> dict[str, Any]:
    """What of a config decides the result, as JSON has it."""
    sections = config.model_dump(mode="json", include=set(DECIDING))
    return {**sections, "seeded": config.rollout.sampling.seeded}


def tasks_digest(tasks: TaskSource, num_tasks: int) -> str:
    """64 bits of SHA-256, in hexadecimal, over the first tasks of a source, in order."""
    found = hashlib.sha256()
    for index in range(num_tasks):
        found.update(task_digest(tasks[index]).encode())
    return found.hexdigest()[:16]


def named_files(*values: Any) -> dict[str, str]:
    """The digests of all files and directories that are named in parts of a config, by their paths.

    Named are a path, `path@[a:b]` as of a part of a task file, and `path/to/file.py:name` as of a plug-in, or with a
    kind before it as of a policy.
    """
    found = {}
    for text in sorted(set(_texts(values))):
        plugin = text.rpartition(":")[0]
        for written in (text, text.partition("@[")[0], plugin, plugin.partition(":")[2]):
            if path := _existing(written):
                found[written] = digest_of(path)
                break
    return found


def model_files(directory: Path) -> dict[str, str]:
    """What tells the model of a directory from another one: a digest of each of its files."""
    return {path.name: digest_of(path) for path in sorted(directory.iterdir()) if path.is_file()}


def digest_of(path: Path) -> str:
    """SHA-256 over a file, or over the names and digests of the files of a directory; a large file's ends alone."""
    found = hashlib.sha256()
    if path.is_dir():
        for inner in islice(sorted(path.rglob("*")), MAX_FILES):
            if inner.is_file():
                found.update(
                    f"{inner.relative_to(path)} {digest_of(inner)}\n".encode(errors="surrogateescape")
                )
        return found.hexdigest()
    size = path.stat().st_size
    with path.open("rb") as file:
        if size <= MAX_READ:
            return hashlib.file_digest(file, "sha256").hexdigest()
        found.update(str(size).encode())
        found.update(file.read(EDGE))
        file.seek(-EDGE, 2)
        found.update(file.read(EDGE))
    return found.hexdigest()


def changed_files(then: Mapping[str, str], now: Mapping[str, str]) -> Iterator[str]:
    """A sentence for each file that is not what it was."""
    for path in then:
        if path not in now:
            yield f"{path} is not there any more"
        elif then[path] != now[path]:
            yield f"{path} was changed"


def changed_values(then: Any, now: Any, key: str = "") -> Iterator[str]:
    """A sentence for each value of a config that is not what it was."""
    if isinstance(then, Mapping) and isinstance(now, Mapping):
        for name in [*then, *(name for name in now if name not in then)]:
            yield from changed_values(then.get(name), now.get(name), f"{key}.{name}" if key else name)
    elif then != now:
        yield f"{key} was {_shown(then)} and is {_shown(now)}"


def _shown(value: Any) -> str:
    return "null" if value is None else f"{value!r:.200}"


def _texts(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        yield from _texts(list(value.values()))
    elif isinstance(value, Iterable):
        for item in value:
            yield from _texts(item)


def _existing(written: str) -> Path | None:
    """The file or directory of that name. A bare word, as the name of an option, is no path."""
    if not written or len(written) > 1_000 or "\0" in written or "\n" in written:
        return None
    path = Path(written).expanduser()
    try:
        return path if path.exists() and ("/" in written or path.is_file()) else None
    except OSError:
        return None
