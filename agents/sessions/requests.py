"""What a program asks of its session, and what it is answered, whichever protocol it speaks."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, Protocol

import numpy as np
import numpy.typing as npt

from polyturn.envs.messages import AssistantMessage, Message
from polyturn.tools.types import ToolSpec


@dataclass(frozen=True, kw_only=True, slots=True)
class CompletionRequest:
    """One request for an assistant message. How it is sampled is for the run to say, and no part of it."""

    messages: tuple[Message, ...]
    """The whole conversation so far, in the shape of the OpenAI chat format; arguments of calls are objects, or the
    text that was sent where that is no JSON object."""
    tools: tuple[ToolSpec, ...] = ()
    max_tokens: int | None = None
    """The most tokens of the answer; None: what the run allows."""
    stop: tuple[str, ...] = ()
    """Texts that end the answer, and are no part of it."""
    is_retry: bool = False
    """Whether the client says that it has asked the same before."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Completion:
    """The answer to one request."""

    completion_id: str
    """Of this answer, within its session and over all sessions of a run."""
    message: AssistantMessage
    """Its calls could all be read: no protocol has a form for one that could not, and what was written stands in the
    content."""
    finish_reason: Literal["stop", "length", "tool_calls"]
    stop: str | None = None
    """Which of the request's stop texts ended it."""
    prompt_ids: npt.NDArray[np.int32]
    """[P]: the tokens that the answer was sampled behind."""
    token_ids: npt.NDArray[np.int32]
    """[T]: the sampled tokens."""
    logprobs: npt.NDArray[np.float32]
    """[T]."""
    num_cached_tokens: int = 0
    """Tokens of the prompt that the engine did not compute again."""

    def __post_init__(self) -> None:
        assert all(call.error is None for call in self.message.tool_calls), (
            "a call that no client can be given"
        )


class RequestRefused(Exception):
    """A request that cannot be answered: the client is told why, in its protocol's form."""

    def __init__(self, message: str, *, status: int = 400, retry_after_s: float | None = None) -> None:
        """
        Args:
            status: Of HTTP. Clients ask again after 408, 409, 429 and 5xx, and after no other.
            retry_after_s: When asking again may help.
        """
        super().__init__(message)
        self.status = status
        self.retry_after_s = retry_after_s


class Completer(Protocol):
    """What answers the requests of one episode."""

    async def complete(self, request: CompletionRequest) -> Completion:
        """The answer. Cancelled where the client has gone. Raises `RequestRefused`."""
        ...


@dataclass(frozen=True, kw_only=True, slots=True)
class SessionAddress:
    """Where a program finds its session."""

    base_url: str
    """For clients of OpenAI's protocols: ends in `/v1`."""
    anthropic_base_url: str
    """For clients of Anthropic's: the same without `/v1`."""
    api_key: str = field(repr=False)
    """Of this episode alone."""
    socket_path: Path | None = None
    """A Unix socket where the same is served; None: there is none."""
