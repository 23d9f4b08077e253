"""Checks of what is paid: the oracle in full, a random player less, and a failure never."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Mapping
from typing import Any, NoReturn

from polyturn.envs.conformance.subject import (
    Nonconforming,
    Subject,
    Trace,
    innermost,
    play,
    play_async,
    policy_of,
)
from polyturn.envs.faults import EnvironmentFault
from polyturn.envs.messages import AssistantMessage, script_of
from polyturn.envs.played_env import PlayedEnv
from polyturn.envs.spaces import sample_arguments
from polyturn.tools.tool import Tool
from polyturn.tools.toolset import Toolset
from polyturn.tools.types import ToolCall


class _Planted(RuntimeError):
    """The failure that the kit plants."""


def check_oracle(subject: Subject) -> str:
    """The oracle scores 1.0 on tasks of every split."""
    count = 0
    with subject.open() as env:
        script = policy_of(env, "oracle")
        for split, source in subject.splits(env).items():
            for seed, task in enumerate(subject.tasks(source)):
                trace = play(env, script, seed=seed, task=task)
                count += 1
                if not trace.done:
                    raise Nonconforming(
                        f"the oracle's episode on task {task.task_id!r} of split {split!r} does not end"
                    )
                if not math.isclose(trace.reward, 1.0, abs_tol=1e-6):
                    raise Nonconforming(
                        f"the oracle scores {trace.reward:g} ({_parts(trace)}) on task {task.task_id!r} of split "
                        f"{split!r}: mend the grader, the task or the oracle, or weigh the parts so that they sum "
                        "up to 1"
                    )
    return f"1.0 on {count} tasks"


def check_random(subject: Subject) -> str:
    """A random player scores less than the oracle on every split."""
    means = []
    with subject.open() as env:
        for split, source in subject.splits(env).items():
            rewards = [
                play(env, policy_of(env, "random", seed), seed=seed, task=task).reward
                for seed, task in enumerate(subject.tasks(source))
            ]
            mean = sum(rewards) / len(rewards)
            if mean > 1 - 1e-6:
                raise Nonconforming(
                    f"a random player scores {mean:g} on split {split!r}, as much as the oracle: the grader pays "
                    "for anything"
                )
            means.append(f"{split} {mean:.2f}")
    return ", ".join(means)


def _parts(trace: Trace) -> str:
    return ", ".join(f"{name} {value:g}" for name, value in trace.reward_parts.items()) or "no parts"


def check_faults(subject: Subject) -> str:
    """A tool, a begin or a grade whose infrastructure fails is an `EnvironmentFault`, and never a reward."""
    seen = []
    with subject.open() as env:
        innermost(env).grade = _raise  # type: ignore[method-assign]
        if _faults(env, "grade"):
            seen.append("grade")
    with subject.open() as env:
        innermost(env).begin = _raise  # type: ignore[method-assign]
        if not _faults(env, "begin"):
            raise Nonconforming("a begin() that raises is not heard of: call it from reset, as ToolEnv does")
        seen.append("begin")
    with subject.open() as env:
        count = _check_tools(env)
    if count:
        seen.append(f"{count} tools")
    seen += _check_exits(subject)
    for index, sabotage in enumerate(subject.sabotage):
        with subject.open() as env:
            sabotage(env)
            if not _faults(env, f"what sabotage {index} broke"):
                raise Nonconforming(f"the oracle's episode does not notice what sabotage {index} broke")
        seen.append(f"sabotage {index}")
    return ", ".join(seen) if seen else "nothing could be broken from outside"


EXITS: tuple[type[BaseException], ...] = (
    StopIteration,
    SystemExit,
    KeyboardInterrupt,
    GeneratorExit,
    asyncio.CancelledError,
)
"""What ends an event loop, or makes it wait for ever, where it gets through. `sys.exit` and argparse raise one of them,
`next` on what is empty another."""


def _check_exits(subject: Subject) -> list[str]:
    """Awaited, as training plays, hooks raise what no coroutine may; it must come out as a fault like any other."""
    seen = []
    for hook in ("grade", "begin", "a tool"):
        with subject.open() as env:
            if hook == "a tool" and not env.tools:
                continue
            if asyncio.run(_all_exits(env, hook)):
                seen.append(f"{hook} that exits")
    return seen


async def _all_exits(env: PlayedEnv, hook: str) -> bool:
    """In one event loop, as an environment may expect."""
    return all([await _exits(env, hook, kind) for kind in EXITS])


async def _exits(env: PlayedEnv, hook: str, kind: type[BaseException]) -> bool:
    """Whether the hook was called; what it raised must then be a fault."""
    met = False

    def leave(*_: Any, **__: Any) -> NoReturn:
        nonlocal met
        met = True
        raise kind("planted by the conformance kit")

    async def leave_async(*_: Any, **__: Any) -> NoReturn:
        leave()

    inner = innermost(env)
    script = policy_of(env, "oracle")
    if hook == "a tool":
        spec = env.tools[0]
        function = leave_async if inner.toolset.is_async(spec.name) else leave
        call = ToolCall(id="call_0", name=spec.name, arguments=sample_arguments(spec.parameters))
        inner.toolset.close_state()
        inner.toolset = Toolset([Tool(spec=spec, function=function)])
        script = script_of(lambda: AssistantMessage(tool_calls=(call,)))
    else:
        setattr(inner, hook, leave)
    try:
        await play_async(env, script, seed=0)
    except EnvironmentFault:
        return met
    except BaseException as error:
        raise Nonconforming(
            f"{kind.__name__} in {hook} comes out of reset_async or step_async as {type(error).__name__}; it must be "
            "an EnvironmentFault: let ToolEnv call hooks and tools, as its step_async does"
        ) from error
    if met:
        raise Nonconforming(f"{kind.__name__} in {hook} was swallowed and the episode scored")
    return False


def _raise(*_: Any, **__: Any) -> NoReturn:
    raise _Planted("planted by the conformance kit")


def _faults(env: PlayedEnv, what: str) -> bool:
    """Whether the oracle's episode ran into the planted failure, which must then come out as a fault."""
    met = False
    planted = innermost(env).grade

    def noticing(*args: Any, **kwargs: Any) -> Any:
        nonlocal met
        met = True
        return planted(*args, **kwargs)

    if what == "grade":
        innermost(env).grade = noticing  # type: ignore[method-assign]
    try:
        play(env, policy_of(env, "oracle"), seed=0)
    except EnvironmentFault:
        return True
    except Exception as error:
        raise Nonconforming(
            f"a failure in {what} comes out as {type(error).__name__}: {error}; it must be an EnvironmentFault"
        ) from error
    if met or what not in ("grade", "begin"):
        raise Nonconforming(
            f"a failure in {what} was swallowed and the episode scored: let the exception out, so that it becomes an "
            "EnvironmentFault and not a reward"
        )
    return False


def _check_tools(env: PlayedEnv) -> int:
    """Break all tools, and call each as the oracle does, or else with arguments that its schema allows."""
    toolset = innermost(env).toolset
    broken = [Tool(spec=spec, function=_failing(toolset.is_async(spec.name))) for spec in toolset.specs]
    calls = _oracle_calls(env)
    toolset.close_state()
    innermost(env).toolset = Toolset(broken)
    for spec in env.tools:
        call = calls.get(spec.name) or ToolCall(
            id="call_0", name=spec.name, arguments=sample_arguments(spec.parameters)
        )
        env.reset(seed=0)
        try:
            _, _, _, _, info = env.step(AssistantMessage(tool_calls=(call,)))
        except EnvironmentFault:
            continue
        except Exception as error:
            raise Nonconforming(
                f"a failure in tool {spec.name!r} comes out as {type(error).__name__}: {error}; it must be an "
                "EnvironmentFault"
            ) from error
        if any(result.ok for result in info["tool_results"]) or spec.name in calls:
            raise Nonconforming(
                f"a failure in tool {spec.name!r} was swallowed: let the exception out; only a ToolError is for the "
                "model"
            )
    return len(broken)


def _failing(is_async: bool) -> Any:
    if not is_async:
        return _raise

    async def fail(**_: Any) -> NoReturn:
        _raise()

    return fail


def _oracle_calls(env: PlayedEnv) -> Mapping[str, ToolCall]:
    """The first call that the oracle makes of each tool."""
    calls: dict[str, ToolCall] = {}
    trace = play(env, policy_of(env, "oracle"), seed=0)
    for turn in trace.turns:
        for call in turn.action.tool_calls:
            calls.setdefault(call.name, call)
    return calls
