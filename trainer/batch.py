"""What the trainer trains on: samples, their split over data-parallel ranks, and their packs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from polyturn.agents.ledger import Segment, routing_array
from polyturn.configs.schema.trainer import BalanceConfig
from polyturn.trainer.balance import balance


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class TrainSample:
    """One segment of an episode, as the trainer sees it. All columns have equal length T.

    The logprob columns mean something at sampled tokens only; whatever stands elsewhere changes nothing.
    """

    sample_id: str
    group_id: str
    sequence_id: str
    """What counts once in a reduction by sequence: an episode, or what one role wrote in it, over all its segments."""
    token_ids: npt.NDArray[np.int64]
    sampled: npt.NDArray[np.bool_]
    """The trainable mask. The first token has nothing before it and is never sampled."""
    behavior_logprobs: npt.NDArray[np.float32]
    """Of the sampler that drew the tokens."""
    policy_versions: npt.NDArray[np.int32]
    """Of the weights that drew a sampled token."""
    turns: npt.NDArray[np.int32]
    """The turn of each token."""
    proximal_logprobs: npt.NDArray[np.float32] | None = None
    """Of the policy at the start of the step."""
    reference_logprobs: npt.NDArray[np.float32] | None = None
    """Of the frozen reference policy."""
    advantages: npt.NDArray[np.float32] | None = None
    """None until they have been estimated, and for what is taught rather than reinforced."""
    values: npt.NDArray[np.float32] | None = None
    """What the critic expected before each token, at the start of the step; None without a critic."""
    returns: npt.NDArray[np.float32] | None = None
    """What the critic should have expected."""
    correction_weights: npt.NDArray[np.float32] | None = None
    """What each token's policy loss is multiplied by, 0 for rejected ones; None where nothing is corrected."""

    routed_experts: npt.NDArray[np.int16] | None = None
    """[T, layers x experts per token], the engine's choice, -1 where it recorded none. None: the trainer's own."""

    def __post_init__(self) -> None:
        columns = (
            self.token_ids,
            self.sampled,
            self.behavior_logprobs,
            self.policy_versions,
            self.turns,
            self.proximal_logprobs,
            self.reference_logprobs,
            self.advantages,
            self.values,
            self.returns,
            self.correction_weights,
        )
        shapes = {column.shape for column in columns if column is not None}
        assert len(shapes) == 1 and len(self.token_ids) > 0, f"{self.sample_id}: columns of shapes {shapes}"
        routing = self.routed_experts
        assert routing is None or len(routing) == len(self.token_ids), (
            f"{self.sample_id}: routing of other tokens"
        )
        assert not self.sampled[0], f"{self.sample_id}: the first token has no context to be sampled from"

    def __len__(self) -> int:
        return len(self.token_ids)

    @property
    def num_trainable(self) -> int:
        return int(self.sampled.sum())

    @classmethod
    def from_segment(
        cls, segment: Segment, *, sample_id: str, group_id: str, sequence_id: str
    ) -> TrainSample:
        """The sample of a segment of an episode."""
        return cls(
            sample_id=sample_id,
            group_id=group_id,
            sequence_id=sequence_id,
            token_ids=np.array(segment.token_ids, dtype=np.int64),
            sampled=np.array(segment.sampled, dtype=np.bool_),
            behavior_logprobs=np.array(segment.logprobs, dtype=np.float32),
            policy_versions=np.array(segment.policy_versions, dtype=np.int32),
            turns=np.array(segment.turns, dtype=np.int32),
            routed_experts=routing_array(segment.routed_experts),
        )


def split_over_ranks(
    samples: Sequence[TrainSample], num_ranks: int, config: BalanceConfig | None = None
) -> list[list[TrainSample]]:
    """Give every sample to one data-parallel rank, so that the ranks have work for like times.

    With fewer samples than ranks some ranks get none: they take part with micro-batches of padding.
    """
    shares = balance([len(sample) for sample in samples], num_ranks, config or BalanceConfig())
    return [[samples[index] for index in share] for share in shares]


def pack(samples: Sequence[TrainSample], max_tokens: int) -> list[list[TrainSample]]:
    """Gather samples into micro-batches of at most `max_tokens` tokens, by first fit, the longest first.

    A sample that is longer than that makes a micro-batch of its own: nothing is truncated.
    """
    packs: list[list[TrainSample]] = []
    free: list[int] = []
    for sample in _longest_first(samples):
        fit = next((i for i, room in enumerate(free) if room >= len(sample)), None)
        if fit is None:
            packs.append([sample])
            free.append(max_tokens - len(sample))
        else:
            packs[fit].append(sample)
            free[fit] -= len(sample)
    return packs


def split_packs(packs: Sequence[Sequence[TrainSample]], num_packs: int) -> list[list[TrainSample]]:
    """The same samples in `num_packs` micro-batches: halves the fullest until there are enough, then adds empty ones.

    Ranks whose packing came out shorter use it to make as many micro-batches as the others.
    """
    assert num_packs >= len(packs), f"{len(packs)} micro-batches cannot become {num_packs}"
    result = [list(samples) for samples in packs]
    while len(result) < num_packs:
        fullest = max(
            range(len(result)), key=lambda i: (len(result[i]) > 1, sum(map(len, result[i]))), default=-1
        )
        if fullest < 0 or len(result[fullest]) <= 1:
            result.append([])
        else:
            whole = result[fullest]
            result[fullest] = whole[::2]
            result.append(whole[1::2])
    return result


def _longest_first(samples: Sequence[TrainSample]) -> list[TrainSample]:
    return sorted(samples, key=len, reverse=True)
