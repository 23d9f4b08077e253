"""A policy that a function plays: scripts, oracles, random ones."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterable, Sequence
from types import NoneType
from typing import Any

from polyturn.agents.policy import PolicyFault
from polyturn.envs.messages import AssistantMessage, Message, Script
from polyturn.envs.plugins import Signature
from polyturn.tools.plain import shown
from polyturn.tools.types import ToolSpec

SCRIPT = Signature(
    what="script",
    arguments=("messages", "tools"),
    text="def script(messages: Sequence[Message], tools: Sequence[ToolSpec]) -> AssistantMessage | str",
    may_be_async=True,
    wrong_results=(bytes, float, int, bool, NoneType, list, tuple, dict),
)


class ScriptedPolicy:
    """Answers with what `script(messages, tools)` returns: a message, or its text. The script may be `async`."""

    def __init__(self, script: Script | Callable[..., Any]) -> None:
        self._script: Callable[..., Any] = script

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
        """Answer the conversation. Raises `PolicyFault` where the script gives no message."""
        said = self._script(messages, tools)
        if isinstance(said, Awaitable):
            said = await said
        if isinstance(said, str):
            return AssistantMessage(content=said)
        if not isinstance(said, AssistantMessage):
            raise PolicyFault(f"the script returned {shown(said)}; {SCRIPT.right}")
        return said
