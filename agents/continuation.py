"""Conversations in one assistant turn: what is found goes on where the policy stopped, as raw text."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from polyturn.agents.chat import ChatRenderer, History
from polyturn.agents.chat_template import ToolPrompt
from polyturn.agents.dialects import Dialect, TagDialect
from polyturn.envs.messages import Message
from polyturn.envs.search.styles import Tags
from polyturn.tools.types import ToolSpec


def make_renderer(
    tokenizer: Any,
    dialect: Dialect,
    *,
    template_options: Mapping[str, Any] | None = None,
    tool_prompt: ToolPrompt = "auto",
    history: History = "template",
) -> ChatRenderer:
    """The renderer that a dialect's conversations need. Raises `ValueError` as `ChatRenderer` does."""
    if isinstance(dialect, TagDialect):
        return ContinuationRenderer(tokenizer, tags=dialect.tags, template_options=template_options)
    return ChatRenderer(
        tokenizer, template_options=template_options, tool_prompt=tool_prompt, history=history
    )


class ContinuationRenderer(ChatRenderer):
    """Renders the prompt with the chat template, without tools, and all that follows as text of the assistant's turn.

    Sampling stops at the closing tag of an action, which stays. Results stand in the tags of the style, cut there to
    its limit; any other message is put as it is. A policy that ends its turn itself, with the template's end token, is
    given the head of a new assistant turn first, since sampled tokens are never taken back.
    """

    def __init__(
        self, tokenizer: Any, *, tags: Tags, template_options: Mapping[str, Any] | None = None
    ) -> None:
        super().__init__(tokenizer, template_options=template_options, history="sampled")
        self._tags = tags

    @property
    def stop_strings(self) -> tuple[str, ...]:
        return self._tags.stop_strings

    def start(self, messages: Sequence[Message], tools: Sequence[ToolSpec] = ()) -> list[int]:
        """The tokens of the prompt and of the head of the assistant's turn; the tags stand in for the tools."""
        del tools
        return super().start(messages) + self._encode_text(self._tags.opening)

    def extend(
        self, observation: Sequence[Message], *, last_token_id: int, tools: Sequence[ToolSpec] = ()
    ) -> list[int]:
        """The tokens that go on after a sampled text: `observation` as text."""
        del tools
        closed = last_token_id in self.stop_token_ids
        token_ids = super().extend((), last_token_id=last_token_id) if closed else []
        for message in observation:
            found = message["role"] == "tool" and message.get("name")
            token_ids += self._result(message["content"]) if found else self._encode_text(message["content"])
        return token_ids + self._encode_text(self._tags.opening)

    def _result(self, content: str) -> list[int]:
        opening, closing = self._tags.results
        token_ids = self._encode_text(f"{opening}{content.strip()}{closing}")
        limit = self._tags.max_result_tokens
        if limit is None or len(token_ids) <= limit:
            return token_ids
        head, tail = self._encode_text(opening), self._encode_text(closing)
        room = max(0, limit - len(head) - len(tail))
        return head + self._encode_text(content.strip())[:room] + tail
