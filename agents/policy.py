"""Who answers: a policy that samples tokens, of one engine or of several, or one that speaks in messages."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

import numpy as np
import numpy.typing as npt

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


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Generation:
    """The tokens of one request as the engine sampled them, stop token included. All columns have equal length T.

    A policy may hand over any sequences of numbers: they become arrays here.
    """

    token_ids: npt.NDArray[np.int32]
    logprobs: npt.NDArray[np.float32]
    """Natural-log probability of each token under the sampler, at the sampling temperature."""
    policy_versions: npt.NDArray[np.int32]
    finish_reason: FinishReason
    routed_experts: npt.NDArray[np.int16] | None = None
    """[tokens, layers x experts per token], of the tokens from `SamplingParams.routing_from` on, but not of the
    last sampled one, which no layer has seen. None where the engine records nothing."""

    def __post_init__(self) -> None:
        for name, dtype in (("token_ids", np.int32), ("logprobs", np.float32), ("policy_versions", np.int32)):
            object.__setattr__(self, name, np.asarray(getattr(self, name), dtype=dtype))
        shapes = {self.token_ids.shape, self.logprobs.shape, self.policy_versions.shape}
        assert len(shapes) == 1 and self.token_ids.ndim == 1, f"columns of unequal shape: {shapes}"

    def __len__(self) -> int:
        return len(self.token_ids)

    @classmethod
    def joined(cls, parts: Sequence[Generation], finish_reason: FinishReason) -> Generation:
        """The generation that came in several parts, one behind the other."""
        routed = [part.routed_experts for part in parts if part.routed_experts is not None]
        return cls(
            token_ids=np.concatenate([part.token_ids for part in parts]),
            logprobs=np.concatenate([part.logprobs for part in parts]),
            policy_versions=np.concatenate([part.policy_versions for part in parts]),
            finish_reason=finish_reason,
            routed_experts=np.concatenate(routed) if routed else None,
        )


class TokenPolicy(Protocol):
    """A policy that continues token sequences."""

    async def generate(self, *, prompt_ids: npt.NDArray[np.int32], sampling: SamplingParams) -> Generation:
        """Sample a continuation of `prompt_ids` [T]. Raises `PolicyFault` when the engine fails."""
        ...


class MessagePolicy(Protocol):
    """A policy that answers a conversation: a script, a human, or a remote endpoint."""

    async def reply(self, *, messages: Sequence[Message], tools: Sequence[ToolSpec]) -> AssistantMessage:
        """Answer the conversation with one assistant message."""
        ...


Policy = TokenPolicy | MessagePolicy


class PolicyFault(RuntimeError):
    """The engine behind a policy failed: infrastructure, never a reward."""


class LeastLoadedPolicy:
    """Sends each request to the engine with the fewest under way; among equals, to the first."""

    def __init__(self, policies: Sequence[TokenPolicy]) -> None:
        assert policies, "at least one engine"
        self._policies = tuple(policies)
        self._under_way = [0] * len(self._policies)

    async def generate(self, *, prompt_ids: npt.NDArray[np.int32], sampling: SamplingParams) -> Generation:
        """Sample a continuation. Raises `PolicyFault` when the engine that was chosen fails."""
        chosen = self._under_way.index(min(self._under_way))
        self._under_way[chosen] += 1
        try:
            return await self._policies[chosen].generate(prompt_ids=prompt_ids, sampling=sampling)
        finally:
            self._under_way[chosen] -= 1
