"""New weights to the running engines: one interface for every way that they go (`docs/weight_sync.md`)."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from torch import Tensor


class WeightSyncError(RuntimeError):
    """Engines refused or missed a weight update: none of `failures` serves the version that was being published."""

    def __init__(self, message: str, *, failures: Mapping[str, str] | None = None) -> None:
        """`failures`: what each engine that failed last answered, by its URL."""
        super().__init__(message)
        self.failures = dict(failures or {})

    def __reduce__(self) -> tuple[Any, ...]:
        return _rebuild_error, (str(self), self.failures)


def _rebuild_error(message: str, failures: Mapping[str, str]) -> WeightSyncError:
    return WeightSyncError(message, failures=failures)


@dataclass(frozen=True, kw_only=True, slots=True)
class SyncReport:
    """One update of the engines' weights."""

    version: int
    num_tensors: int
    num_bytes: int
    """Of what was sent."""
    seconds: float
    """That gathering, sending and loading took, in both phases together."""
    pause_seconds: float
    """Of these, how long engines could not generate: the second phase, and whatever is done before they go on."""
    checksums: Mapping[str, str]
    """Of what was sent, by the name and in the form in which an engine reports it (`EngineChecksums`)."""
    served: Mapping[str, Mapping[str, str]] = field(default_factory=dict)
    """The same of what each engine then had, by its URL, where the publisher has asked; else there are none."""
    directory: Path | None = None
    """A Hugging Face directory that has all of this version until the next one is published; None: there is none."""
    adapter_correlation: float | None = None
    """Between what LoRA adds and what rounding the merged weights left of it; None: nothing was added."""


class WeightPublisher(Protocol):
    """Sends the trainer's weights to the engines, in two phases. Used by the trainer's rank 0 alone.

    After a `WeightSyncError` the engines that it names serve nothing that may be used, and the others serve the version
    before, or say that they are in the middle of an update. `set_engines` without the failed ones, then both phases
    again with the same version, make them whole.
    """

    def set_engines(self, urls: Sequence[str]) -> None:
        """From now on publish to these engines: some died, came, or were replaced.

        Raises `WeightSyncError` when one of them cannot be reached.
        """
        ...

    def prepare(self, named_tensors: Iterable[tuple[str, Tensor]], *, version: int) -> None:
        """While the engines serve, do all that can be done before they have to stop.

        Args:
            named_tensors: every tensor under its Hugging Face name, whole. A publisher may go through it here or in
                `activate`; whatever it leaves, its caller goes through.
        """
        ...

    def activate(self) -> SyncReport:
        """While no request goes on, have every engine take what was prepared, and stamp it with its version at the end.

        Raises `WeightSyncError` when an engine does not take the update, or does not say that it serves the version.
        """
        ...

    def close(self) -> None:
        """Leave what was joined; the engines go on serving."""
        ...
