"""Which engines a run has at one moment."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Self


@dataclass(frozen=True, kw_only=True, slots=True)
class Membership:
    """The engines that hold the weights of their run, by their numbers.

    A number is never given again but to what replaces its engine, at another address.
    """

    serving: Mapping[int, str]
    """Addresses of those that requests go to."""
    leaving: Mapping[int, str] = field(default_factory=dict)
    """Addresses of those that end what is under way, and begin nothing more."""

    @classmethod
    def of(cls, urls: Sequence[str]) -> Self:
        """All of them serve."""
        return cls(serving=dict(enumerate(urls)))

    @property
    def urls(self) -> dict[int, str]:
        """Of all, in the order of their numbers."""
        return dict(sorted({**self.serving, **self.leaving}.items()))
