"""Scripts: policies as plain functions, such as the oracle and the random player that an environment carries."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence

from gymnasium import Space

from polyturn.envs.messages import AssistantMessage, Message
from polyturn.tools.types import ToolSpec

Script = Callable[[Sequence[Message], Sequence[ToolSpec]], AssistantMessage]
"""The next assistant message, from the conversation so far and the tools."""


def random_script(space: Space[AssistantMessage], seed: int) -> Script:
    """A script that samples from a space; the space itself is left alone."""
    own_space = copy.deepcopy(space)
    own_space.seed(seed)

    def script(messages: Sequence[Message], tools: Sequence[ToolSpec]) -> AssistantMessage:
        del messages, tools
        return own_space.sample()

    return script
