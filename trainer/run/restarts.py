"""A run whose trainer dies: all ranks are started again, and the run goes on from its newest checkpoint.

    steps -> a rank dies -> all ranks start anew -> the newest checkpoint -> steps
                                 |
                                 v
                   the run ends, after too many in a row

The engines stay up and go on with what is in play; they get the weights of the checkpoint afterwards. What was played
stands in the journal, so that a step is trained again on the episodes that it was trained on.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import closing

from ray.exceptions import RayActorError, RayError

from polyturn.configs.errors import Interrupted, RunFailure
from polyturn.trainer.checkpoints.manifest import CheckpointError
from polyturn.trainer.run.directory import RunState
from polyturn.trainer.run.failures import sentence_of
from polyturn.trainer.run.loop import RunParts, TrainingLoop

BEGINNING = RunState(step=0, policy_version=0, prompt_position=0)


def take_all_steps(parts: RunParts, state: RunState, connect: Callable[[], None]) -> None:
    """Take the run's steps from `state` on, over as many deaths of the trainer as its config allows.

    Args:
        connect: has the trainer join the engines.

    Raises:
        RunFailure: a rank died once too often.
    """
    restarts = TrainerRestarts(parts, connect)
    while True:
        with closing(TrainingLoop(parts, state, num_restarts=restarts.num)) as loop:
            try:
                loop.run()
            except (Interrupted, RunFailure):
                raise
            except (RayError, RuntimeError) as failure:
                state = restarts.restart(failure)
                loop.abandon()
            else:
                return


def newest_state(parts: RunParts) -> RunState | None:
    """Load the newest sound checkpoint into the ranks; where it stands, None where there is none.

    Raises:
        CheckpointError: there are some, and none is sound.
    """
    try:
        found = parts.directory.sound_checkpoint(
            parts.trainer.find_checkpoint_faults, lambda text: parts.progress.message(f"warning: {text}")
        )
    except ValueError as error:
        raise CheckpointError(str(error)) from error
    if found is None:
        return None
    checkpoint, state = found
    parts.trainer.load_checkpoint(checkpoint)
    return state


class TrainerRestarts:
    """Starts the trainer of a run again, and counts how often."""

    def __init__(self, parts: RunParts, connect: Callable[[], None]) -> None:
        self._parts = parts
        self._connect = connect
        self.num = 0
        """In this session."""
        self._in_a_row = 0
        """Since there was a new checkpoint."""
        self._newest_step = 0

    def restart(self, failure: RayError | RuntimeError) -> RunState:
        """Start the ranks again and load the newest checkpoint; where the run goes on.

        Raises:
            RunFailure: they died more often in a row than `trainer.max_restarts` allows.
            RayError, RuntimeError: `failure` itself, if it does not come from the death of a rank, or what another
                attempt ended with that does not.
        """
        parts = self._parts
        while True:
            death = parts.trainer.death_behind(failure)
            if death is None:
                raise failure
            self._count(death)
            started = time.perf_counter()
            try:
                if parts.turns is not None:
                    parts.turns.to_new_trainer(parts.stopwatch)
                with parts.stopwatch.measure("restart"):
                    parts.trainer.restart()
                    state = newest_state(parts) or BEGINNING
                    self._connect()
            except (RayError, RuntimeError) as another:
                failure = another
                continue
            parts.progress.message(
                f"the trainer is back after {time.perf_counter() - started:.1f} s, and goes on after step {state.step}"
            )
            return state

    def _count(self, death: RayActorError) -> None:
        steps, most = self._parts.directory.complete_steps(), self._parts.config.trainer.max_restarts
        if steps and steps[-1] > self._newest_step:
            self._newest_step, self._in_a_row = steps[-1], 0
        how = sentence_of(death)
        if self._in_a_row >= most:
            before = f", after {most} restarts of the trainer without a new checkpoint" if most else ""
            raise RunFailure(f"{how}{before} (trainer.max_restarts={most})") from death
        self.num += 1
        self._in_a_row += 1
        self._parts.progress.message(
            f"{how}: all ranks of the trainer are started again ({self._in_a_row} of at most {most} times in a row); "
            "the engines stay up, and what was played is kept"
        )
