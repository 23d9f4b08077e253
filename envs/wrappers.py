"""Wrappers of tool environments."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import gymnasium

from polyturn.envs.messages import AssistantMessage, Observation


class TextSpace(gymnasium.Space[str]):
    """Any text. `gymnasium.spaces.Text` refuses what lies outside its character set."""

    def __init__(self, seed: int | None = None) -> None:
        super().__init__(None, None, seed)

    @property
    def is_np_flattenable(self) -> bool:
        return False

    def contains(self, x: Any) -> bool:
        return isinstance(x, str)

    def sample(self, mask: Any | None = None, probability: Any | None = None) -> str:
        if mask is not None or probability is not None:
            raise ValueError("a space of texts has no masks or probabilities")
        return str(int(self.np_random.integers(1000)))

    def __eq__(self, other: object) -> bool:
        return isinstance(other, TextSpace)

    def __hash__(self) -> int:
        return hash(TextSpace)


class RawTextAction(gymnasium.ActionWrapper[Observation, str, AssistantMessage]):
    """Lets one act in raw text: `parse` (a dialect's, or one's own for tags) makes it an assistant message."""

    def __init__(
        self, env: gymnasium.Env[Observation, AssistantMessage], parse: Callable[[str], AssistantMessage]
    ) -> None:
        super().__init__(env)
        self.action_space = TextSpace()
        self._parse = parse

    def action(self, action: str) -> AssistantMessage:
        return self._parse(action)
