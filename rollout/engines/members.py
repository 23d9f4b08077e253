"""What a keeper knows of each engine, and whom it asks: who brings weights, and who plays."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Literal, Protocol

from polyturn.rollout.engines.fleet import Ailment
from polyturn.rollout.engines.launch import Engine
from polyturn.rollout.engines.membership import Membership

HOUR_S = 3600.0
AILING_S = 2.0
"""An engine must have failed for so long, and not only many requests at once."""
State = Literal["starting", "waiting", "behind", "serving", "leaving"]
Loss = Literal["ended", "hung", "failing", "garbled"]


class Weights(Protocol):
    """Where engines get the weights of the run from."""

    def serves(self, url: str) -> bool:
        """Whether an engine that others update says that it has the weights that are asked for.

        Raises `EngineError` where it says nothing.
        """
        ...

    def bring(self, url: str, admit: Callable[[int], None]) -> bool:
        """Have an engine that nobody asks take the weights that the others serve, and admit it with their version.

        `admit` is called while no other version is being published. False: it is for the run's own thread to bring
        them, at its next moment. Raises `EngineError` where the engine does not take them.
        """
        ...


class Players(Protocol):
    """Who asks the engines."""

    def set_engines(self, members: Membership) -> None:
        """From now on these are asked; returns at once."""
        ...

    def ailments(self) -> Mapping[int, Ailment]:
        """By engine, what is the matter with those that failed their last requests."""
        ...

    def num_requests(self) -> Mapping[int, int]:
        """Under way, by engine."""
        ...


@dataclass(eq=False, kw_only=True, slots=True)
class Member:
    """One engine that there is, or is to be again."""

    number: int
    state: State
    engine: Engine | None = None
    url: str = ""
    answered: float = 0.0
    """When it was last seen to answer."""
    asked: float = 0.0
    """When it was last asked."""
    probe: Future[bool] | None = None
    """The question under way."""
    looked: float = 0.0
    ended: Future[str | None] | None = None
    """The look under way at whether its process has ended; that may be on a node that does not answer."""
    ailing_since: float | None = None
    since: float = 0.0
    """When it came into this state."""
    lost: Loss | None = None
    """How the one went that it replaces."""
    lost_at: float = 0.0
    """When that one was last seen to answer."""
    num_failed: int = 0
    """Starts in a row."""
    starting: Future[Engine] | None = None
    version: int | None = None
    is_outdated: bool = False
    """It was seen to serve another version than is asked for."""

    def is_ailing(self, ailment: Ailment | None, now: float, *, faults_in_a_row: int) -> bool:
        """Whether so many requests have failed, for a while and not only all at once."""
        if ailment is None or ailment.num_faults < faults_in_a_row:
            self.ailing_since = None
            return False
        if self.ailing_since is None:
            self.ailing_since = now
        return now - self.ailing_since >= AILING_S


@dataclass(kw_only=True, slots=True)
class Losses:
    """When engines were lost within the last hour."""

    limit: int | None
    times: deque[float] = field(default_factory=deque)

    def note(self, now: float) -> bool:
        """One more; whether that is too many."""
        self.times.append(now)
        while self.times[0] < now - HOUR_S:
            self.times.popleft()
        return self.limit is not None and len(self.times) > self.limit
