"""Who answers: a policy that samples tokens, of one engine or of several, or one that speaks in messages."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Literal, Protocol, runtime_checkable

import numpy as np
import numpy.typing as npt

from polyturn.agents.live_episodes import LiveEpisodes
from polyturn.agents.sampling_support import SamplingSupport
from polyturn.envs.messages import AssistantMessage, Message
from polyturn.tools.types import ToolSpec

FinishReason = Literal["stop", "length", "abort"]


@dataclass(frozen=True, kw_only=True, slots=True)
class SamplingParams:
    """The sampling contract of one request. Penalties are absent: the trainer could not replay them."""

    temperature: float = 1.0
    top_p: float = 1.0
    """1.0 leaves nothing out."""
    top_k: int = -1
    """-1 leaves nothing out."""
    min_p: float = 0.0
    """0.0 leaves nothing out."""
    records_support: bool = False
    """Ask for the tokens that each was drawn from, and for logprobs over them; needs a `top_k`."""
    max_tokens: int = 256
    seed: int | None = None
    """Honoured where the engine supports seeded sampling."""
    routing_from: int = 0
    """The first token, counted from the prompt's first, whose routing is not recorded yet."""
    stop: tuple[str, ...] = ()
    """Texts that end the generation, beside those of the policy; they belong to it."""


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Generation:
    """The tokens of one request as the engine sampled them, stop token included. All columns have equal length T.

    A policy may hand over any sequences of numbers: they become arrays here.
    """

    token_ids: npt.NDArray[np.int32]
    logprobs: npt.NDArray[np.float32]
    """Natural-log probability of each token under the sampler, at the sampling temperature; with a support over that,
    without one over the whole vocabulary, whatever was left out of it."""
    policy_versions: npt.NDArray[np.int32]
    finish_reason: FinishReason
    routed_experts: npt.NDArray[np.int16] | None = None
    """[tokens, layers x experts per token], of the tokens from `SamplingParams.routing_from` on, but not of the
    last sampled one, which no layer has seen. None where the engine records nothing."""
    num_cached_tokens: int = 0
    """Tokens of the prompt that the engine did not compute again; 0 where it does not say."""
    num_retractions: int = 0
    """How often the engine took the request out of its batch for want of KV memory, or of new weights."""
    support: SamplingSupport | None = None
    """What each token was drawn from. None where that is the whole vocabulary, or nobody asked."""
    waited_s: float = 0.0
    """Of the time that the answer took, what no engine worked for it in: waits, and engines that failed it before."""

    def __post_init__(self) -> None:
        for name, dtype in (("token_ids", np.int32), ("logprobs", np.float32), ("policy_versions", np.int32)):
            object.__setattr__(self, name, np.asarray(getattr(self, name), dtype=dtype))
        shapes = {self.token_ids.shape, self.logprobs.shape, self.policy_versions.shape}
        assert len(shapes) == 1 and self.token_ids.ndim == 1, f"columns of unequal shape: {shapes}"
        assert self.support is None or len(self.support) == len(self), "a support of other tokens"

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
            num_cached_tokens=sum(part.num_cached_tokens for part in parts),
            num_retractions=sum(part.num_retractions for part in parts),
            support=SamplingSupport.joined([part.support for part in parts], [len(part) for part in parts]),
        )


class TokenPolicy(Protocol):
    """A policy that continues token sequences."""

    async def generate(self, *, prompt_ids: npt.NDArray[np.int32], sampling: SamplingParams) -> Generation:
        """Sample a continuation of `prompt_ids` [T]. Raises `PolicyFault` when the engine fails."""
        ...


@dataclass(frozen=True, kw_only=True, slots=True)
class Reply:
    """An assistant message, and how it came about."""

    message: AssistantMessage
    finish_reason: Literal["stop", "length", "content_filter", "context"] = "stop"
    """Any but `stop` truncates the episode: the message was cut off (`length`), the endpoint's filter kept it back
    (`content_filter`), or the conversation is too long for the model and there is none (`context`)."""
    problem: str = ""
    """What stood in the way of a message, in words."""
    counts: Mapping[str, float] = field(default_factory=dict)
    """What the policy counted, such as tokens; summed over the episode among its metrics."""
    waited_s: float = 0.0
    """Of the time that the answer took, what nobody wrote in: waits that an endpoint asked for, tries that failed."""


class MessagePolicy(Protocol):
    """A policy that answers a conversation: a script, a human, or a remote endpoint."""

    async def reply(
        self, *, messages: Sequence[Message], tools: Sequence[ToolSpec]
    ) -> AssistantMessage | Reply:
        """Answer the conversation with one assistant message; a `Reply` where there is more to say of it.

        Raises `PolicyFault` when what is behind it fails.
        """
        ...


def as_reply(given: AssistantMessage | Reply) -> Reply:
    """A message that nothing more is said of is whole."""
    return given if isinstance(given, Reply) else Reply(message=given)


Policy = TokenPolicy | MessagePolicy


@runtime_checkable
class EpisodePolicies(Protocol):
    """What has a policy for each episode: it knows which requests are of one episode, and when the episode ends."""

    live: LiveEpisodes | None
    """Episodes whose KV the engines hold; None: any number."""

    def for_episode(self) -> AbstractContextManager[TokenPolicy]:
        """The policy of one episode; what is held for the episode is free at the end of the block."""
        ...


@runtime_checkable
class ChatEngines(Protocol):
    """A policy whose engines answer chat requests, too: of simulated users that they play."""

    chat_urls: tuple[str, ...]
    """Up to and with `/v1`; empty where it is not known."""


def policy_of_episode(policy: TokenPolicy) -> AbstractContextManager[TokenPolicy]:
    """The policy that one episode is played with: one of its own, or what all episodes share."""
    return policy.for_episode() if isinstance(policy, EpisodePolicies) else nullcontext(policy)


def live_episodes_of(policy: TokenPolicy) -> LiveEpisodes | None:
    """Those among which an episode that this policy plays has to be; None: there may be any number."""
    return policy.live if isinstance(policy, EpisodePolicies) else None


class PolicyFault(RuntimeError):
    """The engine behind a policy failed: infrastructure, never a reward."""


class NoSlot(PolicyFault):
    """No slot for a request became free in time: asking again later may help."""


class EngineUnavailable(PolicyFault):
    """An engine gave no answer, or one that says "not now": another engine may answer the same request."""

    def __init__(self, message: str, *, is_gone: bool) -> None:
        """`is_gone`: nobody answers at its address, so that the next request would not be answered either."""
        super().__init__(message)
        self.is_gone = is_gone


class GarbledAnswer(EngineUnavailable):
    """An engine answered what none in order answers: another may answer the same request well."""

    def __init__(self, message: str) -> None:
        super().__init__(message, is_gone=False)
