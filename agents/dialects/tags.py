"""Actions in tags, as projects have their models search."""

from __future__ import annotations

from collections.abc import Sequence

from polyturn.envs.messages import AssistantMessage
from polyturn.envs.search.styles import Tags, parse_turn
from polyturn.tools.types import ToolSpec


class TagDialect:
    """Actions in tags, such as Search-R1's `<search>query</search>`: the first of a turn counts.

    What an environment answers belongs to the same assistant turn: such a dialect needs a `ContinuationRenderer`.
    """

    def __init__(self, tags: Tags) -> None:
        self.tags = tags

    def parse(
        self, text: str, *, in_thought: bool = False, tools: Sequence[ToolSpec] = ()
    ) -> AssistantMessage:
        """As `Dialect.parse`; thoughts are in tags of the style, and stay in the content."""
        del in_thought, tools
        return parse_turn(text, self.tags)
