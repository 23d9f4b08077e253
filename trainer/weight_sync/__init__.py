"""New weights to the running engines: one interface, by process-group broadcast or through disk."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from torch import Tensor


class WeightSyncError(RuntimeError):
    """An engine refused or missed a weight update."""


@dataclass(frozen=True, kw_only=True, slots=True)
class SyncReport:
    """One update of the engines' weights."""

    version: int
    num_tensors: int
    num_bytes: int
    seconds: float
    checksums: Mapping[str, str]
    """Of what was sent, by the name and in the form in which an engine reports it (`EngineChecksums`)."""
    adapter_correlation: float | None = None
    """Between what LoRA adds and what rounding the merged weights left of it; None: nothing was added."""


class WeightPublisher(Protocol):
    """Sends the trainer's weights to the engines. Used by the trainer's rank 0 alone."""

    def publish(self, named_tensors: Iterable[tuple[str, Tensor]], *, version: int) -> SyncReport:
        """Send every tensor (Hugging Face name, full shape) and stamp the engines with `version`.

        Raises `WeightSyncError` when an engine does not take the update.
        """
        ...

    def close(self) -> None:
        """Leave what was joined; the engines go on serving."""
        ...
