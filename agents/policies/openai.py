"""A model behind an OpenAI-compatible endpoint."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from polyturn.agents.policy import PolicyFault, Reply
from polyturn.envs.messages import AssistantMessage, Message
from polyturn.tools.chat.answers import ChatAnswer, ChatFault
from polyturn.tools.chat.client import ChatClient
from polyturn.tools.types import ToolSpec


class OpenAIPolicy:
    """Plays one episode by asking an endpoint, whose client all episodes share."""

    def __init__(self, client: ChatClient) -> None:
        self._client = client
        self._reasoning_key: str | None = None
        self._call_extras: dict[str, Mapping[str, Any]] = {}

    async def reply(self, *, messages: Sequence[Message], tools: Sequence[ToolSpec]) -> Reply:
        """Answer the conversation.

        Raises:
            PolicyFault: the endpoint failed, or its answer holds no message.
        """
        try:
            answer = await self._client.ask([self._to_wire(message) for message in messages], tools)
        except ChatFault as fault:
            raise PolicyFault(str(fault)) from fault
        self._reasoning_key = answer.reasoning_key or self._reasoning_key
        self._call_extras.update(answer.call_extras)
        message = AssistantMessage(
            content=answer.content, reasoning=answer.reasoning, tool_calls=answer.tool_calls
        )
        return Reply(
            message=message,
            finish_reason=answer.finish_reason,
            problem=answer.problem,
            counts=_counts(answer),
            waited_s=answer.waited_s,
        )

    def _to_wire(self, message: Message) -> dict[str, Any]:
        """The message with the arguments of its calls as JSON text, which is how endpoints want them.

        Reasoning goes back with calls alone, under the key that the endpoint gave it: some want it there, none
        elsewhere.
        """
        wire: dict[str, Any] = dict(message)
        reasoning = wire.pop("reasoning", None)
        calls = message.get("tool_calls")
        if reasoning and self._reasoning_key and calls:
            wire[self._reasoning_key] = reasoning
        if calls:
            wire["tool_calls"] = [
                {
                    **call,
                    "function": {**call["function"], "arguments": json.dumps(call["function"]["arguments"])},
                    **self._call_extras.get(call["id"], {}),
                }
                for call in calls
            ]
        return wire


def _counts(answer: ChatAnswer) -> dict[str, float]:
    """What is recorded of an answer, by the names of `docs/policies.md`."""
    counts: dict[str, float] = {} if answer.refusal is None else {"policy_refusals": 1.0}
    usage = answer.usage
    if usage is not None:
        counts["policy_prompt_tokens"] = float(usage.prompt_tokens)
        counts["policy_completion_tokens"] = float(usage.completion_tokens)
        counts["policy_cached_tokens"] = float(usage.cached_tokens)
        counts["policy_reasoning_tokens"] = float(usage.reasoning_tokens)
    return counts
