"""The dozen curves to look at first: one list for every dashboard, for the viewer, and for statistics on a terminal."""

from __future__ import annotations

import fnmatch
from collections.abc import Iterable, Mapping
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True, slots=True)
class Curve:
    """A chart of the overview."""

    title: str
    names: tuple[str, ...]
    """Metrics of one unit that it shows, those that a run has; `*` stands for anything."""
    better: str = ""
    """`up` or `down`, where that can be said."""

    def names_in(self, row: Iterable[str]) -> list[str]:
        """Its metrics among names, in its order."""
        known = list(row)
        return list(dict.fromkeys(name for pattern in self.names for name in fnmatch.filter(known, pattern)))


OVERVIEW: tuple[Curve, ...] = (
    Curve(title="Reward", names=("reward/mean", "success/mean"), better="up"),
    Curve(title="Held-out score", names=("heldout/mean", "heldout/*/mean"), better="up"),
    Curve(title="KL and mismatch", names=("offpolicy/kl", "train/policy_kl", "train/reference_kl")),
    Curve(title="Entropy", names=("train/entropy",)),
    Curve(
        title="Tokens per second", names=("rollout/tokens_per_second", "train/tokens_per_second"), better="up"
    ),
    Curve(title="Seconds of a step", names=("seconds/*",), better="down"),
    Curve(title="Staleness", names=("staleness/mean", "staleness/max")),
    Curve(title="Truncated episodes", names=("outcome/truncated",), better="down"),
    Curve(title="Tool errors", names=("episode/tool_errors",), better="down"),
    Curve(title="Failed attempts", names=("rollout/failed_attempts", "user/fault_share"), better="down"),
    Curve(title="Gradient norm", names=("train/grad_norm",)),
    Curve(title="Response length", names=("episode/sampled_tokens",)),
)


def headlines(row: Mapping[str, float]) -> dict[str, float]:
    """The figures of the overview again as `overview/NAME`: dashboards make a section of what stands in front."""
    return {f"overview/{name}": row[name] for curve in OVERVIEW for name in curve.names_in(row)}
