"""Episodes that branch from others: what is taken over from a trunk, and how its environment is rebuilt.

A branch begins at a turn of its trunk. The environment is reset with the trunk's seed and task, and the trunk's
answers, read from its tokens as they were read then, are stepped again; that costs no policy time. What is said until
then must be what was said then, else the environment cannot be rebuilt. The branch's ledger begins with the trunk's
tokens, none of them sampled: they are trained on in the trunk.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from polyturn.agents.chat import ChatRenderer
from polyturn.agents.deadlines import EpisodeTime
from polyturn.agents.dialects import Dialect
from polyturn.agents.environment_driver import EnvironmentDriver
from polyturn.agents.episode import Episode, Outcome
from polyturn.agents.episode_record import EpisodeRecord, Stop, observation_digest
from polyturn.agents.ledger import Segment
from polyturn.envs.messages import Observation
from polyturn.tools.tool import OutOfTime
from polyturn.tools.types import ToolSpec

BRANCH_REFUSED = "branch_refused"
"""Stop reason of an attempt whose environment could not be rebuilt: it is played from the start."""
NOT_REBUILT = Stop(
    Outcome.FAILED,
    BRANCH_REFUSED,
    "the environment did not answer the trunk's actions as it did before, so nothing can branch from them",
)


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Fork:
    """Where an episode branches from another, and how to come there."""

    parent_id: str
    """The trunk's id."""
    turn: int
    """The first turn that the branch samples itself, 1 or more."""
    seed: int
    """Of the trunk's environment."""
    answers: tuple[npt.NDArray[np.int32], ...]
    """The tokens of each turn before that, as they were sampled."""
    prefix: Segment
    """What the ledger held behind the last of them."""
    heard: str
    """The digest of all that was said until then."""


def fork_turns(trunk: Episode) -> tuple[int, ...]:
    """The turns at which an episode can be branched, all but the first; none for one that is a branch itself.

    Nor has one with several roles any, for its turns are not those of one ledger, or one that did not sample them all.
    """
    if trunk.is_branch or any(segment.role for segment in trunk.segments):
        return ()
    sampled = {int(turn) for segment in trunk.segments for turn in np.unique(segment.turns[segment.sampled])}
    return tuple(range(1, trunk.num_turns)) if sampled == set(range(trunk.num_turns)) else ()


def fork_at(trunk: Episode, turn: int) -> Fork:
    """The fork at one of the trunk's `fork_turns`."""
    assert turn in fork_turns(trunk), f"{trunk.episode_id} cannot be branched at turn {turn}"
    spoken = [place for place, message in enumerate(trunk.messages) if message["role"] == "assistant"]
    # A prompt may hold answers, too: what the trunk said itself are the last ones.
    said_next = spoken[len(spoken) - trunk.num_turns + turn]
    return Fork(
        parent_id=trunk.episode_id,
        turn=turn,
        seed=trunk.seed,
        answers=tuple(_answer(trunk, before) for before in range(turn)),
        prefix=_prefix(trunk, turn),
        heard=observation_digest(trunk.messages[:said_next]),
    )


def _answer(trunk: Episode, turn: int) -> npt.NDArray[np.int32]:
    """The tokens that were sampled in a turn; one segment has them all."""
    (tokens,) = [
        segment.token_ids[own]
        for segment in trunk.segments
        if (own := segment.sampled & (segment.turns == turn)).any()
    ]
    return tokens


def _prefix(trunk: Episode, turn: int) -> Segment:
    """The newest segment of the trunk's ledger as it was before it was told what it answered in `turn`."""
    for segment in trunk.segments:
        own = np.flatnonzero(segment.sampled & (segment.turns == turn - 1))
        if len(own):
            end = int(own[-1]) + 1
            routing = segment.routed_experts
            return Segment(
                token_ids=segment.token_ids[:end],
                sampled=segment.sampled[:end],
                logprobs=segment.logprobs[:end],
                policy_versions=segment.policy_versions[:end],
                turns=segment.turns[:end],
                routed_experts=None if routing is None else routing[:end],
            )
    raise AssertionError(f"{trunk.episode_id} sampled nothing in turn {turn - 1}")


async def rebuild(
    fork: Fork,
    observation: Observation,
    *,
    driver: EnvironmentDriver,
    record: EpisodeRecord,
    renderer: ChatRenderer,
    dialect: Dialect,
    tools: Sequence[ToolSpec],
    clock: EpisodeTime,
) -> Observation | None:
    """Step the trunk's answers again, from the reset's `observation` on; all of it is recorded.

    Returns what the trunk was told before its turn `fork.turn`, or None where that is not what is said now.
    """
    for turn, answer in enumerate(fork.answers):
        in_thought = renderer.opens_thought(observation, is_first=turn == 0)
        parsed = dialect.parse(renderer.decode(answer), in_thought=in_thought, tools=tools)
        action = renderer.with_call_ids(parsed, record.num_tool_calls)
        record.add_action(action)
        try:
            stepped = await driver.step(action)
        except OutOfTime:
            return None
        clock.spent_s = 0.0
        observation, stop = record.add_step(*stepped, clock=clock)
        if stop is not None:
            return None
    is_same = not record.role and observation_digest(tuple(record.messages)) == fork.heard
    return observation if is_same else None
