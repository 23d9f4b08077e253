"""Scripted episodes of the conformance kit, in a form that can be compared."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Generator
from dataclasses import dataclass, field
from typing import Any, Literal

from polyturn.envs.conformance.findings import Nonconforming
from polyturn.envs.messages import AssistantMessage, Message, Observation
from polyturn.envs.scripts import Script
from polyturn.envs.tasks import Task
from polyturn.envs.tool_env import ToolEnv

MAX_TURNS = 64
"""Where the kit ends an episode of an environment that has no limit of its own."""

PolicyName = Literal["oracle", "random"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Turn:
    """One action and what came of it. What was returned is kept as it is, `info` aside, which is not compared."""

    action: AssistantMessage
    observation: Observation
    reward: float
    terminated: bool
    truncated: bool
    info: dict[str, Any] = field(compare=False, repr=False)


@dataclass(frozen=True, kw_only=True, slots=True)
class Trace:
    """One episode. Equal traces are equal in task, messages, rewards and flags."""

    task_id: str
    role: str
    """Who acts first, in an environment with several roles."""
    first: Observation
    turns: tuple[Turn, ...]

    @property
    def reward(self) -> float:
        return sum(turn.reward for turn in self.turns)

    @property
    def reward_parts(self) -> dict[str, float]:
        """The parts of all steps, summed by name."""
        parts: dict[str, float] = {}
        for turn in self.turns:
            for name, value in turn.info.get("reward_parts", {}).items():
                parts[name] = parts.get(name, 0.0) + value
        return parts

    @property
    def done(self) -> bool:
        return bool(self.turns) and (self.turns[-1].terminated or self.turns[-1].truncated)


def policy_of(env: ToolEnv, name: PolicyName, seed: int = 0) -> Script:
    """The script that the environment carries under that name."""
    if name == "random":
        return env.random_policy(seed)
    if env.oracle is None:
        raise Nonconforming(
            "there is no oracle; give the class `oracle(messages, tools)`, a script that scores 1.0 on every task: "
            "without one nobody knows whether the task can be solved"
        )
    return env.oracle


Request = tuple[Literal["reset", "step"], Any]


def _episode(script: Script, seed: int, task: Task | None, max_turns: int) -> Generator[Request, Any, Trace]:
    """The episode as requests to whoever drives the environment."""
    observation, info = yield "reset", (seed, {} if task is None else {"task": task})
    first: Observation = observation
    messages: list[Message] = list(first)
    turns: list[Turn] = []
    for _ in range(max_turns):
        action = script(tuple(messages), info["tools"])
        observation, reward, terminated, truncated, step_info = yield "step", action
        turns.append(
            Turn(
                action=action,
                observation=observation,
                reward=reward,
                terminated=terminated,
                truncated=truncated,
                info=step_info,
            )
        )
        messages += [action.to_message(), *observation]
        if terminated or truncated:
            break
    return Trace(task_id=info["task_id"], role=info.get("role", ""), first=first, turns=tuple(turns))


def play(
    env: ToolEnv, script: Script, *, seed: int, task: Task | None = None, max_turns: int = MAX_TURNS
) -> Trace:
    """Play an episode."""
    episode = _episode(script, seed, task, max_turns)
    answer: Any = None
    while True:
        try:
            kind, argument = episode.send(answer)
        except StopIteration as end:
            return end.value
        if kind == "reset":
            answer = env.reset(seed=argument[0], options=argument[1])
        else:
            answer = env.step(argument)


async def play_async(
    env: ToolEnv, script: Script, *, seed: int, slots: asyncio.Semaphore | None = None
) -> Trace:
    """Play an episode as training does, with what is not `async` in the environment's thread.

    `slots` bounds how many resets and steps run at once, of all that share it.
    """
    episode = _episode(script, seed, None, MAX_TURNS)
    answer: Any = None
    while True:
        try:
            kind, argument = episode.send(answer)
        except StopIteration as end:
            return end.value
        async with slots or contextlib.nullcontext():
            if kind == "reset":
                answer = await env.reset_async(seed=argument[0], options=argument[1])
            else:
                answer = await env.step_async(argument)


def difference(one: Trace, other: Trace) -> str:
    """Where two traces part, in a few words; empty if they do not."""
    if one == other:
        return ""
    if one.task_id != other.task_id:
        return f"the task is {one.task_id!r} the one time and {other.task_id!r} the other"
    if one.first != other.first:
        return (
            f"on task {one.task_id!r} the first observation is {_short(one.first)} and {_short(other.first)}"
        )
    for number, (left, right) in enumerate(zip(one.turns, other.turns, strict=False), start=1):
        for name in ("action", "observation", "reward", "terminated", "truncated"):
            a, b = getattr(left, name), getattr(right, name)
            if a != b:
                return f"on task {one.task_id!r} the {name} of turn {number} is {_short(a)} and {_short(b)}"
    return f"on task {one.task_id!r} there are {len(one.turns)} turns and {len(other.turns)}"


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 120 else f"{text[:117]}..."
