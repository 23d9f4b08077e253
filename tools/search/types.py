"""What every search backend has in common: hits, the protocol, and the two ways in which a search can fail."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol


@dataclass(frozen=True, kw_only=True, slots=True)
class Hit:
    """One result."""

    passage_id: str
    title: str
    text: str
    score: float


class Retriever(Protocol):
    """Finds passages. Safe in several threads at once."""

    def search(self, query: str, top_k: int) -> Sequence[Hit]:
        """At most `top_k` hits, best first; empty only when nothing matches.

        Raises:
            SearchFailed: this search could not be answered.
            SearchUnavailable: no search can be answered.
        """
        ...


class AsyncRetriever(Retriever, Protocol):
    """A retriever that waits for something else, and can be awaited in any event loop."""

    async def search_async(self, query: str, top_k: int) -> Sequence[Hit]:
        """As `search`."""
        ...


class SearchFailed(RuntimeError):
    """One search failed while others may go well: it took too long, or the backend refused this query."""


class SearchUnavailable(RuntimeError):
    """The backend is down: infrastructure, and never a result."""
