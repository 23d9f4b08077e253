"""What people ask of the engines of a run that is under way, through files of its directory.

A request is a file `engine_requests/ID.json`, which appears whole; the run answers with `ID.answer.json` beside it. So
it works wherever the directory is seen, and nothing listens.
"""

from __future__ import annotations

import contextlib
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated, Literal

import orjson
from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError

from polyturn.rollout.whole_file import whole_file

FOLDER = "engine_requests"
ANSWER = ".answer.json"
POLL_S = 0.1


class AddEngine(BaseModel):
    """Start one engine more, or ask one that is there already."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    kind: Literal["add"] = "add"


class RemoveEngine(BaseModel):
    """End an engine, when what it has under way has ended."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    kind: Literal["remove"] = "remove"
    number: Annotated[int, Field(ge=0)]


EngineRequest = AddEngine | RemoveEngine
_READER: TypeAdapter[EngineRequest] = TypeAdapter(
    Annotated[AddEngine | RemoveEngine, Field(discriminator="kind")]
)


class Refused(ValueError):
    """The run did not do what it was asked for: the message says why."""


def answer_requests(directory: Path, *, add: Callable[[], int], remove: Callable[[int], None]) -> None:
    """Do what is asked of the run in `directory`.

    Args:
        add: Begins to start an engine, and gives its number; as `remove`, it raises `ValueError` where that cannot be.
    """
    for path in _waiting(directory / FOLDER):
        try:
            match _READER.validate_json(path.read_bytes()):
                case AddEngine():
                    answer = {"done": f"engine {add()} is being started"}
                case RemoveEngine(number=number):
                    remove(number)
                    answer = {"done": f"engine {number} leaves when its requests have ended"}
        except ValidationError as error:
            answer = {"refused": f"{path.name} is no request: {error.errors()[0]['msg']}"}
        except ValueError as error:
            answer = {"refused": str(error)}
        with whole_file(path.with_name(f"{path.stem}{ANSWER}")) as file:
            file.write(orjson.dumps(answer))
        path.unlink(missing_ok=True)


def ask(directory: Path, request: EngineRequest, *, timeout_s: float) -> str:
    """What the run in `directory` answers to a request.

    Raises:
        Refused: it does not do it.
        TimeoutError: nobody answered; the request is taken back.
    """
    folder = directory / FOLDER
    folder.mkdir(exist_ok=True)
    name = uuid.uuid4().hex
    path, answered = folder / f"{name}.json", folder / f"{name}{ANSWER}"
    with whole_file(path) as file:
        file.write(request.model_dump_json().encode())
    deadline = time.monotonic() + timeout_s
    try:
        while not answered.exists():
            if time.monotonic() > deadline:
                raise TimeoutError(f"the run in {directory} did not answer within {timeout_s:g} s")
            time.sleep(POLL_S)
        answer = orjson.loads(answered.read_bytes())
    finally:
        for left in (path, answered):
            left.unlink(missing_ok=True)
    if "refused" in answer:
        raise Refused(answer["refused"])
    return str(answer["done"])


def _waiting(folder: Path) -> Iterator[Path]:
    """Requests that have not been answered, the oldest first."""
    with contextlib.suppress(FileNotFoundError):
        found = [
            path for path in folder.iterdir() if path.suffix == ".json" and not path.name.endswith(ANSWER)
        ]
        yield from sorted(found, key=lambda path: path.stat().st_mtime)
