"""What stands behind an embedded sandbox: a connection, a place in the nursery, a cgroup."""

from __future__ import annotations

import contextlib
import threading
import weakref
from typing import Any

from polyturn.tools.sandbox.embedded.cgroups import Cgroup
from polyturn.tools.sandbox.embedded.link import Link
from polyturn.tools.sandbox.embedded.nursery import Nursery, NurseryGone
from polyturn.tools.sandbox.runner_sandbox import LinkEnded


class NurseryRoom:
    """A running sandbox of a nursery. `close` may come from any thread; it ends an `ask` that waits in another."""

    def __init__(self, nursery: Nursery, number: int, link: Link, cgroup: Cgroup | None) -> None:
        self._nursery = nursery
        self._number = number
        self._link = link
        self._cgroup = cgroup
        self._state = threading.Lock()
        self._asking = threading.Lock()
        self._closed = False
        self.dropped: weakref.finalize[Any, Any] | None = None
        """What is done where nobody closes it."""

    def ask(
        self, question: dict[str, Any], body: bytes = b"", *, within_s: float, max_body_bytes: int
    ) -> tuple[dict[str, Any], bytes]:
        """Asks the runner. Raises LinkEnded."""
        with self._asking:
            if self._closed:
                raise LinkEnded("the sandbox has ended")
            return self._link.ask(question, body, within_s=within_s, max_body_bytes=max_body_bytes)

    def ran_out_of_memory(self, mark: float) -> bool:
        """See `Room`."""
        return self.memory_mark() > mark

    def memory_mark(self) -> float:
        """How many processes the kernel has killed for want of memory; 0 where no cgroup counts them."""
        if self._cgroup is None or self._closed:
            return 0
        try:
            return self._cgroup.num_oom_kills()
        except FileNotFoundError:
            return 0  # closed meanwhile, by another thread

    def alive(self) -> bool:
        """Whether the runner is there."""
        if self._closed:
            return False
        if self._asking.locked():
            return True
        return self._link.is_open()

    def close(self) -> None:
        """Kills everything inside and frees the rest; again is harmless."""
        with self._state:
            if self._closed:
                return
            self._closed = True
        if self.dropped is not None:
            self.dropped.detach()
        with contextlib.suppress(NurseryGone):  # and with it the sandbox
            self._nursery.kill(self._number)
        with self._asking:  # which ends now
            self._link.close()
        if self._cgroup is not None:
            self._cgroup.close()
