"""Samples as the trainer sees them, of a few tokens."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt

from polyturn.agents.episode import Episode, Outcome
from polyturn.agents.ledger import Segment
from polyturn.agents.sampling_support import SamplingSupport
from polyturn.trainer.credit.estimates import make_samples
from polyturn.trainer.data.samples import TrainSample


def make_sample(token_ids: npt.ArrayLike, *, name: str = "s", **fields: Any) -> TrainSample:
    """All tokens but the first were sampled, by the first weights in the first turn, unless `fields` say otherwise."""
    ids = np.asarray(token_ids, dtype=np.int32)
    length = len(ids)
    made: dict[str, Any] = {
        "sample_id": name,
        "group_id": "g",
        "sequence_id": name,
        "token_ids": ids,
        "sampled": np.arange(length) > 0,
        "behavior_logprobs": np.zeros(length, dtype=np.float32),
        "policy_versions": np.zeros(length, dtype=np.int32),
        "turns": np.zeros(length, dtype=np.int16),
    }
    return TrainSample(**made | fields)


def sample_of(segment: Segment) -> TrainSample:
    """The sample `e/0` that is made of an episode of one segment."""
    episode = Episode(
        episode_id="e",
        group_id="g",
        env_id="tests/Any-v0",
        task_id="t",
        seed=0,
        outcome=Outcome.COMPLETED,
        stop_reason="terminated",
        reward=1.0,
        num_turns=int(segment.turns[-1]) + 1,
        segments=(segment,),
    )
    (sample,) = make_samples([episode])
    return sample


def random_samples(lengths: Sequence[int], *, seed: int = 0, vocab_size: int = 301) -> list[TrainSample]:
    """Pairs of one group, with about half of their tokens trainable."""
    rng = np.random.default_rng(seed)
    samples = []
    for i, length in enumerate(lengths):
        sampled = rng.random(length) < 0.5
        sampled[0], sampled[-1] = False, True
        samples.append(
            make_sample(
                rng.integers(0, vocab_size, length),
                name=f"sample-{i}",
                group_id=f"group-{i // 2}",
                sampled=sampled,
                behavior_logprobs=rng.normal(-5, 0.3, length).astype(np.float32),
                advantages=np.full(length, rng.normal(), dtype=np.float32),
            )
        )
    return samples


def with_supports(
    samples: Sequence[TrainSample], *, seed: int = 0, vocab_size: int = 301
) -> list[TrainSample]:
    """The samples with what their sampled tokens were drawn from: 1 to 19 others beside each, or now and then all."""
    rng = np.random.default_rng(seed)
    found = []
    for sample in samples:
        rows = [
            np.zeros(0, dtype=np.int64)
            if not sampled or rng.random() < 0.2
            else rng.permutation(
                np.union1d(rng.choice(vocab_size, rng.integers(1, 20), replace=False), token)
            )
            for token, sampled in zip(sample.token_ids, sample.sampled, strict=True)
        ]
        support = SamplingSupport(sizes=np.array([len(row) for row in rows]), token_ids=np.concatenate(rows))
        found.append(replace(sample, support=support))
    return found
