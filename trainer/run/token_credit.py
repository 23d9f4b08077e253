"""What a step made of its tokens, kept beside its trajectories for people who look at them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt

from polyturn.agents.episode import Episode
from polyturn.rollout.token_credit import TokenCredit, write_token_credit
from polyturn.trainer.credit.estimates import StepCredit
from polyturn.trainer.data.samples import TrainSample


def keep_token_credit(path: Path, episodes: Sequence[Episode], credit: StepCredit) -> None:
    """Write the file of a step. Raises `OSError` where the disk does not take it; nothing of it is left then."""
    write_token_credit(path, _rows(episodes, credit))


def _rows(episodes: Sequence[Episode], credit: StepCredit) -> Iterator[tuple[str, int, TokenCredit]]:
    of_id = {episode.episode_id: episode for episode in episodes}
    for sample in credit.samples:
        episode_id, _, number = sample.sample_id.rpartition("/")
        segment = of_id[episode_id].segments[int(number)]
        yield (
            episode_id,
            int(number),
            _of_sample(sample, segment.sampled, credit.bounded.get(sample.sample_id)),
        )


def _of_sample(
    sample: TrainSample, sampled: npt.NDArray[np.bool_], bounded: npt.NDArray[np.bool_] | None
) -> TokenCredit:
    """The columns at the segment's sampled tokens, some of which the sample may not be trained on."""

    def at_sampled(column: npt.NDArray[np.float32] | None) -> npt.NDArray[np.float32] | None:
        return None if column is None else column[sampled].astype(np.float32)

    return TokenCredit(
        proximal_logprobs=at_sampled(sample.proximal_logprobs),
        reference_logprobs=at_sampled(sample.reference_logprobs),
        advantages=at_sampled(sample.advantages),
        correction_weights=at_sampled(sample.correction_weights),
        clipped=None if bounded is None else bounded[sampled],
    )
