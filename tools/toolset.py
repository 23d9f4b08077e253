"""A set of tools that answers calls. A model's mistake is answered in words that help it mend the call."""

from __future__ import annotations

import asyncio
import functools
import inspect
import json
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, TypeVar

from polyturn.tools.arguments import ArgumentChecker, nearest, not_made
from polyturn.tools.plain import clean_text, shown, unfit
from polyturn.tools.schemas import plain
from polyturn.tools.threads import Blocking, GivenUp, Offload, PinnedThread
from polyturn.tools.tool import (
    MAX_RESULT_CHARS,
    OutOfTime,
    SlotsExhausted,
    StateFactory,
    StatefulTool,
    Tool,
    as_state_factory,
    as_tool,
    tools_of,
)
from polyturn.tools.types import UNKNOWN_TOOL, ToolCall, ToolError, ToolResult, ToolSpec, ToolUsage

State = TypeVar("State", bound=StatefulTool)
ToolLike = Tool | Callable[..., Any] | type[StatefulTool] | StateFactory
MAX_NAME = 64
"""Characters of a name that is no tool's which the model is shown again."""
_UNPRINTABLE = "for integer string conversion"
"""In what Python says of an integer of too many digits."""


class Toolset:
    """Tools by name, for one episode at a time.

    Raises:
        ValueError: two tools share a name, or the parameters of one are no JSON schema.
    """

    def __init__(self, tools: Iterable[ToolLike] = ()) -> None:
        self._tools: dict[str, Tool] = {}
        self._factories: list[StateFactory] = []
        self._states: list[StatefulTool] = []
        self._stateful_names: set[str] = set()
        for item in tools:
            factory = as_state_factory(item)
            if factory is not None:
                self._factories.append(factory)
                unbound = list(tools_of(factory.state_class))
                self._stateful_names.update(tool.spec.name for tool in unbound)
            for tool in [_as_tool(item)] if factory is None else unbound:
                if tool.spec.name in self._tools:
                    raise ValueError(f"two tools are called {tool.spec.name!r}")
                self._tools[tool.spec.name] = tool
        self._checkers = {
            name: ArgumentChecker(name, tool.spec.parameters, tool.types)
            for name, tool in self._tools.items()
        }
        self._async_names = frozenset(name for name, tool in self._tools.items() if tool.is_async)
        self._usage: dict[str, ToolUsage] = {}
        self.max_result_chars: int | None = MAX_RESULT_CHARS
        """Characters that the model is shown of the result of a tool that sets no limit of its own. None: all."""
        self._lock = threading.Lock()
        self._num_given_up = 0
        self._num_still_running = 0

    @property
    def specs(self) -> tuple[ToolSpec, ...]:
        return tuple(tool.spec for tool in self._tools.values())

    def is_async(self, name: str) -> bool:
        """Whether the tool of that name must be awaited; False for a name that no tool has."""
        return name in self._async_names

    @property
    def has_async(self) -> bool:
        return bool(self._async_names)

    @property
    def has_deadlines(self) -> bool:
        """Whether a tool that is not asynchronous has a deadline, and so cannot run where it is called."""
        return any(
            tool.limits.timeout_s is not None and name not in self._async_names
            for name, tool in self._tools.items()
        )

    @property
    def needs_thread(self) -> bool:
        """Whether there is anything that is not asynchronous."""
        return self.is_stateful or len(self._async_names) < len(self._tools)

    @property
    def metrics(self) -> Mapping[str, ToolUsage]:
        """Calls since the set was made, by tool; calls of tools that do not exist under `(unknown)`."""
        return dict(self._usage)

    @property
    def num_given_up(self) -> int:
        """Calls that were given up while they ran, because a thread cannot be killed."""
        return self._num_given_up

    @property
    def num_still_running(self) -> int:
        """Those of `num_given_up` whose thread has not ended yet. It may still touch what the tool touches."""
        return self._num_still_running

    def call(self, call: ToolCall, *, left_s: float | None = None) -> ToolResult:
        """Answer one call.

        Args:
            call: The call.
            left_s: What the call may take, wait for a slot excluded, whatever the tool's own deadline.

        Raises:
            Exception: whatever a tool raises beside `ToolError`: the infrastructure behind it failed.
            OutOfTime: it did not return in `left_s`.
            RuntimeError: the tool is asynchronous; use `call_async`.
        """
        prepared = self._prepare(call)
        if isinstance(prepared, ToolResult):
            return self._counted(prepared)
        if call.name in self._async_names:
            raise RuntimeError(f"tool {call.name!r} is asynchronous: await call_async")
        run, tool = prepared
        asked = started = time.perf_counter()
        if tool.limits.gate is not None:
            tool.limits.gate.acquire()
            started = time.perf_counter()
        answer = self._run(run, tool, left_s)
        return self._counted(
            _result(call, tool, answer, started - asked, time.perf_counter() - started, self.max_result_chars)
        )

    async def call_async(
        self,
        call: ToolCall,
        *,
        offload: Offload | None = None,
        left_s: float | None = None,
        queue_timeout_s: float | None = None,
    ) -> ToolResult:
        """Answer one call, awaiting an asynchronous tool. Raises as `call`.

        With an offload that blocks, nothing is awaited for a tool that is not asynchronous.

        Args:
            call: The call.
            offload: Where a synchronous tool runs; None: where it stands.
            left_s: As in `call`.
            queue_timeout_s: How long it may wait for a slot.

        Raises:
            SlotsExhausted: no slot became free in time.
        """
        prepared = self._prepare(call)
        if isinstance(prepared, ToolResult):
            return self._counted(prepared)
        run, tool = prepared
        asked = started = time.perf_counter()
        is_async = call.name in self._async_names
        if tool.limits.gate is not None and isinstance(offload, Blocking) and not is_async:
            tool.limits.gate.acquire()
            started = time.perf_counter()
        elif tool.limits.gate is not None:
            try:
                async with asyncio.timeout(queue_timeout_s):
                    await tool.limits.gate.acquire_async()
            except TimeoutError:
                raise SlotsExhausted(f"no slot became free within {queue_timeout_s:g} s") from None
            started = time.perf_counter()
        if is_async or offload is None:
            answer = await self._run_async(run, tool, left_s)
        else:
            answer = await self._run_elsewhere(run, tool, offload, left_s)
        return self._counted(
            _result(call, tool, answer, started - asked, time.perf_counter() - started, self.max_result_chars)
        )

    def complaint(self, call: ToolCall) -> str | None:
        """What is wrong with a call, for the model to read; None if it can be made."""
        return self._unfit(call) or self._checkers[call.name].complaint(call.arguments)

    def _unfit(self, call: ToolCall) -> str | None:
        """What is wrong with a call before its arguments are compared with what the tool takes."""
        if call.error is not None:
            return call.error
        if call.name not in self._tools:
            near = nearest(call.name, self._tools)
            return f"There is no tool {shown(call.name, limit=MAX_NAME)}{near}. {self._listing()}"
        for name, value in call.arguments.items():
            if type(value) is str and value.isascii():
                continue
            if problem := unfit(value, where=shown(name, limit=MAX_NAME).strip("'")):
                return not_made(call.name, problem)
        return None

    # Tools with a state for each episode.

    @property
    def is_stateful(self) -> bool:
        """Whether there is anything to open."""
        return bool(self._factories)

    def open_state(self, task: Any, rng: Any) -> None:
        """Make and set up the tools that live for one episode; what an earlier episode left is closed first."""
        self.close_state()
        for factory in self._factories:
            state = factory()
            self._states.append(state)
            state.setup(task, rng)
            for tool in tools_of(state):
                self._tools[tool.spec.name] = tool
        self._stateful_names.clear()

    def close_state(self) -> None:
        """Close what `open_state` made, all of it even if one fails. Calling it again does nothing."""
        states, self._states = self._states, []
        failures: list[Exception] = []
        for state in reversed(states):
            try:
                state.close()
            except Exception as error:  # noqa: BLE001  the others must be closed all the same
                failures.append(error)
        if failures:
            raise failures[0]

    def state_of(self, kind: type[State]) -> State:
        """The episode's instance of a `StatefulTool` class.

        Raises:
            LookupError: there is none, or it has not been opened.
        """
        for state in self._states:
            if isinstance(state, kind):
                return state
        raise LookupError(f"no {kind.__name__} is open: is it among the tools, and was there a reset?")

    # How a call runs.

    def _prepare(self, call: ToolCall) -> tuple[Callable[[], Any], Tool] | ToolResult:
        """What to run, its arguments converted; or the complaint."""
        complaint = self._unfit(call)
        if complaint is None:
            tool = self._tools[call.name]
            values, complaint = self._checkers[call.name].read(call.arguments)
            if complaint is None and call.name in self._stateful_names:
                raise RuntimeError(f"tool {call.name!r} lives for one episode: open_state() comes first")
            if complaint is None:
                return functools.partial(tool.function, **values), tool
        name = call.name if call.name in self._tools else clean_text(call.name[:MAX_NAME])
        return ToolResult(call_id=clean_text(call.id), name=name, content=clean_text(complaint), ok=False)

    def _run(self, run: Callable[[], Any], tool: Tool, left_s: float | None) -> _Answer:
        """Run a synchronous tool whose slot is taken; with a deadline, in a thread of its own. Gives the slot back."""
        running = _Running(self, run, tool)
        timeout_s = _earlier(tool.limits.timeout_s, left_s)
        try:
            if timeout_s is None:
                return running.work(), True, False
            return PinnedThread("tool with a deadline").call(running.work, timeout_s=timeout_s), True, False
        except (ToolError, ArithmeticError, ValueError) as error:
            return _words_for_model(error, tool), False, False
        except GivenUp:
            return _late(tool, left_s)
        finally:
            running.leave()

    async def _run_async(self, run: Callable[[], Any], tool: Tool, left_s: float | None) -> _Answer:
        """Run a tool whose slot is taken, awaiting what it gives; gives the slot back."""
        deadline = asyncio.timeout(_earlier(tool.limits.timeout_s, left_s))
        try:
            async with deadline:
                value = run()
                value = await value if inspect.isawaitable(value) else value
            if not deadline.expired():
                return value, True, False
        except (ToolError, ArithmeticError, ValueError) as error:
            return _words_for_model(error, tool), False, False
        except TimeoutError:
            if not deadline.expired():
                raise
        finally:
            if tool.limits.gate is not None:
                tool.limits.gate.release()
        return _late(tool, left_s)

    async def _run_elsewhere(
        self, run: Callable[[], Any], tool: Tool, offload: Offload, left_s: float | None
    ) -> _Answer:
        """As `_run`, by `offload`."""
        running = _Running(self, run, tool)
        timeout_s = _earlier(tool.limits.timeout_s, left_s)
        try:
            if isinstance(offload, PinnedThread | Blocking) or tool.limits.timeout_s is None:
                value = await offload(running.work, timeout_s=timeout_s, what=running.what)
            else:  # on the event loop, where nothing could end it
                value = await PinnedThread("tool with a deadline")(running.work, timeout_s=timeout_s)
            return value, True, False
        except (ToolError, ArithmeticError, ValueError) as error:
            return _words_for_model(error, tool), False, False
        except GivenUp:
            return _late(tool, left_s)
        finally:
            running.leave()

    def _count_running(self, change: int) -> None:
        """One more call was given up while it ran, or one of those has ended."""
        with self._lock:
            self._num_given_up += max(change, 0)
            self._num_still_running += change

    def _counted(self, result: ToolResult) -> ToolResult:
        name = result.name if result.name in self._tools else UNKNOWN_TOOL
        usage = ToolUsage.of(result)
        self._usage[name] = self._usage[name] + usage if name in self._usage else usage
        return result

    def _listing(self) -> str:
        return f"The tools are: {', '.join(self._tools)}." if self._tools else "No tools can be called here."

    def __iter__(self) -> Iterator[Tool]:
        return iter(self._tools.values())


_Answer = tuple[Any, bool, bool]
"""The value, whether it is what the tool gave, and whether the tool was too slow."""


class _Running:
    """One call of a synchronous tool. It may outlast whoever waits for it, and keeps its slot until it really ends."""

    def __init__(self, toolset: Toolset, run: Callable[[], Any], tool: Tool) -> None:
        self.what = f"tool {tool.spec.name!r}"
        self._toolset, self._run, self._gate = toolset, run, tool.limits.gate
        self._lock = threading.Lock()
        self._begun = self._left = self._ended = False

    def work(self) -> Any:
        """The tool's value; nothing if nobody waits any more."""
        with self._lock:
            if self._left:
                return None
            self._begun = True
        try:
            return self._run()
        finally:
            with self._lock:
                self._ended = True
                given_up = self._left
            if given_up:
                self._toolset._count_running(-1)
            if self._gate is not None:
                self._gate.release(given_up=given_up)

    def leave(self) -> None:
        """Nobody waits any more. A call that has not begun will not; one that has not ended is given up."""
        with self._lock:
            if self._left or self._ended:
                return
            self._left = True
            if self._begun:
                self._toolset._count_running(1)
                if self._gate is not None:
                    self._gate.give_up()
            elif self._gate is not None:
                self._gate.release()


def _earlier(own_s: float | None, left_s: float | None) -> float | None:
    return left_s if own_s is None else own_s if left_s is None else min(own_s, left_s)


def _late(tool: Tool, left_s: float | None) -> _Answer:
    """What the model is told of a call that took too long. Raises `OutOfTime` where there is no time for more."""
    own_s = tool.limits.timeout_s
    if own_s is None or (left_s is not None and left_s < own_s):
        raise OutOfTime(f"tool {tool.spec.name!r} did not return within the {left_s:.3g} s that were left")
    return _too_slow(tool), False, True


def _as_tool(item: Any) -> Tool:
    return item if isinstance(item, Tool) else as_tool(item)


def _too_slow(tool: Tool) -> str:
    limit = f"{tool.limits.timeout_s:g} s"
    return (
        f"The call of {tool.spec.name!r} was stopped: it took longer than {limit}. It may have had effects."
    )


def _words_for_model(error: Exception, tool: Tool) -> str:
    """What a model reads of its mistake. Raises the error again where it is none of the model's.

    Numbers that are too large for a float or to be printed come from the arguments, whoever computed them.
    """
    if isinstance(error, ToolError):
        return str(error)
    if isinstance(error, OverflowError) or _UNPRINTABLE in str(error):
        return f"The call of {tool.spec.name!r} failed: its numbers are too large ({error})."
    raise error


def _result(
    call: ToolCall, tool: Tool, answer: _Answer, queue_s: float, seconds: float, max_chars: int | None
) -> ToolResult:
    value, ok, timed_out = answer
    try:
        text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=plain)
    except ValueError as error:
        text, ok = _words_for_model(error, tool), False
    text, truncated = tool.limits.shorten(text, max_chars)
    text = clean_text(text)
    return ToolResult(
        call_id=clean_text(call.id),
        name=call.name,
        content=text,
        ok=ok,
        seconds=seconds,
        queue_s=queue_s,
        cost=tool.limits.cost_of(call.arguments) if tool.limits.cost else 0.0,
        truncated=truncated,
        timed_out=timed_out,
    )
