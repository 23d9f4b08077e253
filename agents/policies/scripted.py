"""A policy that a function plays: scripts, oracles, random ones."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from polyturn.agents.policy import PolicyFault
from polyturn.envs.messages import AssistantMessage, Message, Script
from polyturn.tools.types import ToolSpec


class ScriptedPolicy:
    """Answers with what `script(messages, tools)` returns."""

    def __init__(self, script: Script) -> None:
        self._script = script

    @classmethod
    def saying(cls, replies: Iterable[AssistantMessage]) -> ScriptedPolicy:
        """Gives `replies` in their order, for one episode."""
        remaining = iter(replies)

        def script(messages: Sequence[Message], tools: Sequence[ToolSpec]) -> AssistantMessage:
            del messages, tools
            reply = next(remaining, None)
            if reply is None:
                raise PolicyFault("the script has no further reply")
            return reply

        return cls(script)

    async def reply(self, *, messages: Sequence[Message], tools: Sequence[ToolSpec]) -> AssistantMessage:
        """Answer the conversation."""
        return self._script(messages, tools)
