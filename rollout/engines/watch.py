"""Keeps an eye on engines while episodes are played: figures for a step's metrics, and how many episodes are live."""

from __future__ import annotations

from collections.abc import Mapping

from polyturn.rollout.concurrency import Feedback, Limit, Rule, adapt
from polyturn.rollout.engines.fleet import EngineFleet, Traffic, fleet_figures
from polyturn.rollout.engines.load import LoadPoller, Loads


class EngineWatch:
    """What samples of the engines' load are used for."""

    def __init__(self, fleet: EngineFleet, *, rule: Rule | None = None) -> None:
        """With a `rule` the limit of `fleet.live` follows the load."""
        assert rule is None or fleet.live is not None, "a rule for a limit that is not there"
        self._fleet = fleet
        self._rule = rule
        self._limit = Limit(value=float(fleet.live.limit)) if fleet.live is not None else None
        self._seen = self._told = fleet.traffic

    def note(self, loads: Loads) -> None:
        """Take a sample in: the limit of live episodes moves."""
        live, rule = self._fleet.live, self._rule
        if live is None or rule is None or self._limit is None:
            return
        before, self._seen = self._seen, self._fleet.traffic
        feedback = Feedback.of(
            [load for load in loads if load is not None],
            sum(self._seen, Traffic()) - sum(before, Traffic()),
            is_limited=live.num_waiting > 0,
        )
        self._limit = adapt(self._limit, feedback, rule)
        live.limit = self._limit.episodes

    def take_figures(self, poller: LoadPoller) -> Mapping[str, float]:
        """Metrics since the last call."""
        before, self._told = self._told, self._fleet.traffic
        between = [now - earlier for now, earlier in zip(self._told, before, strict=True)]
        row = {**poller.take_figures(), **fleet_figures(between)}
        if (live := self._fleet.live) is not None:
            row |= {
                "rollout/live_limit": float(live.limit),
                "rollout/live_waiting": float(live.num_waiting),
                "rollout/live_pauses": float(live.num_pauses),
            }
        return row
