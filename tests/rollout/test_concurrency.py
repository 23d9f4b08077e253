"""The feedback on the limit of live episodes, and the samples of the engines' load that it is fed with."""

from __future__ import annotations

import asyncio
import statistics
from dataclasses import replace

import httpx
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from polyturn.agents.live_episodes import LiveEpisodes
from polyturn.agents.policy import Generation, SamplingParams
from polyturn.configs.errors import ConfigError
from polyturn.configs.loading.loader import load_config
from polyturn.rollout.concurrency import Feedback, Limit, Rule, adapt, is_pressed
from polyturn.rollout.engines.fleet import EngineFleet, Traffic
from polyturn.rollout.engines.load import MAX_SILENT, EngineLoad, LoadPoller
from polyturn.rollout.engines.watch import EngineWatch
from polyturn.rollout.factory import live_episodes

RULE = Rule(smallest=4, largest=400)
CALM = Feedback(kv_use=0.5, queue_share=0.0, num_retractions=0, cache_loss_rate=0.0, is_limited=True)
PRESSED = [
    replace(CALM, kv_use=0.95),
    replace(CALM, queue_share=0.5),
    replace(CALM, num_retractions=1),
    replace(CALM, cache_loss_rate=0.2),
]


def test_it_rises_by_a_step_and_falls_by_a_share() -> None:
    assert adapt(Limit(value=100.0), CALM, RULE) == Limit(value=108.0)
    for feedback in PRESSED:
        assert adapt(Limit(value=100.0), feedback, RULE) == Limit(value=80.0, hold=5)


def test_one_cause_lowers_it_once() -> None:
    """What is under way when the limit falls goes on to press for a while."""
    limit, values = Limit(value=100.0), []
    for _ in range(12):
        limit = adapt(limit, PRESSED[0], RULE)
        values.append(limit.value)
    assert values == [80.0] * 6 + [64.0] * 6


def test_it_stays_where_nothing_speaks_for_a_change() -> None:
    for feedback in (replace(CALM, is_limited=False), replace(CALM, kv_use=0.85)):
        assert adapt(Limit(value=100.0), feedback, RULE).value == 100.0


feedbacks = st.builds(
    Feedback,
    kv_use=st.floats(0, 1),
    queue_share=st.floats(0, 1),
    num_retractions=st.integers(0, 3),
    cache_loss_rate=st.floats(0, 1),
    is_limited=st.booleans(),
)


@settings(deadline=None)
@given(st.floats(4, 400), st.integers(0, 5), st.lists(feedbacks, max_size=30))
def test_it_keeps_its_bounds_and_never_rises_under_pressure(
    start: float, hold: int, samples: list[Feedback]
) -> None:
    limit = Limit(value=start, hold=hold)
    for feedback in samples:
        after = adapt(limit, feedback, RULE)
        assert RULE.smallest <= after.value <= RULE.largest and 0 <= after.hold <= RULE.patience
        if is_pressed(feedback, RULE):
            assert after.value <= limit.value
        else:
            assert after.value >= limit.value
        limit = after


@pytest.mark.parametrize("room", [30, 120, 1000])
@pytest.mark.parametrize("start", [4.0, 400.0])
def test_it_finds_the_room_that_there_is(room: int, start: float) -> None:
    """Engines hold `room` episodes; those that are live follow the limit by a tenth of the difference a sample."""
    limit, live, live_counts, num_over = Limit(value=start), start, [], 0
    for sample in range(600):
        live += 0.1 * (limit.episodes - live)
        over = max(0.0, live / room - 1)
        feedback = replace(CALM, kv_use=min(1.0, live / room), num_retractions=int(10 * over))
        limit = adapt(limit, feedback, RULE)
        if sample >= 200:
            live_counts.append(live)
            num_over += over > 0
    best = min(room, RULE.largest)
    assert statistics.fmean(live_counts) >= 0.7 * best, live_counts
    assert num_over <= 0.05 * len(live_counts)


def test_feedback_is_of_the_fullest_engine_and_of_all_queues() -> None:
    loads = [
        EngineLoad(num_running=6, num_waiting=0, num_used_tokens=50, max_tokens=100),
        EngineLoad(num_running=2, num_waiting=8, num_used_tokens=90, max_tokens=100),
    ]
    traffic = Traffic(num_known_tokens=200, num_lost_tokens=50, num_retractions=3)
    assert Feedback.of(loads, traffic, is_limited=True) == Feedback(
        kv_use=0.9, queue_share=0.5, num_retractions=3, cache_loss_rate=0.25, is_limited=True
    )
    nobody = Feedback.of([], Traffic(), is_limited=False)
    assert (nobody.kv_use, nobody.queue_share, nobody.cache_loss_rate) == (0.0, 0.0, 0.0)


def rank(running: int, waiting: int, used: int) -> dict[str, int]:
    return {
        "num_running_reqs": running,
        "num_waiting_reqs": waiting,
        "num_used_tokens": used,
        "max_total_num_tokens": 1000,
    }


async def test_engines_are_polled_and_those_that_are_silent_for_long_are_told() -> None:
    silent = {"b": False}

    def answer(request: httpx.Request) -> httpx.Response:
        assert request.url.path == "/v1/loads"
        if silent.get(request.url.host):
            raise httpx.ConnectError("refused")
        if request.url.host == "c":
            return httpx.Response(200, json=["no loads"])
        return httpx.Response(200, json={"loads": [rank(3, 1, 500), rank(1, 0, 250)]})

    told: list[tuple[int, bool]] = []
    seen = []
    async with httpx.AsyncClient(transport=httpx.MockTransport(answer)) as client:
        poller = LoadPoller(
            dict(enumerate(["http://a", "http://b", "http://c"])),
            client=client,
            set_present=lambda *of: told.append(of),
            on_loads=seen.append,
        )
        load, other, none = (await poller.poll()).values()
        assert load == other == EngineLoad(num_running=4, num_waiting=1, num_used_tokens=750, max_tokens=2000)
        assert none is None
        silent["b"] = True
        for _ in range(MAX_SILENT):
            await poller.poll()
        assert told == [(1, False)], "who answers something else is there"
        silent["b"] = False
        await poller.poll()
        assert told[1:] == [(1, True)]
        assert len(seen) == 5
        figures = poller.take_figures()
        assert figures["engine/0/kv_use"] == figures["engine/0/kv_use_max"] == 0.375
        assert (figures["engine/0/running"], figures["engine/0/waiting"]) == (4, 1)
        assert [figures[f"engine/{index}/silent"] for index in range(3)] == pytest.approx([0, 0.6, 1])
        assert "engine/2/kv_use" not in figures
        assert poller.take_figures() == {}


async def test_polling_ends_with_its_block() -> None:
    def answer(_: httpx.Request) -> httpx.Response:
        return httpx.Response(200, json={"loads": [rank(1, 0, 1)]})

    samples: list[object] = []
    async with httpx.AsyncClient(transport=httpx.MockTransport(answer)) as client:
        async with LoadPoller({0: "http://a"}, client=client, on_loads=samples.append).polling(every_s=0):
            while len(samples) < 3:
                await asyncio.sleep(0)
        num_samples = len(samples)
        await asyncio.sleep(0.01)
        assert len(samples) == num_samples


class Full:
    """An engine that takes a request out of its batch whenever it is asked."""

    async def generate(self, *, prompt_ids: np.ndarray, sampling: SamplingParams) -> Generation:
        return Generation(
            token_ids=[1], logprobs=[-1.0], policy_versions=[0], finish_reason="stop", num_retractions=1
        )


async def test_the_limit_of_live_episodes_follows_what_the_engines_say() -> None:
    live = LiveEpisodes(10)
    fleet = EngineFleet([Full()], live=live)
    watch = EngineWatch(fleet, urls=[], client=httpx.AsyncClient(), rule=Rule(smallest=2, largest=20))
    calm = EngineLoad(num_running=1, num_waiting=0, num_used_tokens=1, max_tokens=100)
    watch.note({0: calm})
    assert live.limit == 10, "nobody waits"
    for number in range(11):
        waiting = asyncio.create_task(live.enter(number))
        await asyncio.sleep(0)
    watch.note({0: calm, 1: None})
    assert live.limit == 11
    await waiting
    await fleet.generate(prompt_ids=np.arange(3), sampling=SamplingParams())
    watch.note({0: calm})
    assert live.limit == 8
    figures = await watch.take_figures()
    assert (figures["engine/retractions"], figures["engine/requests"]) == (1, 1)
    assert (figures["rollout/live_limit"], figures["rollout/live_waiting"]) == (8, 0)
    assert figures["rollout/live_episodes"] == live.num_in == 11
    figures = await watch.take_figures([{0: Traffic(num_requests=2)}, {0: Traffic(num_requests=5)}])
    assert figures["engine/requests"] == 7 and "rollout/live_limit" not in figures


async def test_without_a_rule_the_limit_stays() -> None:
    watch = EngineWatch(EngineFleet([Full()], live=LiveEpisodes(3)), urls=[], client=httpx.AsyncClient())
    watch.note({0: EngineLoad(num_running=1, num_waiting=9, num_used_tokens=1, max_tokens=1)})
    assert (await watch.take_figures())["rollout/live_limit"] == 3


ADAPTIVE = "rollout.concurrency.kind=adaptive"
STICKY = "engines.router.policy=sticky"


def test_the_config_says_where_the_limit_begins_and_how_it_moves() -> None:
    config = load_config("quickstart", [ADAPTIVE, STICKY, "rollout.concurrency.start_episodes=40"])
    live, rule = live_episodes(config)
    assert live is not None and live.limit == 40
    assert rule == Rule(smallest=8, largest=config.rollout.max_concurrent_episodes)
    _, rule = live_episodes(load_config("quickstart", [ADAPTIVE, "rollout.num_workers=3"]))
    assert rule is not None
    assert (rule.smallest, rule.largest) == (3, -(-config.rollout.max_concurrent_episodes // 3))
    assert live_episodes(load_config("quickstart")) == (None, None)


@pytest.mark.parametrize(
    ("overrides", "why"),
    [
        ([ADAPTIVE, "engines.router.policy=cache_aware"], "set engines.router.policy: sticky"),
        (
            [ADAPTIVE, STICKY, "rollout.concurrency.min_episodes=1000"],
            r"min_episodes \(1000\) must not be above",
        ),
        ([ADAPTIVE, STICKY, "rollout.concurrency.low_kv_use=0.95"], r"low_kv_use \(0.95\) must not be above"),
    ],
)
def test_what_cannot_be_followed_is_refused(overrides: list[str], why: str) -> None:
    with pytest.raises(ConfigError, match=why):
        load_config("quickstart", overrides)
