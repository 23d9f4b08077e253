"""What reads the text of a turn."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from polyturn.envs.messages import AssistantMessage
from polyturn.tools.types import ToolSpec


class Dialect(Protocol):
    """Reads the text of a turn."""

    def parse(
        self, text: str, *, in_thought: bool = False, tools: Sequence[ToolSpec] = ()
    ) -> AssistantMessage:
        """The message that `text` is. Never raises: a call that cannot be read carries its error.

        Args:
            in_thought: Whether the prompt has opened a thought already, which the text goes on with.
            tools: Those that the model was told of. Formats without types take the types of arguments from them; a call
                of any other tool is read all the same.
        """
        ...
