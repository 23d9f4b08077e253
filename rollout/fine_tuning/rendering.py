"""The tokens of a row: those that it has, where this tokenizer and template made them, or as the template writes it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from polyturn.agents.chat import ChatRenderer
from polyturn.agents.dialects import Dialect
from polyturn.agents.ledger import UNSAMPLED_VERSION, Ledger, Segment
from polyturn.agents.policy import Generation
from polyturn.configs.errors import ConfigError
from polyturn.envs.messages import AssistantMessage, Message
from polyturn.rollout.fine_tuning.rows import Row, TokenSegment

TAUGHT_VERSION = 0
"""Stands for a policy version at tokens that no policy of the run has sampled."""


class RowRenderer:
    """Makes segments of rows, as rollouts make them of conversations: turn by turn, so that what is taught is where a
    policy would have sampled it."""

    def __init__(
        self, renderer: ChatRenderer, dialect: Dialect, *, tokenizer: str, vocab_size: int, stored: bool
    ) -> None:
        """
        Args:
            tokenizer: The digest of the model's tokenizer and template.
            vocab_size: Token ids from here on are refused.
            stored: Whether tokens that a row has are taken, where they are of this tokenizer.
        """
        self._renderer = renderer
        self._dialect = dialect
        self._tokenizer = tokenizer
        self._vocab_size = vocab_size
        self._stored = stored

    def takes_tokens_of(self, row: Row) -> bool:
        """Whether the row's own tokens are trained on."""
        return self._stored and bool(row.segments) and row.tokenizer == self._tokenizer

    def __call__(self, row: Row) -> tuple[Segment, ...]:
        """The segments of a row; every taught token is sampled in one of them.

        Raises:
            ConfigError: the template refuses it, or writes turns as the dialect does not read them.
        """
        if self.takes_tokens_of(row):
            return tuple(self._stored_segment(segment, row.where) for segment in row.segments)
        try:
            return self._render(row)
        except ValueError as error:
            raise ConfigError(f"{row.where}: messages: {error}") from error

    def _stored_segment(self, segment: TokenSegment, where: str) -> Segment:
        most = int(segment.token_ids.max())
        if most >= self._vocab_size:
            raise ConfigError(
                f"{where}: tokens.segments: token {most} is beyond the model's vocabulary of {self._vocab_size:,}"
            )
        starts = segment.taught & ~np.concatenate([[False], segment.taught[:-1]])
        # A turn ends where its taught tokens do.
        turns = np.maximum(np.cumsum(starts) - 1, 0)
        return _segment(segment.token_ids, segment.taught, turns)

    def _render(self, row: Row) -> tuple[Segment, ...]:
        messages, tools = row.messages, row.tools
        ledger, history, begin = Ledger(), self._renderer.history(tools), 0
        for place, message in enumerate(messages):
            if message["role"] != "assistant":
                continue
            before, observation = messages[:place], messages[begin:place]
            if len(ledger) and history.continues(before):
                new = self._renderer.extend(observation, last_token_id=ledger.last_token_id, tools=tools)
                ledger.append_observation(new)
            elif len(ledger):
                ledger.branch(self._renderer.start(before, tools))
            else:
                ledger.append_observation(self._renderer.start(before, tools))
            turn = self._renderer.written_turn(messages[: place + 1], tools)
            self._check_turn(turn, message, row, opens=self._opens(observation, begin))
            _append_turn(ledger, turn, taught=row.taught[place])
            begin = place + 1
        segments = ledger.to_segments()
        return tuple(segment for segment in segments if segment.num_sampled)

    def _opens(self, observation: Sequence[Message], begin: int) -> bool:
        return self._renderer.opens_thought(observation, is_first=begin == 0)

    def _check_turn(self, turn: Sequence[int], message: Message, row: Row, *, opens: bool) -> None:
        """That a rollout would read from these tokens the calls that the row has: else it teaches what nobody can act
        on."""
        text = self._renderer.decode(turn)
        found = self._dialect.parse(text, in_thought=opens, tools=row.tools)
        wanted = [
            (call["function"]["name"], call["function"]["arguments"])
            for call in message.get("tool_calls", ())
        ]
        if _calls_of(found) != wanted:
            raise ValueError(
                f"the chat template writes a turn with {len(wanted)} calls so that model.dialect reads "
                f"{len(found.tool_calls)} from it, or others: {text[:120]!r}; set model.dialect: auto, or "
                "model.tool_prompt: text"
            )


def _calls_of(message: AssistantMessage) -> list[tuple[str, Any]]:
    return [(call.name, dict(call.arguments)) for call in message.tool_calls]


def _append_turn(ledger: Ledger, turn: Sequence[int], *, taught: bool) -> None:
    if taught:
        ledger.append_generation(
            Generation(
                token_ids=turn,  # type: ignore[arg-type]
                logprobs=np.zeros(len(turn)),  # type: ignore[arg-type]
                policy_versions=np.full(len(turn), TAUGHT_VERSION),  # type: ignore[arg-type]
                finish_reason="stop",
            )
        )
    else:
        ledger.append_observation(turn)


def _segment(token_ids: np.ndarray, taught: np.ndarray, turns: np.ndarray) -> Segment:
    return Segment(
        token_ids=token_ids,
        sampled=taught,
        logprobs=np.zeros(len(token_ids), dtype=np.float32),
        policy_versions=np.where(taught, TAUGHT_VERSION, UNSAMPLED_VERSION).astype(np.int32),
        turns=turns.astype(np.int16),
    )
