"""The ledger: the tokens of an episode as they truly were.

A sampled token enters with the id, logprob and policy version that the engine returned; an observation is appended
as unsampled tokens. No sampled token is ever re-tokenised from text, so the columns only grow. Where history is
rewritten, a branch begins: earlier turns stand in it as unsampled tokens, and each stays sampled in its own segment.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from polyturn.agents.policy import Generation
from polyturn.agents.sampling_support import SamplingSupport

UNSAMPLED_VERSION = -1
UNKNOWN_EXPERT = -1
TOKEN_COLUMNS: dict[str, type[np.generic]] = {
    "token_ids": np.int32,
    "sampled": np.bool_,
    "logprobs": np.float32,
    "policy_versions": np.int32,
    "turns": np.int16,
}
"""The columns of a segment that every token has a value in."""
FIRST_CAPACITY = 1024


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Segment:
    """One linear run of T tokens. All columns are arrays [T]; `sampled` is the trainable mask.

    Sequences of numbers become arrays. Two segments are equal when all that is in them is.
    """

    token_ids: npt.NDArray[np.int32]
    sampled: npt.NDArray[np.bool_]
    logprobs: npt.NDArray[np.float32]
    """Behavior logprobs; 0.0 where the token was not sampled."""
    policy_versions: npt.NDArray[np.int32]
    """`UNSAMPLED_VERSION` where the token was not sampled."""
    turns: npt.NDArray[np.int16]
    """The turn of each token; the tokens before the first answer belong to turn 0."""
    role: str = ""
    """Who wrote it in an episode of several agents, such as `solver/0`; else empty."""
    routed_experts: npt.NDArray[np.int16] | None = None
    """[T, layers x experts per token]: which experts the engine sent each token to, `UNKNOWN_EXPERT` where it recorded
    none. None where it recorded nothing at all."""
    support: SamplingSupport | None = None
    """What each sampled token was drawn from. None where nothing was left out of the vocabulary."""
    teacher_logprobs: npt.NDArray[np.float32] | None = None
    """[T]: what the teachers say of each sampled token, at temperature 1; 0.0 elsewhere. None where none was asked."""

    def __post_init__(self) -> None:
        for name, dtype in TOKEN_COLUMNS.items():
            object.__setattr__(self, name, np.asarray(getattr(self, name), dtype=dtype))
        shapes = {getattr(self, name).shape for name in TOKEN_COLUMNS}
        assert shapes == {(len(self),)}, f"columns of unequal length: {shapes}"
        routing = self.routed_experts
        assert routing is None or (routing.ndim == 2 and len(routing) == len(self)), (
            "routed experts of other tokens"
        )
        assert self.support is None or len(self.support) == len(self), "a support of other tokens"
        taught = self.teacher_logprobs
        assert taught is None or taught.shape == (len(self),), "a teacher's logprobs of other tokens"

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Segment):
            return NotImplemented
        columns = (*TOKEN_COLUMNS, "routed_experts", "teacher_logprobs")
        return (
            self.role == other.role
            and self.support == other.support
            and all(np.array_equal(getattr(self, name), getattr(other, name)) for name in columns)
        )

    def __len__(self) -> int:
        return len(self.token_ids)

    @property
    def num_sampled(self) -> int:
        return int(self.sampled.sum())


class Ledger:
    """Append-only token record of one episode. Its columns are those of the newest segment."""

    def __init__(self) -> None:
        self._turn = 0
        self._earlier: list[Segment] = []
        self._begin()

    @classmethod
    def behind(cls, prefix: Segment) -> Ledger:
        """A ledger that goes on behind another's tokens: none of them was sampled here, and their turns are over."""
        ledger = cls()
        ledger._extend(
            prefix.token_ids,
            sampled=False,
            logprobs=0.0,
            policy_versions=UNSAMPLED_VERSION,
            turns=prefix.turns,
        )
        ledger._turn = int(prefix.turns[-1]) + 1
        if prefix.routed_experts is not None:
            # The last token's is not known before the engine has gone on from it.
            rows = prefix.routed_experts[:-1]
            unknown = np.flatnonzero((rows == UNKNOWN_EXPERT).any(1))
            ledger._routed.append(rows[: unknown[0] if len(unknown) else len(rows)])
        return ledger

    def _begin(self) -> None:
        """Begin a segment, with columns of its own: those of the one before are left as they are."""
        self._columns: dict[str, npt.NDArray[Any]] = {
            name: np.empty(FIRST_CAPACITY, dtype=dtype) for name, dtype in TOKEN_COLUMNS.items()
        }
        self._length = 0
        self._routed: list[npt.NDArray[np.int16]] = []
        self._supports: list[tuple[int, SamplingSupport]] = []

    @property
    def num_routed(self) -> int:
        """Of how many tokens, from the first on, the routing is recorded."""
        return sum(len(rows) for rows in self._routed)

    @property
    def token_ids(self) -> npt.NDArray[np.int32]:
        """The tokens so far [T]. What is appended later is not in this array."""
        token_ids: npt.NDArray[np.int32] = self._columns["token_ids"][: self._length]
        token_ids.flags.writeable = False
        return token_ids

    @property
    def last_token_id(self) -> int:
        return int(self._columns["token_ids"][self._length - 1])

    def __len__(self) -> int:
        return self._length

    def begin_turn(self, number: int) -> None:
        """What is appended next is of this turn: turns of an episode may be spread over several ledgers."""
        self._turn = number

    def branch(self, token_ids: Sequence[int] | npt.NDArray[np.int32]) -> None:
        """Begin a segment with these tokens, none of them sampled here; what was written so far is kept as it is."""
        self._earlier.append(self.to_segment())
        self._begin()
        self.append_observation(token_ids)

    def append_observation(self, token_ids: Sequence[int] | npt.NDArray[np.int32]) -> None:
        """Append tokens that the policy did not sample."""
        self._extend(
            np.asarray(token_ids, dtype=np.int32),
            sampled=False,
            logprobs=0.0,
            policy_versions=UNSAMPLED_VERSION,
        )

    def append_generation(self, generation: Generation) -> None:
        """Append the tokens of one turn as the engine sampled them, and begin the next turn."""
        if generation.support is not None:
            self._supports.append((self._length, generation.support))
        self._extend(
            generation.token_ids,
            sampled=True,
            logprobs=generation.logprobs,
            policy_versions=generation.policy_versions,
        )
        if generation.routed_experts is not None:
            self._routed.append(generation.routed_experts)
        assert self.num_routed < max(len(self), 1), "no layer has seen the last token yet"
        self._turn += 1

    def to_segments(self, *, role: str = "") -> tuple[Segment, ...]:
        """All segments in order, each token sampled in one of them; none for an empty ledger."""
        earlier = tuple(replace(segment, role=role) for segment in self._earlier)
        return (*earlier, self.to_segment(role=role)) if len(self) else earlier

    def to_segment(self, *, role: str = "") -> Segment:
        """The newest segment, in memory of its own."""
        columns = {name: column[: self._length].copy() for name, column in self._columns.items()}
        return Segment(**columns, role=role, routed_experts=self._routing(), support=self._support())

    def _routing(self) -> npt.NDArray[np.int16] | None:
        if not self._routed:
            return None
        unknown = np.full(
            (len(self) - self.num_routed, self._routed[0].shape[1]), UNKNOWN_EXPERT, dtype=np.int16
        )
        return np.concatenate([*self._routed, unknown])

    def _support(self) -> SamplingSupport | None:
        if not self._supports:
            return None
        sizes = np.zeros(len(self), dtype=np.int32)
        for start, support in self._supports:
            sizes[start : start + len(support)] = support.sizes
        return SamplingSupport(
            sizes=sizes, token_ids=np.concatenate([support.token_ids for _, support in self._supports])
        )

    def _extend(self, token_ids: npt.NDArray[np.int32], **others: Any) -> None:
        """Append tokens of the turn under way; every other column has a value for each of them, or one for all."""
        end = self._length + len(token_ids)
        capacity = len(self._columns["token_ids"])
        if end > capacity:
            more = max(capacity, end - capacity)
            self._columns = {
                name: np.concatenate([column, np.empty(more, dtype=column.dtype)])
                for name, column in self._columns.items()
            }
        for name, values in {"token_ids": token_ids, "turns": self._turn, **others}.items():
            self._columns[name][self._length : end] = values
        self._length = end
