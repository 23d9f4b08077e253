"""What a simulated user is, and what it is told.

A user hears what an agent says to it, and nothing else; it alone ends the talk. An environment plays it through a
`WatchedUser`, which sees to both.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from types import NoneType
from typing import Any, Protocol

from polyturn.envs.plugins import Signature, make_part


@dataclass(frozen=True, kw_only=True, slots=True)
class Briefing:
    """What a user is told before a talk, and nobody else. Nothing in it says what the agent is graded by."""

    role: str
    """Whom it plays, as in `You play ...`."""
    requests: tuple[str, ...]
    """What it wants, in its own words and in this order."""
    facts: tuple[str, ...] = ()
    """Sentences that it says when it is asked."""
    values: tuple[re.Pattern[str], ...] = ()
    """What its values look like, such as email addresses: one of a message is in the briefing, or the agent said it.
    They are searched for in what a model wrote: in time linear in its length."""
    topics: tuple[tuple[str, ...], ...] = ()
    """For each request texts of which one has been said, by whomever, once the request was talked about."""
    greeting: str = "Hello, how can I help you?"
    """What a user that is played by a model is asked for its first message with."""


class User(Protocol):
    """A user in one talk.

    One that has `again() -> str | None` is asked for another message where its last one may not be said. One with a
    true attribute `may_lose_patience` may leave before its requests are settled.
    """

    def opening(self) -> str:
        """The first message."""
        ...

    def reply(self, message: str) -> str | None:
        """The answer to what the agent said; None when the user leaves. Raises `UserFault` when it cannot speak."""
        ...


_NO_TEXT = (bytes, float, int, bool, list, tuple, dict)
METHODS: Mapping[str, Signature] = {
    "opening": Signature(
        what="opening of a user",
        arguments=(),
        text="def opening(self) -> str",
        wrong_results=(*_NO_TEXT, NoneType),
    ),
    "reply": Signature(
        what="reply of a user",
        arguments=("message",),
        text="def reply(self, message: str) -> str | None",
        wrong_results=_NO_TEXT,
    ),
}


def load_user(target: str, briefing: Briefing, options: Mapping[str, Any]) -> User:
    """A user of the class that `module:name` or `path/to/file.py:name` names, made as `Class(briefing, **options)`.

    Raises `ValueError` where there is none, or one of its methods cannot be called as it must.
    """
    user: User = make_part(METHODS, target, briefing, options=options)
    return user
