"""The formats of `polyturn eval export`, by their names."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal, get_args

from polyturn.configs.errors import ConfigError
from polyturn.rollout.evaluation.export.atif import file_name, write_atif
from polyturn.rollout.evaluation.export.huggingface import write_parquet
from polyturn.rollout.evaluation.export.inspect_log import write_inspect
from polyturn.rollout.evaluation.export.openai_rows import write_openai
from polyturn.rollout.evaluation.export.stored import StoredEpisode, StoredPart, Tell, open_stored
from polyturn.rollout.whole_file import check_writable, removed_on_failure

Format = Literal["inspect", "openai", "hf", "atif"]
FORMATS: tuple[Format, ...] = get_args(Format)
ENDINGS: dict[Format, tuple[str, ...]] = {
    "inspect": (".eval", ".json", ""),
    "openai": (".jsonl",),
    "hf": (".parquet",),
    "atif": (".jsonl", ""),
}
"""Of what can be written; without one it is a directory."""
_OF_ALL: dict[Format, Callable[[StoredPart, Path], int]] = {
    "openai": write_openai,
    "hf": write_parquet,
    "atif": write_atif,
}
"""Formats that have the episodes of all parts in one place."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Exported:
    """What was written."""

    paths: tuple[Path, ...]
    num_episodes: int
    num_blanked: int
    """Of them, those in which a credential was blanked."""


def export(source: Path, kind: str, output: Path, *, tell: Tell) -> Exported:
    """Write the episodes that `source` holds, as `open_stored` takes it, in one of the formats.

    One episode after the other is read and written: memory does not grow with their number. What cannot be finished
    leaves nothing.

    Raises:
        ConfigError: there is no such format, `source` is nothing that holds episodes, or `output` is there already or
            does not end as the format does.
    """
    found = next((known for known in FORMATS if known == kind), None)
    if found is None:
        raise ConfigError(f"--format: '{kind}' is none; the formats are {', '.join(FORMATS)}")
    _check_output(found, output)
    num_blanked = 0

    def counted(part: StoredPart) -> StoredPart:
        def stream() -> Iterator[StoredEpisode]:
            nonlocal num_blanked
            for stored in part.stream():
                num_blanked += stored.held_credential
                yield stored

        return replace(part, stream=stream)

    parts = [counted(part) for part in open_stored(source, tell)]
    if found == "inspect":
        paths, number = _write_logs(parts, output)
    else:
        paths, number = (output,), _OF_ALL[found](_joined(parts), output)
    return Exported(paths=paths, num_episodes=number, num_blanked=num_blanked)


def _check_output(kind: Format, output: Path) -> None:
    if output.suffix not in ENDINGS[kind]:
        wanted = " or ".join(ending or "nothing (a directory)" for ending in ENDINGS[kind])
        raise ConfigError(f"--output: {output} must end with {wanted} in the format {kind}")
    check_new(output)


def check_new(output: Path) -> None:
    """Raise ConfigError where a file is there already, or cannot be written."""
    if output.exists():
        raise ConfigError(f"--output: {output} is there already; name another place, or delete it")
    try:
        check_writable(output.parent)
    except ValueError as error:
        raise ConfigError(f"--output: {error}") from error
    output.parent.mkdir(parents=True, exist_ok=True)


def _joined(parts: Sequence[StoredPart]) -> StoredPart:
    """All parts as one; each episode says of which entry it is."""
    return replace(parts[0], stream=lambda: itertools.chain.from_iterable(part.stream() for part in parts))


def _write_logs(parts: Sequence[StoredPart], output: Path) -> tuple[tuple[Path, ...], int]:
    """A log for each part, since inspect has one for each task."""
    if output.suffix:
        if len(parts) > 1:
            raise ConfigError(
                f"--output: {output} is one log, and the suite has {len(parts)} entries: name a directory, which gets "
                "a log for each"
            )
        return (output,), write_inspect(parts[0], output)
    names = [f"{file_name(part.name)}.eval" for part in parts]
    with removed_on_failure(output.with_name(f"{output.name}.part")) as folder:
        number = sum(write_inspect(part, folder / name) for part, name in zip(parts, names, strict=True))
        folder.rename(output)
    return tuple(output / name for name in names), number
