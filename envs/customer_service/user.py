"""The customer at the other end: scripted, or played by a language model."""

from __future__ import annotations

import re
from typing import Protocol

from polyturn.envs.customer_service.scenarios import Fact, Request, Scenario

MAX_UNHELPFUL = 3
"""The scripted customer leaves after so many messages that lead nowhere."""

# What a question is after. The order matters: "new email address" is no question for a street.
_ASKS: tuple[tuple[Fact, re.Pattern[str]], ...] = (
    (
        "new_email",
        re.compile(
            r"\bnew (e-?mail|address)|\bwhich (e-?mail|address)\b[^\n]{0,200}\binstead", re.IGNORECASE
        ),
    ),
    ("email", re.compile(r"\be-?mail", re.IGNORECASE)),
    ("name", re.compile(r"\b(your|full) name\b", re.IGNORECASE)),
    ("postcode", re.compile(r"\b(post ?code|zip)", re.IGNORECASE)),
    ("order", re.compile(r"\border (id|number)|\bwhich order\b", re.IGNORECASE)),
    (
        "variant",
        re.compile(r"\b(which|what) (variant|option|size|colou?r|length|one would you)", re.IGNORECASE),
    ),
    ("items", re.compile(r"\b(which|what) (item|product|of the items)", re.IGNORECASE)),
    ("reason", re.compile(r"\b(reason|why)\b", re.IGNORECASE)),
    (
        "refund",
        re.compile(
            r"\brefund(ed)?\b[^\n]{0,200}\?|\bgift card\b[^\n]{0,200}\?|\bpayment method\b", re.IGNORECASE
        ),
    ),
    ("address", re.compile(r"\baddress\b", re.IGNORECASE)),
)
_IDENTITY = re.compile(r"\b(verify|identify|identity|authenticate|who (you are|am I))\b", re.IGNORECASE)
_CONFIRM = re.compile(
    r"\b(confirm|shall I|should I|do you want me|would you like me|go ahead|proceed"
    r"|is that (ok|okay|right|correct|all right))\b",
    re.IGNORECASE,
)
_DONE = re.compile(
    r"\b(anything else|has been|have been|I have|I've|is done|all set"
    r"|cannot|can't|can not|unable|not possible|too late|sorry)\b",
    re.IGNORECASE,
)


class UserSimulator(Protocol):
    """A customer in one conversation."""

    def opening(self) -> str:
        """What the customer says first."""
        ...

    def reply(self, message: str) -> str | None:
        """The answer to the agent; None when the customer leaves."""
        ...


class ScriptedUser:
    """Answers what is asked, confirms what is proposed, and says the next request when the last one is settled.

    Deterministic: the same messages get the same answers.
    """

    def __init__(self, scenario: Scenario) -> None:
        self._scenario = scenario
        self._current = 0
        self._said: set[Fact] = set()
        self._num_unhelpful = 0

    def opening(self) -> str:
        """The first request."""
        return f"Hello. {self._request.opening}"

    def reply(self, message: str) -> str | None:
        """The answer to the agent; None when all requests are settled, or the customer has had enough."""
        asked = self._asked(message) if "?" in message else []
        if "anything else" in message.lower():
            return self._next_request()
        if asked:
            self._said.update(asked)
            return self._within_patience(" ".join(self._facts[fact] for fact in asked), helpful=True)
        if "?" in message and _CONFIRM.search(message):
            return self._within_patience("Yes, please go ahead.", helpful=True)
        if _DONE.search(message):
            return self._next_request()
        return self._volunteer()

    @property
    def _request(self) -> Request:
        return self._scenario.requests[self._current]

    @property
    def _facts(self) -> dict[Fact, str]:
        return {**self._scenario.identity, **self._request.facts}

    def _asked(self, message: str) -> list[Fact]:
        """The facts that the message asks for and the customer has."""
        facts = self._facts
        found: list[Fact] = [
            fact
            for fact, pattern in _ASKS
            if fact in facts and pattern.search(message) and fact not in self._said
        ]
        if "new_email" in found and "email" in found and not _IDENTITY.search(message):
            found.remove("email")
        if not found and _IDENTITY.search(message):
            found = ["email"]
        return found

    def _volunteer(self) -> str | None:
        """What the customer adds to a message that neither asks nor settles anything."""
        unsaid = [fact for fact in self._facts if fact not in self._said]
        self._said.update(unsaid)
        text = " ".join(self._facts[fact] for fact in unsaid) if unsaid else "I do not see how that helps me."
        return self._within_patience(text, helpful=False)

    def _within_patience(self, text: str, *, helpful: bool) -> str | None:
        self._num_unhelpful = 0 if helpful else self._num_unhelpful + 1
        return text if self._num_unhelpful < MAX_UNHELPFUL else None

    def _next_request(self) -> str | None:
        if self._current + 1 == len(self._scenario.requests):
            return None
        self._current += 1
        self._said -= set(self._request.facts)
        self._num_unhelpful = 0
        return f"There is something else. {self._request.opening}"
