"""Where the requests of an episode go: its place, when it leaves it, and what engines that die do to it."""

from __future__ import annotations

import asyncio
import itertools
import json
import math
from contextlib import AsyncExitStack, ExitStack
from dataclasses import replace

import httpx
import numpy as np
import orjson
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from polyturn.agents.policy import (
    EngineUnavailable,
    GarbledAnswer,
    Generation,
    PolicyFault,
    SamplingParams,
    policy_of_episode,
)
from polyturn.agents.sglang_policy import SGLangPolicy
from polyturn.rollout.engines.fleet import FIRST_ABSENCE_S, EngineFleet, Overload, Traffic, fleet_figures
from polyturn.rollout.engines.watch import EngineWatch
from polyturn.rollout.factory import fleet_retries
from polyturn.tools.retries import Retries

PLAIN = SamplingParams()
NUMBERS = itertools.count(1000)
NO_WAIT = Retries(max_retries=1, first_wait_s=0.0)


class Engine:
    """Answers with its number when its gate is open."""

    def __init__(self, number: int) -> None:
        self.number = number
        self.version = 0
        self.num_cached = 0
        self.num_retractions = 0
        self.fault: Exception | None = None
        self.num_asked = 0
        self.gate = asyncio.Event()
        self.gate.set()

    async def generate(self, *, prompt_ids: np.ndarray, sampling: SamplingParams) -> Generation:
        self.num_asked += 1
        await self.gate.wait()
        if self.fault is not None:
            raise self.fault
        return Generation(
            token_ids=[self.number],
            logprobs=[-1.0],
            policy_versions=[self.version],
            finish_reason="stop",
            num_cached_tokens=self.num_cached,
            num_retractions=self.num_retractions,
        )


def gone() -> EngineUnavailable:
    return EngineUnavailable("refused", is_gone=True)


async def ask(policy, num_tokens: int = 10, first: int | None = None) -> int:
    """The number of the engine that answered; without a `first` token the prompt is like no other."""
    first = next(NUMBERS) if first is None else first
    prompt = np.arange(first, first + num_tokens, dtype=np.int32)
    generation = await policy.generate(prompt_ids=prompt, sampling=PLAIN)
    return int(generation.token_ids[0])


async def test_an_episode_begins_where_the_fewest_are_and_stays():
    fleet = EngineFleet([Engine(0), Engine(1), Engine(2)])
    with ExitStack() as stack:
        policies = [stack.enter_context(policy_of_episode(fleet)) for _ in range(6)]
        first = [await ask(policy) for policy in policies]
        assert first == [0, 1, 2, 0, 1, 2]
        assert [await ask(policy) for policy in policies] == first
        assert fleet.num_episodes == {0: 2, 1: 2, 2: 2}
    assert fleet.num_episodes == {0: 0, 1: 0, 2: 0}


async def test_the_place_of_an_episode_that_ended_goes_to_the_next():
    fleet = EngineFleet([Engine(0), Engine(1)])
    with fleet.for_episode() as first:
        assert await ask(first) == 0
        with fleet.for_episode() as second:
            assert await ask(second) == 1
        with fleet.for_episode() as third:
            assert await ask(third) == 1
    with pytest.raises(RuntimeError, match="its code"), fleet.for_episode() as broken:
        await ask(broken)
        raise RuntimeError("its code")
    assert fleet.num_episodes == {0: 0, 1: 0}


async def test_an_episode_begins_where_its_prompt_is_known_unless_that_is_crowded():
    fleet = EngineFleet([Engine(0), Engine(1)])
    with ExitStack() as stack:
        policies = [stack.enter_context(fleet.for_episode()) for _ in range(12)]
        assert [await ask(policy, first=7) for policy in policies[:6]] == [0, 0, 0, 0, 1, 0]
        assert [await ask(policy, first=8) for policy in policies[6:8]] == [1, 1]
        with fleet.for_episode() as alone:
            assert await ask(alone, first=9) == 1
        with fleet.for_episode() as other, fleet.for_episode() as sibling:
            assert await ask(other) == 1
            assert await ask(sibling, first=9) == 1, "nobody with that prompt is left: where the fewest are"
    assert fleet._siblings == {}


async def test_an_episode_leaves_an_engine_that_is_overloaded_by_the_margin_and_no_sooner():
    engines = [Engine(0), Engine(1)]
    fleet = EngineFleet(engines, overload=Overload(ratio=1.0, margin=2))
    with ExitStack() as stack:
        policies = [stack.enter_context(fleet.for_episode()) for _ in range(8)]
        homes = [await ask(policy) for policy in policies]
        at_first = [policy for policy, home in zip(policies, homes, strict=True) if home == 0]
        engines[0].gate.clear()
        waiting = [asyncio.create_task(ask(policy)) for policy in at_first[:2]]
        await asyncio.sleep(0)
        assert fleet.num_requests == {0: 2, 1: 0}
        waiting.append(asyncio.create_task(ask(at_first[2])))
        await asyncio.sleep(0)
        assert fleet.num_requests == {0: 3, 1: 0}, "two more than the other has is no overload"
        assert await ask(at_first[3]) == 1
        assert fleet.num_episodes == {0: 3, 1: 5}
        engines[0].gate.set()
        assert await asyncio.gather(*waiting) == [0, 0, 0]
        assert await ask(at_first[3]) == 1, "it stays where its KV is"
    assert fleet.traffic[1].num_arrivals == 1


async def test_an_episode_of_an_engine_that_is_gone_goes_on_elsewhere_and_does_not_come_back():
    now = [0.0]
    engines = [Engine(0), Engine(1)]
    fleet = EngineFleet(engines, retries=NO_WAIT, clock=lambda: now[0])
    with fleet.for_episode() as policy, fleet.for_episode() as other:
        assert (await ask(policy), await ask(other)) == (0, 1)
        engines[0].fault = gone()
        assert await ask(policy) == 1
        asked = engines[0].num_asked
        with fleet.for_episode() as young:
            assert await ask(young) == 1, "nothing begins where nobody answers"
        assert engines[0].num_asked == asked
        engines[0].fault = None
        now[0] += FIRST_ABSENCE_S
        assert await ask(policy) == 1, "the engine that is back has no KV of it"
        with fleet.for_episode() as young:
            assert await ask(young) == 0
    assert [one.num_faults for one in fleet.traffic.values()] == [1, 0]


async def test_an_engine_that_stays_away_is_asked_ever_less():
    now, asked_at = [0.0], []
    engines = [Engine(0), Engine(1)]
    engines[0].fault = gone()
    fleet = EngineFleet(engines, retries=NO_WAIT, clock=lambda: now[0])
    for now[0] in np.arange(0.0, 31.0, 0.5):
        before = engines[0].num_asked
        assert await ask(fleet) == 1
        if engines[0].num_asked > before:
            asked_at.append(now[0])
    assert asked_at == [0.0, 2.0, 6.0, 14.0, 30.0]


async def test_a_request_that_every_engine_fails_marks_none_as_gone():
    engines = [Engine(0), Engine(1)]
    for engine in engines:
        engine.fault = EngineUnavailable("HTTP 500", is_gone=False)
    fleet = EngineFleet(engines, retries=NO_WAIT)
    with pytest.raises(PolicyFault, match="no engine answers; tried 2 times: HTTP 500"):
        await ask(fleet)
    assert [engine.num_asked for engine in engines] == [2, 2]
    engines[0].fault = None
    assert await ask(fleet) == 0


async def test_a_request_that_waits_to_be_sent_again_is_not_under_way():
    engine = Engine(0)
    engine.fault = gone()
    fleet = EngineFleet([engine], retries=Retries(max_retries=9, first_wait_s=0.01))
    asking = asyncio.create_task(ask(fleet))
    while not engine.num_asked:
        await asyncio.sleep(0)
    assert fleet.num_requests == {0: 0} and not asking.done()
    engine.fault = None
    assert await asking == 0


async def test_what_is_refused_is_not_asked_of_another():
    engines = [Engine(0), Engine(1)]
    engines[0].fault = PolicyFault("HTTP 400")
    fleet = EngineFleet(engines, retries=NO_WAIT)
    with pytest.raises(PolicyFault, match="400"):
        await ask(fleet)
    assert engines[1].num_asked == 0
    assert fleet.num_requests == {0: 0, 1: 0}


async def test_without_places_requests_go_where_the_fewest_are_under_way():
    engines = [Engine(0), Engine(1)]
    fleet = EngineFleet(engines, sticky=False)
    engines[0].gate.clear()
    waiting = asyncio.create_task(ask(fleet))
    await asyncio.sleep(0)
    with fleet.for_episode() as policy:
        assert await ask(policy) == 1
        engines[0].gate.set()
        assert await waiting == 0
        assert await ask(policy) == 0, "whatever KV is where"


async def test_what_somebody_else_knows_of_an_engine_counts():
    fleet = EngineFleet([Engine(0), Engine(1)])
    fleet.set_present(0, False)
    assert await ask(fleet) == 1
    fleet.set_present(0, True)
    assert await ask(fleet) == 0
    fleet.set_present(0, False)
    fleet.set_present(1, False)
    assert await ask(fleet) == 0, "where all are said to be gone one is asked all the same"


async def test_known_tokens_that_were_computed_again_are_lost():
    engine = Engine(0)
    fleet = EngineFleet([engine])
    with fleet.for_episode() as policy:
        await ask(policy, 10)
        engine.num_cached = 10
        await ask(policy, 20)
        engine.num_cached = 5
        await ask(policy, 30)
        [traffic] = fleet.traffic.values()
        # What the second request found shows that the engine keeps prompts. 20 + 1 sampled tokens have 20 with KV.
        assert (traffic.num_known_tokens, traffic.num_lost_tokens) == (20, 15)
        assert (traffic.num_prompt_tokens, traffic.num_cached_tokens) == (60, 15)
        engine.version = 1
        await ask(policy, 40)
        await ask(policy, 8)
        later = fleet.traffic[0] - traffic
        assert (later.num_requests, later.num_prompt_tokens) == (2, 48)
        assert later.num_known_tokens == 0, "new weights, then another history"


async def test_an_engine_that_keeps_no_prompts_loses_none():
    fleet = EngineFleet([Engine(0)])
    with fleet.for_episode() as policy:
        for num_tokens in (10, 20, 30):
            await ask(policy, num_tokens)
    assert fleet.traffic[0].num_known_tokens == 0


async def test_what_new_weights_took_out_of_a_batch_is_no_want_of_kv():
    engine = Engine(0)
    engine.num_retractions = 1
    fleet = EngineFleet([engine])
    with fleet.for_episode() as policy:
        for engine.version, counted in [(4, 1), (4, 2), (5, 2), (5, 3)]:
            await ask(policy)
            assert fleet.traffic[0].num_retractions == counted


def test_figures_are_of_all_engines_and_of_each():
    one = Traffic(num_requests=1, num_prompt_tokens=100, num_cached_tokens=50)
    other = Traffic(num_requests=3, num_prompt_tokens=300, num_cached_tokens=0)
    row = fleet_figures({0: one, 1: other})
    assert row["engine/cache_hit_rate"] == 0.125
    assert (row["engine/0/cache_hit_rate"], row["engine/1/cache_hit_rate"]) == (0.5, 0.0)
    assert row["engine/requests"] == 4
    assert "engine/0/requests" not in fleet_figures({0: one}), "one engine or router is the whole fleet"


async def test_an_engine_that_is_taken_out_lets_go_of_what_it_has_under_way():
    """It hangs: nothing but the fleet ends the wait for it."""
    engines = [Engine(0), Engine(1)]
    fleet = EngineFleet(engines)
    with fleet.for_episode() as policy:
        assert await ask(policy) == 0
        engines[0].gate.clear()
        hanging = asyncio.create_task(ask(policy))
        await asyncio.sleep(0)
        fleet.set_engines({1: engines[1]})
        assert await hanging == 1
        assert (fleet.num_requests, fleet.num_episodes) == ({1: 0}, {1: 1})
        replaced = Engine(2)
        fleet.set_engines({0: replaced, 1: engines[1]})
        assert await ask(policy) == 1, "it stays where its KV is"
        with fleet.for_episode() as young:
            assert await ask(young) == 2, "what replaced an engine is another one"
    assert fleet.traffic[0].num_cut_off == 1 and fleet.traffic[0].num_requests == 2
    assert fleet.traffic[1].num_recomputed_tokens == 10


async def test_an_engine_that_leaves_ends_what_it_has_and_begins_nothing():
    engines = [Engine(0), Engine(1)]
    fleet = EngineFleet(engines)
    with fleet.for_episode() as policy, fleet.for_episode() as other:
        assert (await ask(policy), await ask(other)) == (0, 1)
        engines[0].gate.clear()
        under_way = asyncio.create_task(ask(policy))
        await asyncio.sleep(0)
        fleet.set_engines({0: engines[0], 1: engines[1]}, leaving=[0])
        assert [await ask(other), await ask(other)] == [1, 1]
        assert fleet.num_requests == {0: 1, 1: 0}
        engines[0].gate.set()
        assert await under_way == 0
        assert await ask(policy) == 1, "its next turn is elsewhere"


async def test_without_any_engine_a_request_waits_for_one_and_that_is_not_the_policys_time():
    now = [0.0]
    only = Engine(0)
    fleet = EngineFleet([only], clock=lambda: now[0], retries=NO_WAIT)
    only.gate.clear()
    asking = asyncio.create_task(fleet.generate(prompt_ids=np.arange(3, dtype=np.int32), sampling=PLAIN))
    await asyncio.sleep(0)
    fleet.set_engines({})
    for _ in range(9):
        await asyncio.sleep(0)
    assert not asking.done()
    now[0] = 30.0
    fleet.set_engines({0: Engine(7)})
    generation = await asking
    assert (int(generation.token_ids[0]), generation.waited_s) == (7, 30.0)
    fleet = EngineFleet([only], retries=Retries(deadline_s=0.01))
    fleet.set_engines({})
    with pytest.raises(EngineUnavailable, match="none came in time"):
        await ask(fleet)


async def test_what_ails_an_engine_is_known_until_it_answers_well():
    engines = [Engine(0), Engine(1)]
    engines[0].fault = GarbledAnswer("NaN")
    fleet = EngineFleet(engines, retries=NO_WAIT, sticky=False)
    for _ in range(3):
        assert await ask(fleet) == 1
    [(number, ailment)] = fleet.ailments.items()
    assert (number, ailment.num_faults, ailment.num_garbled, ailment.last) == (0, 3, 3, "NaN")
    fleet.set_present(0, True)
    assert fleet.ailments, "that it says something of its load is no good answer"
    engines[0].fault = None
    assert await ask(fleet) == 0
    assert fleet.ailments == {}
    assert fleet.traffic[0].num_garbled == 3


async def test_what_a_router_fails_at_is_no_engines_fault_and_is_asked_again_until_it_is_back():
    router = Engine(0)
    router.fault = gone()
    retries = replace(fleet_retries(60.0, is_behind_router=True), first_wait_s=0.0)
    fleet = EngineFleet([router], retries=retries)
    async with httpx.AsyncClient() as client:
        watch = EngineWatch(fleet, urls=["http://engine0"], client=client, is_direct=False)
        asking = asyncio.create_task(ask(fleet))
        while router.num_asked < 20:
            await asyncio.sleep(0)
        assert fleet.ailments and watch.ailments == {}
        router.fault = None
        assert await asking == 0
        engine = EngineWatch(fleet, urls=["http://engine0"], client=client)
        router.fault = gone()
        fleet.set_engines({0: router})
        asking = asyncio.create_task(ask(fleet))
        while not fleet.ailments:
            await asyncio.sleep(0)
        assert engine.ailments == fleet.ailments
        asking.cancel()


@settings(deadline=None)
@given(
    num_engines=st.integers(1, 4),
    steps=st.lists(
        st.tuples(st.integers(0, 5), st.sampled_from(["ask", "fail", "end", "present"])), max_size=40
    ),
)
def test_counts_hold_whatever_happens(num_engines: int, steps: list[tuple[int, str]]) -> None:
    """No place is held twice or for ever, and no request is lost in the count."""

    async def play() -> None:
        engines = [Engine(number) for number in range(num_engines)]
        fleet = EngineFleet(engines, retries=NO_WAIT)
        stacks = {number: ExitStack() for number in range(6)}
        policies = {number: stack.enter_context(fleet.for_episode()) for number, stack in stacks.items()}
        placed = set()
        for number, what in steps:
            engine = engines[number % num_engines]
            engine.fault = gone() if what == "fail" else None
            if what == "end":
                stacks[number].close()
                stacks[number] = ExitStack()
                policies[number] = stacks[number].enter_context(fleet.for_episode())
                placed.discard(number)
            elif what == "present":
                fleet.set_present(number % num_engines, bool(number % 2))
            else:
                placed.add(number)
                try:
                    await ask(policies[number])
                except EngineUnavailable:
                    assert all(engine.fault is not None for engine in engines)
            assert sum(fleet.num_episodes.values()) == len(placed)
            assert set(fleet.num_requests.values()) == {0}
        for stack in stacks.values():
            stack.close()
        assert set(fleet.num_episodes.values()) == {0}

    asyncio.run(play())


class Server:
    """An engine over HTTP that can break off in the middle of its answers, or answer something else."""

    def __init__(self, number: int) -> None:
        self.number = number
        self.body: bytes | None = None
        self.prompts: list[list[int]] = []
        self.dies = False
        self._writers: list[asyncio.StreamWriter] = []

    async def __aenter__(self) -> Server:
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", 0)
        self.url = f"http://127.0.0.1:{self._server.sockets[0].getsockname()[1]}"
        return self

    async def __aexit__(self, *_: object) -> None:
        self.die()

    def die(self) -> None:
        self._server.close()
        for writer in self._writers:
            writer.close()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._writers.append(writer)
        try:
            while head := await reader.readuntil(b"\r\n\r\n"):
                length = int(head.lower().split(b"content-length:")[1].split(b"\r\n")[0])
                self.prompts.append(orjson.loads(await reader.readexactly(length))["input_ids"])
                meta = {"output_token_logprobs": [[-1.0, self.number]], "finish_reason": {"type": "stop"}}
                body = self.body or orjson.dumps({"output_ids": [self.number], "meta_info": meta})
                writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % len(body))
                if self.dies:
                    writer.write(body[:9])
                    self.die()
                    return
                writer.write(body)
        except asyncio.IncompleteReadError:
            writer.close()


async def test_an_engine_that_dies_in_the_middle_of_an_answer_takes_no_tokens_with_it():
    async with AsyncExitStack() as stack:
        servers = [await stack.enter_async_context(Server(number)) for number in range(2)]
        client = await stack.enter_async_context(httpx.AsyncClient(trust_env=False))
        alone = Retries(max_retries=0)
        fleet = EngineFleet(
            [SGLangPolicy(client=client, url=s.url, stop_token_ids=(), retries=alone) for s in servers],
            retries=NO_WAIT,
        )
        policy = stack.enter_context(fleet.for_episode())
        assert await ask(policy, 3, first=0) == 0
        servers[0].dies = True
        assert await ask(policy, 5, first=0) == 1
        assert servers[0].prompts == [[0, 1, 2], [0, 1, 2, 3, 4]]
        assert servers[1].prompts == [[0, 1, 2, 3, 4]], "with all its tokens, once"
        assert await ask(policy, 7) == 1
        assert len(servers[0].prompts) == 2


def answer_of(ids: list[int], logprobs: list[float | None], **meta: object) -> bytes:
    """Of an engine; JSON has no NaN, Python's does."""
    entries = [[logprob, token] for logprob, token in zip(logprobs, ids, strict=False)]
    meta = {"output_token_logprobs": entries, "finish_reason": {"type": "stop"}, **meta}
    return json.dumps({"output_ids": ids, "meta_info": meta}).encode()


GARBAGE = {
    "no JSON": b"<html>502</html>",
    "no object": b"[1]",
    "no tokens": b"{}",
    "logprobs of other tokens": answer_of([5, 6], [-1.0]),
    "NaN": answer_of([5], [math.nan]),
    "beyond the vocabulary": answer_of([300], [-1.0]),
    "unknown version": answer_of([5], [-1.0], weight_version="latest"),
    "versions of other tokens": answer_of(
        [5], [-1.0], weight_versions=[{"version": "1", "start": 0, "end": 9}]
    ),
    "unknown end": answer_of([5], [-1.0], finish_reason={"type": "boredom"}),
}


async def test_no_garbage_is_taken_for_an_answer():
    """Whatever an engine says, the episode has what another one sampled, and the engine is known to be ill."""
    async with AsyncExitStack() as stack:
        servers = [await stack.enter_async_context(Server(number)) for number in range(2)]
        client = await stack.enter_async_context(httpx.AsyncClient(trust_env=False))
        alone = Retries(max_retries=0)
        fleet = EngineFleet(
            [
                SGLangPolicy(client=client, url=s.url, stop_token_ids=(), retries=alone, vocab_size=300)
                for s in servers
            ],
            retries=NO_WAIT,
        )
        for what, servers[0].body in GARBAGE.items():
            with fleet.for_episode() as policy:
                assert await ask(policy) == 1, what
        assert fleet.ailments[0].num_garbled == fleet.ailments[0].num_faults == len(GARBAGE)
        servers[0].body = None
        with fleet.for_episode() as policy, fleet.for_episode() as other:
            assert {await ask(policy), await ask(other)} == {0, 1}
        assert fleet.ailments == {}
