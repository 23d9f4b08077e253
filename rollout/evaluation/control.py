"""What is asked of an evaluation that is being played, through files of its directory, and what was done of it.

`control/ID.json` is a request, as `file_requests` has it; `changes.jsonl` has a line for each that was not refused.
"""

from __future__ import annotations

import fcntl
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any, Literal

import orjson
from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError

from polyturn.configs.errors import did_you_mean
from polyturn.configs.schema.suite import Budget
from polyturn.rollout import file_requests
from polyturn.rollout.evaluation.play import Settings, Sitting
from polyturn.rollout.file_requests import Refused

FOLDER = "control"
CHANGES = "changes.jsonl"
LOCK = "lock"
SETTINGS: dict[str, TypeAdapter[Any]] = {
    "max_concurrent_episodes": TypeAdapter(Annotated[int, Field(ge=1)]),
    "max_retries": TypeAdapter(Annotated[int, Field(ge=0)]),
    "max_failure_share": TypeAdapter(Annotated[float, Field(gt=0, le=1)]),
}
"""What can be set of a sitting; beside them, the budget of each entry."""


class Request(BaseModel):
    """What is asked for."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    kind: Literal["pause", "resume", "requeue", "set", "status"]
    key: str = ""
    """Of `set`: a setting, a field of the budget of every entry, or `ENTRY.FIELD`."""
    value: Any = None


class Status(BaseModel):
    """How far a sitting has got."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    state: Literal["playing", "paused"]
    num_left: int
    num_playing: int
    settings: dict[str, Any]
    spent: dict[str, dict[str, float]]
    """By entry, its tokens and cost."""


class NotPlayed(ValueError):
    """Nobody plays the evaluation now."""


@contextmanager
def sole_player(directory: Path) -> Iterator[None]:
    """While this process, and no other, plays the evaluation of a directory; ends with the process, however that ends.

    Raises `ValueError` where another one plays it.
    """
    with (directory / LOCK).open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise ValueError(
                f"another process plays {directory}; `polyturn eval ctl {directory} status` asks it how far it is"
            ) from error
        yield


def is_played(directory: Path) -> bool:
    """Whether a process plays the evaluation of a directory now."""
    try:
        with (directory / LOCK).open("r") as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except FileNotFoundError:
        return False
    except OSError:
        return True
    return False


def ask(directory: Path, request: Request, *, timeout_s: float) -> dict[str, Any]:
    """What the evaluation in a directory answers.

    Raises:
        NotPlayed: nobody plays it.
        Refused: it does not do it.
        TimeoutError: it did not answer; the request is taken back.
    """
    if not is_played(directory):
        raise NotPlayed(
            f"nobody plays {directory} now; `polyturn eval resume {directory}` goes on with what it lacks"
        )
    body = request.model_dump_json().encode()
    return file_requests.ask(
        directory / FOLDER, body, timeout_s=timeout_s, who=f"the evaluation in {directory}"
    )


def answer_requests(directory: Path, sitting: Sitting) -> None:
    """Do what is asked of the evaluation in a directory."""

    def answer(body: bytes, name: str) -> dict[str, Any]:
        try:
            request = Request.model_validate_json(body)
        except ValidationError as error:
            raise Refused(f"{name} is no request: {error.errors()[0]['msg']}") from error
        if request.kind == "status":
            return status_of(sitting).model_dump()
        said = {"done": _do(sitting, request)}
        line = {"time": datetime.now(UTC).isoformat(timespec="seconds"), **request.model_dump(), **said}
        with (directory / CHANGES).open("ab") as file:
            file.write(orjson.dumps(line, option=orjson.OPT_APPEND_NEWLINE))
        return said

    file_requests.answer_requests(directory / FOLDER, answer)


def status_of(sitting: Sitting) -> Status:
    """How far a sitting has got."""
    return Status(
        state="paused" if sitting.is_paused else "playing",
        num_left=sitting.num_left,
        num_playing=sitting.num_playing,
        settings={name: getattr(sitting.settings, name) for name in SETTINGS},
        spent={
            name: {"tokens": float(entry.num_tokens), "cost": entry.cost}
            for name, entry in sitting.entries.items()
        },
    )


def _do(sitting: Sitting, request: Request) -> str:
    match request.kind:
        case "pause":
            sitting.pause()
            return f"no further episode starts; {sitting.num_playing} are under way"
        case "resume":
            sitting.resume()
            return f"goes on with {sitting.num_left} episodes"
        case "requeue":
            return f"{sitting.requeue()} errored episodes are played again"
        case _:
            said = _set(sitting, request.key, request.value)
            sitting.retuned()
            return said


def _set(sitting: Sitting, key: str, value: Any) -> str:
    """Change a setting. Raises `Refused`."""
    if key in SETTINGS:
        before = getattr(sitting.settings, key)
        setattr(sitting.settings, key, _read(SETTINGS[key], key, value))
        return f"{key} was {before:g} and is {getattr(sitting.settings, key):g}"
    name, _, field = key.rpartition(".")
    if field not in Budget.model_fields or (name and name not in sitting.entries):
        known = [*SETTINGS, *Budget.model_fields]
        known += [f"{entry}.{each}" for entry in sitting.entries for each in Budget.model_fields]
        raise Refused(
            f"{key!r} cannot be set of a running evaluation{did_you_mean(key, known)}; there are "
            f"{', '.join([*SETTINGS, *Budget.model_fields])}, and the last ones with ENTRY. before them"
        )
    for entry in [sitting.entries[name]] if name else sitting.entries.values():
        try:
            entry.budget = Budget.model_validate({**entry.budget.model_dump(), field: value})
        except ValidationError as error:
            raise Refused(f"{key}: {error.errors()[0]['msg']}") from error
    return f"{key} is {value}"


def _read(reader: TypeAdapter[Any], key: str, value: Any) -> Any:
    try:
        return reader.validate_python(value, strict=isinstance(value, str | bool))
    except ValidationError as error:
        raise Refused(f"{key}: {error.errors()[0]['msg']}") from error


__all__ = [
    "NotPlayed",
    "Refused",
    "Request",
    "Settings",
    "Status",
    "answer_requests",
    "ask",
    "is_played",
    "sole_player",
    "status_of",
]
