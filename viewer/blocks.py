"""The blocks that a renderer may give, as `Block` of api.ts has them; what an own one gives is held against them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError

from polyturn.viewer.plain_json import Json
from polyturn.viewer.renderers import Renderer


class _Block(BaseModel):
    """What all of them have."""

    model_config = ConfigDict(extra="forbid", strict=True)
    title: str | None


class _Text(_Block):
    kind: Literal["text"]
    text: str


class _Mark(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)
    row: int
    column: int
    why: str


class _Board(_Block):
    kind: Literal["board"]
    cells: list[list[str]]
    marks: list[_Mark]


class _Passage(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)
    title: str
    text: str
    rank: int | None
    score: Annotated[float, Field(allow_inf_nan=False)] | None


class _Passages(_Block):
    kind: Literal["passages"]
    passages: list[_Passage]


class _File(_Block):
    kind: Literal["file"]
    path: str | None
    language: str | None
    text: str


class _Diff(_Block):
    kind: Literal["diff"]
    path: str | None
    text: str


class _Table(_Block):
    kind: Literal["table"]
    columns: list[str]
    rows: list[list[str]]


_BLOCKS: TypeAdapter[list[Any]] = TypeAdapter(
    list[Annotated[_Text | _Board | _Passages | _File | _Diff | _Table, Field(discriminator="kind")]]
)


def checked(show: Renderer) -> Renderer:
    """A renderer that gives a sentence of what is wrong in place of blocks that the page cannot show."""

    def show_checked(message: Mapping[str, Any], /) -> list[Json]:
        try:
            blocks: list[Json] = _BLOCKS.dump_python(_BLOCKS.validate_python(show(message)))
        except ValidationError as error:
            first = error.errors(include_url=False)[0]
            where = ".".join(str(part) for part in first["loc"]) or "what it returns"
            return [
                {"kind": "text", "title": "its renderer gave no blocks", "text": f"{where}: {first['msg']}"}
            ]
        return blocks

    return show_checked
