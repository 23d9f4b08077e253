"""The limit of live episodes: first come, first served, paused ones in front, whatever the limit does."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from polyturn.agents.deadlines import EpisodeLimits, EpisodeTime, Slots
from polyturn.agents.live_episodes import LiveEpisodes
from polyturn.agents.policy import PolicyFault


async def settle() -> None:
    for _ in range(3):
        await asyncio.sleep(0)


async def test_episodes_come_in_the_order_of_their_asking():
    live, order = LiveEpisodes(2), []

    async def enter(name: str) -> None:
        await live.enter(name)
        order.append(name)

    jobs = [asyncio.create_task(enter(name)) for name in "abcde"]
    await settle()
    assert order == ["a", "b"]
    live.leave("a")
    await settle()
    assert order == ["a", "b", "c"]
    live.limit = 4
    await settle()
    assert order == list("abcde")
    await asyncio.gather(*jobs)
    await live.enter("b")
    assert live.num_in == 4 and live.num_pauses == 0


async def test_a_lower_limit_pauses_who_asks_next_and_paused_ones_come_before_new_ones():
    live, order = LiveEpisodes(3), []

    async def enter(name: str) -> None:
        await live.enter(name)
        order.append(name)

    for name in "abc":
        await enter(name)
    jobs = [asyncio.create_task(enter("new"))]
    await settle()
    live.limit = 1
    assert live.num_in == 3, "no request is broken off"
    jobs += [asyncio.create_task(enter(name)) for name in "ca"]
    await settle()
    assert (live.num_in, live.num_waiting, live.num_pauses) == (1, 3, 2)
    await enter("b")  # the limit's worth of them goes on
    live.leave("b")
    await settle()
    assert order == ["a", "b", "c", "b", "c"]
    live.leave("c")
    await settle()
    live.leave("a")
    await settle()
    assert order[-2:] == ["a", "new"]
    await asyncio.gather(*jobs)


async def test_who_stops_waiting_takes_no_room():
    live = LiveEpisodes(1)
    await live.enter("a")
    waiting = asyncio.create_task(live.enter("b"))
    await settle()
    waiting.cancel()
    live.leave("a")
    with pytest.raises(asyncio.CancelledError):
        await waiting
    live.leave("b")
    assert (live.num_in, live.num_waiting) == (0, 0)
    await live.enter("c")
    assert live.num_in == 1


async def test_waiting_for_room_is_queue_time_and_ends_in_a_fault_of_its_own():
    live = LiveEpisodes(1)
    slots = Slots(requests=asyncio.Semaphore(9), steps=asyncio.Semaphore(9), timeout_s=0.05)
    limits = EpisodeLimits(timeout_s=0.01)
    first, second = (EpisodeTime.of(limits, slots, live=live) for _ in range(2))

    async def answer() -> str:
        return "answer"

    assert await first.request(answer) == "answer"
    with pytest.raises(PolicyFault, match=r"no slot for a live episode became free within 0.05 s"):
        await second.request(answer)
    assert second.seconds["queue_s"] >= 0.05 and not second.is_over
    first.end()
    assert await second.request(answer) == "answer"
    second.end()
    assert live.num_in == 0


@dataclass
class Model:
    """What is said of the limit in its docstring, in the simplest way."""

    limit: int
    inside: set[int] = field(default_factory=set)
    paused: list[int] = field(default_factory=list)
    new: list[int] = field(default_factory=list)

    def admit(self) -> None:
        while len(self.inside) < self.limit and (self.paused or self.new):
            self.inside.add((self.paused or self.new).pop(0))

    def ask(self, episode: int) -> None:
        if episode in self.paused or episode in self.new:
            return
        if episode in self.inside:
            if len(self.inside) > self.limit:
                self.inside.remove(episode)
                self.paused.append(episode)
        else:
            self.new.append(episode)
        self.admit()

    def leave(self, episode: int) -> None:
        self.inside.discard(episode)
        for queue in (self.paused, self.new):
            if episode in queue:
                queue.remove(episode)
        self.admit()


@settings(deadline=None)
@given(
    limit=st.integers(1, 4),
    steps=st.lists(
        st.one_of(
            st.tuples(st.just("ask"), st.integers(0, 7)),
            st.tuples(st.just("leave"), st.integers(0, 7)),
            st.tuples(st.just("limit"), st.integers(1, 6)),
        ),
        max_size=60,
    ),
)
def test_it_does_what_its_model_does(limit: int, steps: list[tuple[str, int]]) -> None:
    async def play() -> None:
        live, model = LiveEpisodes(limit), Model(limit)
        jobs: dict[int, asyncio.Task[None]] = {}
        for what, number in steps:
            if what == "limit":
                live.limit = model.limit = number
                model.admit()
            elif what == "ask":
                model.ask(number)
                if number not in jobs or jobs[number].done():
                    jobs[number] = asyncio.create_task(live.enter(number))
            else:
                model.leave(number)
                if number in jobs:
                    jobs[number].cancel()
                    await asyncio.gather(jobs[number], return_exceptions=True)
                live.leave(number)
            await settle()
            assert live.num_in == len(model.inside)
            assert live.num_waiting == len(model.paused) + len(model.new)
            assert all(jobs[number].done() for number in model.inside)
            assert not any(jobs[number].done() for number in [*model.paused, *model.new])
        # Whoever waits comes in once those before it have gone: nobody is forgotten.
        while model.inside:
            number = model.inside.pop()
            model.admit()
            live.leave(number)
            await settle()
        assert (live.num_in, live.num_waiting) == (0, 0)

    asyncio.run(play())
