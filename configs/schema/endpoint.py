"""A model behind an OpenAI-compatible endpoint: where it is, what is asked of it, and how long it may take."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt, field_validator

from polyturn.configs.schema.section import Section


class ChatEndpoint(Section):
    """A model that answers `POST {url}/chat/completions`."""

    url: Annotated[str, Field(pattern=r"^https?://[^/\s]+")]
    """Up to and with `/v1`. A query, as Azure's `?api-version=...`, stays at the end; no key may be in it."""
    model: str
    """The model's name there."""
    api_key_file: Path | None = None
    """A file that holds the key and nothing else, or `env:NAME` for a variable; null sends none. The key stands in no
    config, log or message."""
    api_key_header: str = "Authorization"
    """The header of the key: `Authorization` sends it as `Bearer KEY`, any other, such as Azure's `api-key`, bare."""
    headers: dict[str, str] = {}
    """Sent with each request. Not for secrets: configs are stored."""
    request: dict[str, Any] = {}
    """Further fields of each request, such as `max_completion_tokens` or `chat_template_kwargs`. They replace those
    that Polyturn sends; null takes one out."""
    temperature: NonNegativeFloat | None = 1.0
    """Null leaves it to the endpoint."""
    max_tokens: PositiveInt | None = 1024
    """Of an answer, thoughts included; null leaves it to the endpoint."""
    stream: bool = False
    """Have the answer sent as it is written. It is used when it is whole either way."""
    timeout_s: PositiveFloat = 300.0
    """Of an answer, with all its tries and the waits between them."""
    idle_timeout_s: PositiveFloat = 60.0
    """A stream in which nothing comes for so long has broken off, and is tried again."""
    max_retries: NonNegativeInt = 4
    """Tries after the first, beside those that the endpoint asks to wait for (`Retry-After`)."""
    max_concurrent_requests: PositiveInt = 64
    """Requests under way at once, in one process. One that waits to be tried again is under way."""

    @field_validator("api_key_file", mode="after")
    @classmethod
    def _at_home(cls, path: Path | None) -> Path | None:
        return None if path is None else path.expanduser()
