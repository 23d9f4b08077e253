"""Keeps an eye on engines while episodes are played: figures for a step's metrics, and how many episodes are live."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractAsyncContextManager

from polyturn.agents.policy import TokenPolicy
from polyturn.rollout.concurrency import Feedback, Limit, Rule, adapt
from polyturn.rollout.engines.fleet import Ailment, EngineFleet, Traffic, fleet_figures
from polyturn.rollout.engines.load import POLL_S, LoadClient, LoadPoller, Loads
from polyturn.rollout.engines.membership import Membership


class EngineWatch:
    """Samples the load of engines for as long as `watching` is open, and acts on it."""

    def __init__(
        self,
        fleet: EngineFleet,
        *,
        urls: Sequence[str],
        client: LoadClient,
        is_direct: bool = True,
        connect: Callable[[str], TokenPolicy] | None = None,
        rule: Rule | None = None,
    ) -> None:
        """
        Args:
            urls: Of the engines themselves.
            is_direct: Whether they are the fleet's, one by one: it is told which of them are gone.
            connect: Makes the policy of an engine that comes later, which the fleet then asks directly; None: what is
                behind the fleet's policies changes without its knowledge.
            rule: By which the limit of `fleet.live` follows the load; None: it stays.
        """
        assert rule is None or fleet.live is not None, "a rule for a limit that is not there"
        self.fleet = fleet
        self._rule = rule
        self._limit = Limit(value=float(fleet.live.limit)) if fleet.live is not None else None
        self._seen = self._told = fleet.traffic
        self._connect = connect
        self._is_direct = is_direct
        self._policies = dict(zip(enumerate(urls), fleet.policies, strict=False)) if is_direct else {}
        """By number and address, of engines that are asked directly."""
        self._poller = LoadPoller(
            dict(enumerate(urls)),
            client=client,
            set_present=fleet.set_present if is_direct else None,
            on_loads=self.note,
        )

    def set_engines(self, members: Membership) -> None:
        """Other engines are there from now on."""
        self._poller.set_urls(members.urls)
        if self._connect is None:
            return
        known = self._policies
        self._policies = {key: known.get(key) or self._connect(key[1]) for key in members.urls.items()}
        self.fleet.set_engines(
            {number: policy for (number, _), policy in self._policies.items()}, leaving=members.leaving
        )
        self.fleet.chat_urls = tuple(f"{url}/v1" for url in members.serving.values())

    @property
    def ailments(self) -> Mapping[int, Ailment]:
        """By engine, what is the matter with those that failed their last request. What a router in front of them fails
        at is none of theirs, and which of them it asked is not known."""
        return self.fleet.ailments if self._is_direct else {}

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
            [load for load in loads.values() if load is not None],
            sum(self._seen.values(), Traffic()) - sum(before.values(), Traffic()),
            is_limited=live.num_waiting > 0,
        )
        self._limit = adapt(self._limit, feedback, rule)
        live.limit = self._limit.episodes

    def take_loads(self) -> list[tuple[float, Loads]]:
        """The samples since the last call, as `LoadPoller.take_samples`."""
        return self._poller.take_samples()

    def take_traffic(self) -> dict[int, Traffic]:
        """By engine of the fleet, what was answered since the last call."""
        before, self._told = self._told, self.fleet.traffic
        return {number: now - before.get(number, Traffic()) for number, now in self._told.items()}

    async def take_figures(self, others: Sequence[Mapping[int, Traffic]] = ()) -> dict[str, float]:
        """Metrics of what happened since the last call.

        Args:
            others: What fleets of other processes were answered by the same engines.
        """
        if not self._poller.num_samples:
            await self._poller.poll()
        traffic = self.take_traffic()
        for other in others:
            for number, one in other.items():
                traffic[number] = traffic.get(number, Traffic()) + one
        row = {**self._poller.take_figures(), **fleet_figures(traffic)}
        if (live := self.fleet.live) is not None and not others:
            row |= {
                "rollout/live_limit": float(live.limit),
                "rollout/live_episodes": float(live.num_in),
                "rollout/live_waiting": float(live.num_waiting),
                "rollout/live_pauses": float(live.num_pauses),
            }
        return row
