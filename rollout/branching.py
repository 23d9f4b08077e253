"""Which samples of a group branch from others, and where: at random turns, at uncertain ones, or as a plug-in says.

The first samples of a group, its trunks, are played from the start. Each other sample waits for its trunk and is played
from one of its turns on. What is chosen follows from the run's seed, the attempt and the trunk, so a retry and a resume
choose as the first session would.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Protocol, cast

import numpy as np

from polyturn.agents.episode import Episode, derive_seed
from polyturn.agents.forking import Fork, fork_at, fork_turns
from polyturn.configs.schema.branching import EntropyBranching, NoBranching, TurnBranching
from polyturn.configs.schema.rollout import RolloutConfig
from polyturn.envs.plugins import Signature, load_plugin
from polyturn.rollout.player import RolloutError


class BranchChoice(Protocol):
    """Chooses the turn at which a trunk is branched."""

    def __call__(self, trunk: Episode, turns: Sequence[int], number: int, seed: int) -> int | None:
        """One of `turns`, of which there is at least one, or None: the sample is played from the start.

        Args:
            trunk: An episode that has ended.
            number: How many branches are meant to be of this trunk before this one.
            seed: Of this attempt, for what is drawn.
        """
        ...


SIGNATURE = Signature(
    what="branch choice",
    arguments=("trunk", "turns", "number", "seed"),
    text="def choose(trunk: Episode, turns: Sequence[int], number: int, seed: int) -> int | None",
    wrong_results=(str, bytes, float, bool),
)


@dataclass(frozen=True, kw_only=True, slots=True)
class Branching:
    """How the samples of a group hang together."""

    num_trunks: int
    choose: BranchChoice
    seed: int
    """Of the run."""

    def trunks_of(self, sample: int) -> list[int]:
        """The trunks of a sample: its own, and those that take its place where it failed for good. None for a trunk."""
        if sample < self.num_trunks:
            return []
        first = (sample - self.num_trunks) % self.num_trunks
        return [(first + place) % self.num_trunks for place in range(self.num_trunks)]

    def fork(self, trunk: Episode, *, sample: int, attempt: int) -> Fork | None:
        """Where an attempt branches from its trunk; None: it is played from the start.

        Raises:
            RolloutError: a plug-in chose a turn at which the trunk cannot be branched.
        """
        turns = fork_turns(trunk)
        if not turns:
            return None
        number = (sample - self.num_trunks) // self.num_trunks
        seed = derive_seed(self.seed, trunk.group_id, sample, attempt, "branch")
        turn = self.choose(trunk, turns, number, seed)
        if turn is None:
            return None
        if turn not in turns:
            raise RolloutError(
                f"rollout.branching: it chose turn {turn!r} of {trunk.episode_id}, which can be branched at turn 1 to "
                f"{turns[-1]}"
            )
        return fork_at(trunk, turn)


def make_branching(config: RolloutConfig, *, seed: int) -> Branching | None:
    """What the config says; None: every sample is played from the start. Raises `ValueError` for a wrong plug-in."""
    section = config.branching
    if isinstance(section, NoBranching):
        return None
    choose: BranchChoice
    if isinstance(section, TurnBranching):
        choose = at_any_turn
    elif isinstance(section, EntropyBranching):
        choose = partial(at_largest_rise, first_tokens=section.first_tokens, min_rise=section.min_rise)
    else:
        choose = cast(BranchChoice, load_plugin(SIGNATURE, section.target, section.options))
    return Branching(num_trunks=config.num_trunks, choose=choose, seed=seed)


def at_any_turn(trunk: Episode, turns: Sequence[int], number: int, seed: int) -> int:
    """Any turn but the first, all alike: the random nodes that Tree-GRPO expands (arXiv 2509.21240)."""
    del trunk, number
    return int(np.random.default_rng(seed).choice(turns))


def at_largest_rise(
    trunk: Episode,
    turns: Sequence[int],
    number: int,
    seed: int,
    *,
    first_tokens: int,
    min_rise: float | None,
) -> int | None:
    """The turn whose first tokens are the most uncertain beside those of the first turn; the next branch the next one.

    ARPO (arXiv 2507.19849) branches where alpha + beta (H_t - H_0) exceeds tau, H_t being the entropy of the k tokens
    behind a tool's result in turn t, and H_0 that of the first k tokens of all. That is where H_t - H_0 exceeds
    `min_rise` = (tau - alpha) / beta. In place of the entropy, which engines do not tell, stands the mean of -logprob
    over these tokens, whose expectation it is. What no turn is left for is played from the start, as there.
    """
    del seed
    uncertainty = partial(mean_surprisal, trunk, first_tokens=first_tokens)
    rises = {turn: uncertainty(turn) - uncertainty(0) for turn in turns}
    ranked = sorted(
        (turn for turn in turns if min_rise is None or rises[turn] > min_rise),
        key=lambda turn: (-rises[turn], turn),
    )
    return ranked[number % len(ranked)] if ranked else None


def mean_surprisal(episode: Episode, turn: int, *, first_tokens: int) -> float:
    """The mean of -logprob, in nats, over the first tokens that were sampled in a turn."""
    (logprobs,) = [
        segment.logprobs[own]
        for segment in episode.segments
        if (own := segment.sampled & (segment.turns == turn)).any()
    ]
    return -float(logprobs[:first_tokens].mean(dtype=np.float64))


def orphans(survivors: Iterable[Episode | None]) -> set[str]:
    """The ids of branches among a group's episodes whose trunk is not among them.

    So it is where a session went on from journals of which the trunk's record is damaged, or of a trunk that is played
    again: the branch would begin with tokens that nobody trains on.
    """
    found = [episode for episode in survivors if episode is not None]
    known = {episode.episode_id for episode in found}
    return {episode.episode_id for episode in found if episode.is_branch and episode.parent_id not in known}
