"""What travels between the driver and the ranks: samples, what is computed of them, shares of an update, reports."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import numpy.typing as npt

from polyturn.agents.sampling_support import SamplingSupport
from polyturn.trainer.algorithms.tokens import GlobalCounts


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class TrainSample:
    """One segment of an episode, as the trainer sees it. All columns have equal length T.

    The logprob columns mean something at sampled tokens only; whatever stands elsewhere changes nothing.
    """

    sample_id: str
    group_id: str
    sequence_id: str
    """What counts once in a reduction by sequence: an episode, or what one role wrote in it, over all its segments."""
    environment: str = ""
    """The environment whose own algorithm it is trained by; empty: by that of all that have none."""
    token_ids: npt.NDArray[np.int32]
    sampled: npt.NDArray[np.bool_]
    """The trainable mask. The first token has nothing before it and is never sampled."""
    behavior_logprobs: npt.NDArray[np.float32]
    """Of the sampler that drew the tokens."""
    policy_versions: npt.NDArray[np.int32]
    """Of the weights that drew a sampled token."""
    turns: npt.NDArray[np.int16]
    """The turn of each token."""
    proximal_logprobs: npt.NDArray[np.float32] | None = None
    """Of the policy at the start of the step."""
    reference_logprobs: npt.NDArray[np.float32] | None = None
    """Of the frozen reference policy."""
    teacher_logprobs: npt.NDArray[np.float32] | None = None
    """Of the teachers, at temperature 1; None where none was asked."""
    advantages: npt.NDArray[np.float32] | None = None
    """None until they have been estimated, and for what is taught rather than reinforced."""
    values: npt.NDArray[np.float32] | None = None
    """What the critic expected before each token, at the start of the step; None without a critic."""
    returns: npt.NDArray[np.float32] | None = None
    """What the critic should have expected."""
    correction_weights: npt.NDArray[np.float32] | None = None
    """What each token's policy loss is multiplied by, 0 for rejected ones; None where nothing is corrected."""
    kl_weights: npt.NDArray[np.float32] | None = None
    """Of |log p - log proximal| of each token in the loss; None where no token is held so."""

    routed_experts: npt.NDArray[np.int16] | None = None
    """[T, layers x experts per token], the engine's choice, -1 where it recorded none. None: the trainer's own."""
    support: SamplingSupport | None = None
    """What each sampled token was drawn from: every logprob of it is over these tokens. None: over the vocabulary."""

    def __post_init__(self) -> None:
        columns = (
            self.token_ids,
            self.sampled,
            self.behavior_logprobs,
            self.policy_versions,
            self.turns,
            self.proximal_logprobs,
            self.reference_logprobs,
            self.teacher_logprobs,
            self.advantages,
            self.values,
            self.returns,
            self.correction_weights,
            self.kl_weights,
        )
        shapes = {column.shape for column in columns if column is not None}
        assert len(shapes) == 1 and len(self.token_ids) > 0, f"{self.sample_id}: columns of shapes {shapes}"
        routing = self.routed_experts
        assert routing is None or len(routing) == len(self.token_ids), (
            f"{self.sample_id}: routing of other tokens"
        )
        assert self.support is None or len(self.support) == len(self.token_ids), (
            f"{self.sample_id}: a support of other tokens"
        )
        assert not self.sampled[0], f"{self.sample_id}: the first token has no context to be sampled from"

    def __len__(self) -> int:
        return len(self.token_ids)

    @property
    def num_trainable(self) -> int:
        return int(self.sampled.sum())


Columns = Mapping[str, npt.NDArray[np.float32]]
"""What a model computed of one sample, by the name of the `TrainSample`'s column: [T], 0 where nothing was sampled."""
UNMOVED = {"policy_kl": 0.0}
"""The policy's metrics of an update that only the critic takes."""
SKIPPED = {**UNMOVED, "skipped": 1.0}
"""The metrics of an update that has nothing to train on: nobody takes it."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Update:
    """One optimizer update: its samples, all or one data-parallel rank's share, with the denominators of the whole."""

    samples: tuple[TrainSample, ...]
    counts: GlobalCounts

    @property
    def is_empty(self) -> bool:
        """Whether no rank has a token to train on."""
        return self.counts.num_tokens == 0


@dataclass(frozen=True, kw_only=True, slots=True)
class UpdateReport:
    """What one data-parallel rank did in a step."""

    metrics: tuple[Mapping[str, float], ...]
    """Per update, reduced over all ranks."""
    trained_tokens: Mapping[str, int]
    """Trainable tokens of each sample that went into an update of this rank."""
    shared_prefix: Mapping[str, float] = field(default_factory=dict)
    """The shares of this rank's work that shared prefixes saved; empty where they are not computed once."""

    @property
    def initial_kl(self) -> float:
        """The policy's KL of the first update that was taken: no weight had changed before it. 0 where none was."""
        return next((update["policy_kl"] for update in self.metrics if update != SKIPPED), 0.0)

    @property
    def num_empty(self) -> int:
        """Updates that nobody took, because there was nothing to train on."""
        return sum(update == SKIPPED for update in self.metrics)


def count_samples(samples: Sequence[TrainSample]) -> GlobalCounts:
    """The denominators of an update of these samples: an episode counts once, whatever its number of segments.

    Where an environment has an algorithm of its own, those of each environment stand beside them.
    """
    environments = list(dict.fromkeys(sample.environment for sample in samples))
    counts = _count(samples)
    if environments in ([], [""]):
        return counts
    of_each = {name: _count([s for s in samples if s.environment == name]) for name in environments}
    return replace(counts, by_environment=of_each)


def _count(samples: Sequence[TrainSample]) -> GlobalCounts:
    return GlobalCounts.of(
        [sample.num_trainable for sample in samples],
        sequence_ids=[sample.sequence_id for sample in samples],
        prompt_ids=[sample.group_id for sample in samples],
    )
