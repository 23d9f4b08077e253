"""Keeps code that draws from Python's and NumPy's global generators from disturbing everybody else."""

from __future__ import annotations

import contextlib
import random
import threading
from collections.abc import Iterator

import numpy as np

_lock = threading.RLock()
"""The global generators are one per process, so code that draws from them takes turns."""

PATIENCE_S = 120.0


class OwnRandomness:
    """A private state of the global generators, for one episode of an environment that uses them.

    Inside `active()` the global generators continue this state; afterwards they are as they were. So an episode draws
    the same numbers whatever runs beside it, and nothing else notices that it drew any. Threads take turns.
    """

    def __init__(self, seed: int) -> None:
        """
        Args:
            seed: Non-negative; only its lowest 32 bits reach NumPy's generator.
        """
        self._python = random.Random(seed).getstate()
        self._numpy = np.random.RandomState(seed % 2**32).get_state()

    @contextlib.contextmanager
    def active(self) -> Iterator[None]:
        """Let the global generators continue this state until the end of the block.

        Raises:
            RuntimeError: another thread has been drawing for more than `PATIENCE_S`: it hangs.
        """
        if not _lock.acquire(timeout=PATIENCE_S):
            raise RuntimeError(
                "another episode hangs and holds the global random generators; restart this process"
            )
        try:
            python, numpy = random.getstate(), np.random.get_state()
            random.setstate(self._python)
            np.random.set_state(self._numpy)
            try:
                yield
            finally:
                self._python, self._numpy = random.getstate(), np.random.get_state()
                random.setstate(python)
                np.random.set_state(numpy)
        finally:
            _lock.release()
