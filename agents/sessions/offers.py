"""Episodes that are offered to programs outside: one takes an episode up, plays it through its session, and says what
it was worth, then or as soon as it knows.
"""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import Mapping
from dataclasses import dataclass, field

from polyturn.agents.sessions.requests import RequestRefused, SessionAddress
from polyturn.envs.messages import Message
from polyturn.tools.types import ToolSpec

WAIT_S = 1.0
"""After so long a program may ask again for whom there was no episode."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Worth:
    """What a program says of its episode."""

    reward: float
    metrics: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Offer:
    """An episode that a program may take up."""

    session_id: str
    task_id: str
    messages: tuple[Message, ...]
    tools: tuple[ToolSpec, ...]
    address: SessionAddress
    taken: asyncio.Event = field(default_factory=asyncio.Event)
    worth: asyncio.Future[Worth] = field(default_factory=lambda: asyncio.get_running_loop().create_future())


class Offers:
    """The episodes of an endpoint that wait for a program, first come, first served."""

    def __init__(self) -> None:
        self.key = f"pt-{secrets.token_urlsafe(32)}"
        """What a program needs to take an episode up."""
        self._open: dict[str, Offer] = {}

    def add(self, offer: Offer) -> None:
        """Offer an episode."""
        assert offer.session_id not in self._open, f"session {offer.session_id!r} is offered already"
        self._open[offer.session_id] = offer

    def withdraw(self, session_id: str) -> None:
        """Offer an episode no longer, taken or not."""
        self._open.pop(session_id, None)

    def take(self) -> Offer:
        """The episode that waits longest.

        Raises:
            RequestRefused: none waits: the run has as many under way as its engines or its staleness allow.
        """
        for offer in self._open.values():
            if not offer.taken.is_set():
                offer.taken.set()
                return offer
        raise RequestRefused("no episode waits to be played", status=429, retry_after_s=WAIT_S)

    def end(self, session_id: str, worth: Worth) -> None:
        """Say what an episode was worth.

        Raises:
            RequestRefused: it is not offered to programs, or was ended before.
        """
        offer = self._open.get(session_id)
        if offer is None or offer.worth.done():
            raise RequestRefused("there is no such episode, or it has ended", status=410)
        offer.worth.set_result(worth)
