"""What people ask of the engines of a run that is under way, through files of its directory.

They are files `engine_requests/ID.json`, as `file_requests` has them.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError

from polyturn.rollout import file_requests
from polyturn.rollout.file_requests import Refused

__all__ = ["AddEngine", "EngineRequest", "Refused", "RemoveEngine", "answer_requests", "ask"]

FOLDER = "engine_requests"


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


def answer_requests(directory: Path, *, add: Callable[[], int], remove: Callable[[int], None]) -> None:
    """Do what is asked of the run in `directory`.

    Args:
        add: Begins to start an engine, and gives its number; as `remove`, it raises `ValueError` where that cannot be.
    """

    def answer(request: bytes, name: str) -> dict[str, Any]:
        try:
            asked = _READER.validate_json(request)
        except ValidationError as error:
            raise ValueError(f"{name} is no request: {error.errors()[0]['msg']}") from error
        if isinstance(asked, AddEngine):
            return {"done": f"engine {add()} is being started"}
        remove(asked.number)
        return {"done": f"engine {asked.number} leaves when its requests have ended"}

    file_requests.answer_requests(directory / FOLDER, answer)


def ask(directory: Path, request: EngineRequest, *, timeout_s: float) -> str:
    """What the run in `directory` answers to a request.

    Raises:
        Refused: it does not do it.
        TimeoutError: nobody answered; the request is taken back.
    """
    body = request.model_dump_json().encode()
    who = f"the run in {directory}"
    return str(file_requests.ask(directory / FOLDER, body, timeout_s=timeout_s, who=who)["done"])
