"""Who has the GPUs that engines and trainer share: each has its turn, and never are both states there at once.

    engines' turn   -> release: the engines are emptied and give up KV and weights
                    -> reload: the ranks take weights, gradients and the optimizer's state back
    trainer's turn  -> offload: gradients are dropped, the optimizer's state goes to the hosts' memory
                    -> resume: the engines take the memory of their weights back
    both            -> the weights are sent: theirs and the trainer's are there, and nothing else
                    -> offload: the trainer's weights go to the hosts' memory
                    -> resume: the engines take the memory of their KV back, and go on
    engines' turn

The words are those of the phases in a step's row of metrics (`seconds/release`, ...). On a CPU the same calls are made
of the same processes, and only no memory is spared.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Literal

from polyturn.rollout.engines.memory import EngineMemory
from polyturn.trainer.ranks.trainer import Trainer
from polyturn.trainer.run.stopwatch import Stopwatch

if TYPE_CHECKING:
    from polyturn.trainer.megatron.offload import StatePart


class Turns:
    """Hands the GPUs of a run from one side to the other. A side that has them already is not asked for anything.

    A failure on the way leaves them with nobody; either side can then be given them, for what has been done is not done
    again.
    """

    def __init__(self, engines: EngineMemory, trainer: Trainer, *, timeout_s: float) -> None:
        """It is the trainer's turn.

        Args:
            timeout_s: for each phase; whoever is not done by then is named.
        """
        self._engines = engines
        self._trainer = trainer
        self._timeout_s = timeout_s
        self._holder: Literal["engines", "trainer"] | None = "trainer"
        self.offloaded_bytes = 0
        """Of the rank that has most, in its host's memory during the engines' turn."""

    @property
    def are_engines_on(self) -> bool:
        """Whether the engines can answer."""
        return self._holder == "engines"

    def to_trainer(self, watch: Stopwatch) -> None:
        """Nobody may send the engines anything new from before this call until they have their turn again.

        Raises:
            EngineError: an engine did not give its memory up.
            RunFailure: a rank did not take its own back.
        """
        if self._holder == "trainer":
            return
        self._holder = None
        with watch.measure("release"):
            self._engines.release()
        with watch.measure("reload"):
            self._trainer.reload(timeout_s=self._timeout_s)
        self._holder = "trainer"

    def to_new_trainer(self, watch: Stopwatch) -> None:
        """As `to_trainer`, whose ranks have died, and are to be started again."""
        self._holder = None
        with watch.measure("release"):
            self._engines.give_up_weight_updates()
            self._engines.release()
        self._holder = "trainer"

    @contextmanager
    def to_engines(
        self, watch: Stopwatch, *, prepare: Callable[[], None], sends_late: bool
    ) -> Iterator[None]:
        """In the block the engines have the memory of their weights, and are to be given these.

        Raises as `to_trainer`.

        Args:
            prepare: Of the weights what can be done before.
            sends_late: Whether the trainer's weights are still needed after that, in the block.
        """
        self._holder = None
        num_bytes = self._offload("training", watch)
        with watch.measure("sync"):
            prepare()
        if not sends_late:
            num_bytes += self._offload("weights", watch)
        with watch.measure("resume"):
            self._engines.resume_weights()
        yield
        num_bytes += self._offload("weights", watch)
        with watch.measure("resume"):
            self._engines.resume_cache()
        self._holder = "engines"
        self.offloaded_bytes = num_bytes

    def _offload(self, part: StatePart, watch: Stopwatch) -> int:
        with watch.measure("offload"):
            return self._trainer.offload(part, timeout_s=self._timeout_s)
