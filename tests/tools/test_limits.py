"""Deadlines, slots, shortened results and prices: what happens is told to the model, counted, and leaks nothing."""

import asyncio
import contextvars
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest

from polyturn.tools.tool import ConcurrencyGate, SlotsExhausted, ToolLimits, tool
from polyturn.tools.toolset import Toolset
from polyturn.tools.types import UNKNOWN_TOOL, ToolCall, ToolError


def call_of(name, **arguments):
    return ToolCall(id="c", name=name, arguments=arguments)


def until(condition):
    """Wait for another thread."""
    waited = threading.Event()
    for _ in range(1000):
        if condition():
            return
        waited.wait(0.01)
    raise AssertionError("it never came to pass")


async def in_thread(function, **_):
    return await asyncio.get_running_loop().run_in_executor(None, function)


# Deadlines.


def test_a_sync_tool_that_is_too_slow_is_given_up_and_the_model_told():
    release = threading.Event()

    @tool(timeout_s=0.05)
    def hang() -> str:
        """Hang."""
        release.wait()
        return "late"

    tools = Toolset([hang])
    result = tools.call(call_of("hang"))
    assert (result.ok, result.timed_out) == (False, True)
    assert result.content.startswith("The call of 'hang' was stopped: it took longer than 0.05 s.")
    assert (tools.num_given_up, tools.num_still_running) == (1, 1)
    assert tools.metrics["hang"].num_timeouts == tools.metrics["hang"].num_failures == 1
    release.set()
    until(lambda: tools.num_still_running == 0)
    assert tools.num_given_up == 1


def test_a_tool_in_time_gives_its_value_its_errors_and_sees_its_context():
    caller = contextvars.ContextVar("caller", default="nobody")

    @tool(timeout_s=60.0)
    def who(kind: str) -> str:
        """Who."""
        if kind == "mistake":
            raise ToolError("no")
        if kind == "fault":
            raise TimeoutError("the backend's own")
        return caller.get()

    tools = Toolset([who])
    caller.set("me")
    assert tools.call(call_of("who", kind="x")).content == "me"
    mistake = tools.call(call_of("who", kind="mistake"))
    assert (mistake.ok, mistake.content, mistake.timed_out) == (False, "no", False)
    with pytest.raises(TimeoutError, match="the backend's own"):
        tools.call(call_of("who", kind="fault"))
    assert tools.num_given_up == 0


async def test_an_async_tool_that_is_too_slow_is_cancelled():
    ended = []

    @tool(timeout_s=0.05)
    async def hang(kind: str = "hang") -> str:
        """Hang."""
        if kind == "fault":
            raise TimeoutError("the backend's own")
        try:
            await asyncio.sleep(60)
        finally:
            ended.append("cancelled")
        return ""

    tools = Toolset([hang])
    result = await tools.call_async(call_of("hang"))
    assert (result.ok, result.timed_out, ended) == (False, True, ["cancelled"])
    with pytest.raises(TimeoutError, match="the backend's own"):
        await tools.call_async(call_of("hang", kind="fault"))


# Slots.


def test_slots_are_shared_by_all_sets_threads_and_loops_of_the_process():
    running, most = [0], [0]
    lock = threading.Lock()
    barrier = threading.Event()

    @tool(max_concurrency=3)
    def work() -> str:
        """Work."""
        with lock:
            running[0] += 1
            most[0] = max(most[0], running[0])
        barrier.wait(0.01)
        with lock:
            running[0] -= 1
        return "done"

    async def many():
        sets = [Toolset([work]) for _ in range(10)]
        return await asyncio.gather(*(t.call_async(call_of("work"), offload=in_thread) for t in sets))

    def one():
        return [Toolset([work]).call(call_of("work"))]

    with ThreadPoolExecutor(6) as threads:
        jobs = [threads.submit(asyncio.run, many()) for _ in range(2)]
        jobs += [threads.submit(one) for _ in range(10)]
        results = [result for job in jobs for result in job.result(60)]
    assert len(results) == 30
    assert all(result.content == "done" for result in results)
    assert 1 <= most[0] <= 3
    assert any(result.queue_s > 0 for result in results)


async def test_those_who_are_cancelled_while_they_wait_take_no_slot():
    gate = ConcurrencyGate(1)
    await gate.acquire_async()
    waiting = [asyncio.create_task(gate.acquire_async()) for _ in range(3)]
    await asyncio.sleep(0)
    waiting[0].cancel()
    gate.release()  # to the second
    waiting[1].cancel()  # in the moment in which it is granted
    await asyncio.wait(waiting, timeout=10)
    assert [task.cancelled() for task in waiting] == [True, True, False]
    gate.release()
    assert gate.num_running == 0


async def test_a_call_that_is_cancelled_before_a_thread_takes_it_up_gives_its_slot_back():
    gate = ConcurrencyGate(2)
    block = threading.Event()

    @tool(max_concurrency=gate)
    def work() -> str:
        """Work."""
        block.wait()
        return ""

    with ThreadPoolExecutor(1) as threads:

        async def offload(function, **_):
            return await asyncio.get_running_loop().run_in_executor(threads, function)

        tools = Toolset([work])
        jobs = [asyncio.create_task(tools.call_async(call_of("work"), offload=offload)) for _ in range(2)]
        while gate.num_running < 2:
            await asyncio.sleep(0)
        await asyncio.sleep(0.01)
        for job in jobs:
            job.cancel()
        await asyncio.wait(jobs)
        assert gate.num_running == 1, "the one that a thread is at keeps its slot until it ends"
        block.set()
    assert gate.num_running == 0


def test_a_call_that_was_given_up_keeps_its_slot_and_nobody_waits_for_ever():
    release = threading.Event()

    @tool(timeout_s=0.05, max_concurrency=1)
    def hang() -> str:
        """Hang."""
        release.wait()
        return "done"

    tools = Toolset([hang])
    with ThreadPoolExecutor(1) as threads:
        first = threads.submit(tools.call, call_of("hang"))
        with pytest.raises(SlotsExhausted, match="all 1 slots are held by calls that never returned"):
            Toolset([hang]).call(call_of("hang")) if first.result() else None
    release.set()
    until(lambda: tools.num_still_running == 0)
    assert tools.call(call_of("hang")).content == "done"


def test_who_waits_when_the_last_slot_is_given_up_is_told():
    gate = ConcurrencyGate(1)
    gate.acquire()
    with ThreadPoolExecutor(1) as threads:
        waits = threads.submit(gate.acquire)
        until(lambda: len(gate._waiting) == 1)
        gate.give_up()
        with pytest.raises(SlotsExhausted):
            waits.result(10)
    gate.release(given_up=True)
    gate.acquire()


# Length and price.


@pytest.mark.parametrize(
    ("limits", "text", "shown"),
    [
        (ToolLimits(max_output_chars=10), "0123456789", "0123456789"),
        (
            ToolLimits(max_output_chars=4),
            "0123456789",
            "01\n... [truncated: 4 of 10 characters shown] ...\n89",
        ),
        (
            ToolLimits(max_output_chars=5, truncate="end"),
            "x" * 12345,
            "xxxxx\n... [truncated: 5 of 12,345 characters shown]",
        ),
        (ToolLimits(max_output_chars=1), "abc", "a\n... [truncated: 1 of 3 characters shown] ...\n"),
    ],
)
def test_a_long_result_is_cut_and_says_so(limits, text, shown):
    assert limits.shorten(text) == (shown, shown != text)


def test_results_and_mistakes_are_cut_alike_and_counted_with_their_price():
    @tool(max_output_chars=100, cost=lambda arguments: 0.5 * arguments["size"])
    def write(size: int) -> str:
        """Write."""
        if size < 0:
            raise ToolError("no" * 100)
        return "x" * size

    tools = Toolset([write])
    assert tools.call(call_of("write", size=100)).content == "x" * 100
    long = tools.call(call_of("write", size=1000))
    assert (long.truncated, long.cost) == (True, 500.0)
    assert "[truncated: 100 of 1,000 characters shown]" in long.content
    assert tools.call(call_of("write", size=-2)).truncated
    refused = tools.call(call_of("write", size="x"))
    assert (refused.cost, refused.truncated) == (0.0, False)
    tools.call(call_of("rite"))
    usage = tools.metrics["write"]
    assert (usage.num_calls, usage.num_failures, usage.num_truncated) == (4, 2, 2)
    assert usage.cost == 50.0 + 500.0 - 1.0
    assert usage.seconds >= usage.max_seconds > 0
    assert usage.mean_seconds == usage.seconds / 4
    assert tools.metrics[UNKNOWN_TOOL].num_failures == 1


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"timeout_s": 0}, "timeout_s must be above 0"),
        ({"max_output_chars": 0}, "max_output_chars must be at least 1"),
        ({"truncate": "start"}, "'middle' or 'end'"),
        ({"max_concurrency": 0}, "at least one slot"),
    ],
)
def test_limits_that_cannot_be_are_refused_when_the_tool_is_defined(options, words):
    with pytest.raises(ValueError, match=words):
        tool(**options)
