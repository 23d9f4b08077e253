"""Completers for tests of the session endpoint: they answer from a script, and keep what they were asked."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable

import numpy as np

from polyturn.agents.sessions.requests import Completion, CompletionRequest
from polyturn.envs.messages import AssistantMessage


def completion_of(
    message: AssistantMessage, number: int = 0, *, stop: str | None = None, is_cut: bool = False
) -> Completion:
    """An answer of three tokens behind a prompt of four, two of which were cached."""
    return Completion(
        completion_id=f"answer{number}",
        message=message,
        finish_reason="length" if is_cut else "tool_calls" if message.tool_calls else "stop",
        stop=stop,
        prompt_ids=np.arange(4, dtype=np.int32),
        token_ids=np.array([7, 8, 9], dtype=np.int32),
        logprobs=np.array([-0.5, -0.25, -1.0], dtype=np.float32),
        num_cached_tokens=2,
    )


class ScriptedCompleter:
    """Gives `answers` in their order; an exception among them is raised. The last one is given again and again."""

    def __init__(self, answers: Iterable[AssistantMessage | Completion | Exception]) -> None:
        self._answers = list(answers)
        self.requests: list[CompletionRequest] = []

    async def complete(self, request: CompletionRequest) -> Completion:
        """The next answer."""
        number = len(self.requests)
        self.requests.append(request)
        answer = self._answers[min(number, len(self._answers) - 1)]
        if isinstance(answer, Exception):
            raise answer
        return answer if isinstance(answer, Completion) else completion_of(answer, number)


class WaitingCompleter:
    """Answers when it is let go."""

    def __init__(self, answer: AssistantMessage) -> None:
        self._answer = answer
        self.asked, self.go, self.cancelled = asyncio.Event(), asyncio.Event(), asyncio.Event()

    async def complete(self, request: CompletionRequest) -> Completion:
        """The answer, once `go` is set."""
        self.asked.set()
        try:
            await self.go.wait()
        except asyncio.CancelledError:
            self.cancelled.set()
            raise
        return completion_of(self._answer)
