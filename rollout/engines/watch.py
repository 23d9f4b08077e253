"""Keeps an eye on engines while episodes are played: figures for a step's metrics, and how many episodes are live."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractAsyncContextManager

from polyturn.rollout.concurrency import Feedback, Limit, Rule, adapt
from polyturn.rollout.engines.fleet import EngineFleet, Traffic, fleet_figures
from polyturn.rollout.engines.load import POLL_S, LoadClient, LoadPoller, Loads


class EngineWatch:
    """Samples the load of engines for as long as `watching` is open, and acts on it."""

    def __init__(
        self,
        fleet: EngineFleet,
        *,
        urls: Sequence[str],
        client: LoadClient,
        is_direct: bool = True,
        rule: Rule | None = None,
    ) -> None:
        """
        Args:
            urls: Of the engines themselves.
            is_direct: Whether they are the fleet's, one by one: it is told which of them are gone.
            rule: By which the limit of `fleet.live` follows the load; None: it stays.
        """
        assert rule is None or fleet.live is not None, "a rule for a limit that is not there"
        self.fleet = fleet
        self._rule = rule
        self._limit = Limit(value=float(fleet.live.limit)) if fleet.live is not None else None
        self._seen = self._told = fleet.traffic
        self._poller = LoadPoller(
            urls, client=client, set_present=fleet.set_present if is_direct else None, on_loads=self.note
        )

    def watching(self, *, every_s: float = POLL_S) -> AbstractAsyncContextManager[None]:
        """Take samples while the block runs."""
        return self._poller.polling(every_s=every_s)

    def note(self, loads: Loads) -> None:
        """Take a sample in: the limit of live episodes moves."""
        live, rule = self.fleet.live, self._rule
        if live is None or rule is None or self._limit is None:
            return
        before, self._seen = self._seen, self.fleet.traffic
        feedback = Feedback.of(
            [load for load in loads if load is not None],
            sum(self._seen, Traffic()) - sum(before, Traffic()),
            is_limited=live.num_waiting > 0,
        )
        self._limit = adapt(self._limit, feedback, rule)
        live.limit = self._limit.episodes

    def take_traffic(self) -> list[Traffic]:
        """By engine of the fleet, what was answered since the last call."""
        before, self._told = self._told, self.fleet.traffic
        return [now - earlier for now, earlier in zip(self._told, before, strict=True)]

    async def take_figures(self, others: Sequence[Sequence[Traffic]] = ()) -> dict[str, float]:
        """Metrics of what happened since the last call.

        Args:
            others: What fleets of other processes were answered by the same engines.
        """
        if not self._poller.num_samples:
            await self._poller.poll()
        traffic = [sum(of_engine, Traffic()) for of_engine in zip(self.take_traffic(), *others, strict=True)]
        row = {**self._poller.take_figures(), **fleet_figures(traffic)}
        if (live := self.fleet.live) is not None and not others:
            row |= {
                "rollout/live_limit": float(live.limit),
                "rollout/live_episodes": float(live.num_in),
                "rollout/live_waiting": float(live.num_waiting),
                "rollout/live_pauses": float(live.num_pauses),
            }
        return row
