"""The ledger: the tokens of an episode as they truly were.

A sampled token enters with the id, logprob and policy version that the engine returned; an observation is appended
as unsampled tokens. No sampled token is ever re-tokenised from text, so the columns only grow. Where history is
rewritten, a branch begins: earlier turns stand in it as unsampled tokens, and each stays sampled in its own segment.

Which experts an engine sent each token to is a column of its own. A token's entry is base64 of little-endian int16,
[layers, experts per token] in C order, with a row for every layer (those of dense layers mean nothing); `NO_ROUTING`
where the engine recorded none.
"""

from __future__ import annotations

import base64
import binascii
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import numpy.typing as npt

from polyturn.agents.policy import Generation, PolicyFault

NO_ROUTING = ""
UNKNOWN_EXPERT = -1


def read_routing(text: str, *, num_tokens: int) -> tuple[str, ...]:
    """The entries of `num_tokens` tokens from SGLang's `meta_info.routed_experts`: base64 of int32 [tokens, ...].

    Raises:
        PolicyFault: the record is not of so many tokens, or names experts that cannot be.
    """
    try:
        flat = np.frombuffer(base64.b64decode(text, validate=True), dtype="<i4")
    except (binascii.Error, ValueError) as error:
        raise PolicyFault(f"the engine's routed experts are not base64 of int32: {error}") from error
    if num_tokens == 0:
        return ()
    if flat.size == 0 or flat.size % num_tokens:
        raise PolicyFault(
            f"the engine's routed experts are {flat.size} numbers, which is no record of {num_tokens} tokens"
        )
    rows = flat.reshape(num_tokens, -1)
    if rows.max() > np.iinfo(np.int16).max:
        raise PolicyFault(f"the engine's routed experts name expert {rows.max()}")
    small = rows.astype("<i2")
    return tuple(base64.b64encode(row.tobytes()).decode("ascii") for row in small)


def routing_array(column: Sequence[str]) -> npt.NDArray[np.int16] | None:
    """A ledger's column as an array [T, layers x experts per token], `UNKNOWN_EXPERT` where nothing was recorded.

    None when the whole column holds no record.
    """
    found = [np.frombuffer(base64.b64decode(entry), dtype="<i2") if entry else None for entry in column]
    widths = {len(row) for row in found if row is not None}
    if not widths:
        return None
    assert len(widths) == 1, f"routed experts of several widths: {widths}"
    array = np.full((len(found), *widths), UNKNOWN_EXPERT, dtype=np.int16)
    for index, row in enumerate(found):
        if row is not None:
            array[index] = row
    return array


UNSAMPLED_VERSION = -1


@dataclass(frozen=True, kw_only=True, slots=True)
class Segment:
    """One linear run of tokens. All columns have equal length T; `sampled` is the trainable mask."""

    token_ids: tuple[int, ...]
    sampled: tuple[bool, ...]
    logprobs: tuple[float, ...]
    """Behavior logprobs; 0.0 where the token was not sampled."""
    policy_versions: tuple[int, ...]
    """`UNSAMPLED_VERSION` where the token was not sampled."""
    turns: tuple[int, ...]
    """The turn of each token; the tokens before the first answer belong to turn 0."""
    role: str = ""
    """Who wrote it in an episode of several agents, such as `solver/0`; else empty."""
    routed_experts: tuple[str, ...] = ()
    """Which experts the engine sent each token to, as `read_routing` gives it; empty where nothing was recorded."""

    def __post_init__(self) -> None:
        columns = (self.token_ids, self.sampled, self.logprobs, self.policy_versions, self.turns)
        lengths = {len(column) for column in columns}
        assert len(lengths) == 1, f"columns of unequal length: {[len(c) for c in columns]}"
        assert len(self.routed_experts) in (0, *lengths), "routed experts of other tokens"

    def __len__(self) -> int:
        return len(self.token_ids)

    @property
    def num_sampled(self) -> int:
        return sum(self.sampled)


@dataclass(slots=True)
class Ledger:
    """Append-only token record of one episode. Its columns are those of the newest segment."""

    _token_ids: list[int] = field(default_factory=list)
    _sampled: list[bool] = field(default_factory=list)
    _logprobs: list[float] = field(default_factory=list)
    _policy_versions: list[int] = field(default_factory=list)
    _turns: list[int] = field(default_factory=list)
    _routed_experts: list[str] = field(default_factory=list)
    _turn: int = 0
    _earlier: list[Segment] = field(default_factory=list)

    @property
    def num_routed(self) -> int:
        """Of how many tokens, from the first on, the routing is recorded."""
        return len(self._routed_experts)

    @property
    def token_ids(self) -> tuple[int, ...]:
        return tuple(self._token_ids)

    @property
    def last_token_id(self) -> int:
        return self._token_ids[-1]

    def __len__(self) -> int:
        return len(self._token_ids)

    def branch(self, token_ids: Sequence[int]) -> None:
        """Begin a segment with these tokens, none of them sampled here; what was written so far is kept as it is."""
        self._earlier.append(self.to_segment())
        for column in (
            self._token_ids,
            self._sampled,
            self._logprobs,
            self._policy_versions,
            self._turns,
            self._routed_experts,
        ):
            column.clear()
        self.append_observation(token_ids)

    def append_observation(self, token_ids: Sequence[int]) -> None:
        """Append tokens that the policy did not sample."""
        self._extend(
            token_ids, [False] * len(token_ids), [0.0] * len(token_ids), [UNSAMPLED_VERSION] * len(token_ids)
        )

    def append_generation(self, generation: Generation) -> None:
        """Append the tokens of one turn as the engine sampled them, and begin the next turn."""
        self._extend(
            generation.token_ids,
            [True] * len(generation.token_ids),
            generation.logprobs,
            generation.policy_versions,
        )
        self._routed_experts.extend(generation.routed_experts)
        assert len(self._routed_experts) < max(len(self), 1), "no layer has seen the last token yet"
        self._turn += 1

    def to_segments(self, *, role: str = "") -> tuple[Segment, ...]:
        """All segments in order, each token sampled in one of them; none for an empty ledger."""
        earlier = tuple(replace(segment, role=role) for segment in self._earlier)
        return (*earlier, self.to_segment(role=role)) if len(self) else earlier

    def to_segment(self, *, role: str = "") -> Segment:
        """The newest segment."""
        return Segment(
            token_ids=tuple(self._token_ids),
            sampled=tuple(self._sampled),
            logprobs=tuple(self._logprobs),
            policy_versions=tuple(self._policy_versions),
            turns=tuple(self._turns),
            role=role,
            routed_experts=self._routing_column(),
        )

    def _routing_column(self) -> tuple[str, ...]:
        if not self._routed_experts:
            return ()
        return (*self._routed_experts, *[NO_ROUTING] * (len(self) - len(self._routed_experts)))

    def _extend(
        self,
        token_ids: Sequence[int],
        sampled: Sequence[bool],
        logprobs: Sequence[float],
        policy_versions: Sequence[int],
    ) -> None:
        assert len(token_ids) == len(sampled) == len(logprobs) == len(policy_versions), (
            "columns of unequal length"
        )
        self._token_ids.extend(token_ids)
        self._sampled.extend(sampled)
        self._logprobs.extend(logprobs)
        self._policy_versions.extend(policy_versions)
        self._turns.extend([self._turn] * len(token_ids))
