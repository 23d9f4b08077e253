"""Who answers: a policy that samples tokens, of one engine or of several, or one that speaks in messages."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

from polyturn.envs.messages import AssistantMessage, Message
from polyturn.tools.types import ToolSpec

FinishReason = Literal["stop", "length", "abort"]


@dataclass(frozen=True, kw_only=True, slots=True)
class SamplingParams:
    """The sampling contract of one request. Top-p and top-k are absent: the trainer could not replay them."""

    temperature: float = 1.0
    max_tokens: int = 256
    seed: int | None = None
    """Honoured where the engine supports seeded sampling."""
    routing_from: int = 0
    """The first token, counted from the prompt's first, whose routing is not recorded yet."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Generation:
    """The tokens of one request as the engine sampled them, stop token included. All columns have equal length."""

    token_ids: tuple[int, ...]
    logprobs: tuple[float, ...]
    """Natural-log probability of each token under the sampler, at the sampling temperature."""
    policy_versions: tuple[int, ...]
    finish_reason: FinishReason
    routed_experts: tuple[str, ...] = ()
    """As `read_routing` gives them, of the tokens from `SamplingParams.routing_from` on; not of the last sampled one,
    which no layer has seen. Empty where the engine records nothing."""

    def __post_init__(self) -> None:
        lengths = {len(self.token_ids), len(self.logprobs), len(self.policy_versions)}
        assert len(lengths) == 1, f"columns of unequal length: {lengths}"


class TokenPolicy(Protocol):
    """A policy that continues token sequences."""

    async def generate(self, *, prompt_ids: Sequence[int], sampling: SamplingParams) -> Generation:
        """Sample a continuation. Raises `PolicyFault` when the engine fails."""
        ...


class MessagePolicy(Protocol):
    """A policy that answers a conversation: a script, a human, or a remote endpoint."""

    async def reply(self, *, messages: Sequence[Message], tools: Sequence[ToolSpec]) -> AssistantMessage:
        """Answer the conversation with one assistant message."""
        ...


class PolicyFault(RuntimeError):
    """The engine behind a policy failed: infrastructure, never a reward."""


class LeastLoadedPolicy:
    """Sends each request to the engine with the fewest under way; among equals, to the first."""

    def __init__(self, policies: Sequence[TokenPolicy]) -> None:
        assert policies, "at least one engine"
        self._policies = tuple(policies)
        self._under_way = [0] * len(self._policies)

    async def generate(self, *, prompt_ids: Sequence[int], sampling: SamplingParams) -> Generation:
        """Sample a continuation. Raises `PolicyFault` when the engine that was chosen fails."""
        chosen = self._under_way.index(min(self._under_way))
        self._under_way[chosen] += 1
        try:
            return await self._policies[chosen].generate(prompt_ids=prompt_ids, sampling=sampling)
        finally:
            self._under_way[chosen] -= 1
