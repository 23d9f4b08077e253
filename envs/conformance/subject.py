"""The environment under a check: how it is made, played by scripts and given deadlines, and what is found."""

from __future__ import annotations

import asyncio
import contextlib
import sys
import threading
import traceback
from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass, field
from typing import Any, Literal, TypeVar

from polyturn.envs.messages import AssistantMessage, Message, Observation, Script, Task, TaskSource
from polyturn.envs.played_env import PlayedEnv
from polyturn.envs.tool_env import ToolEnv

COMMON_SPLITS = ("train", "validation", "heldout", "test")


class Nonconforming(Exception):
    """Raised by a check; the text says what was seen and what to do about it."""


class Unavailable(Exception):
    """What the environment runs on is not there, such as a sandbox or an optional package: nothing can be said."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Finding:
    """What one check found."""

    check: str
    ok: bool
    message: str
    """What was seen, and where it is not ok what to do about it."""
    seconds: float = 0.0


@dataclass(frozen=True, kw_only=True, slots=True)
class Subject:
    """An environment to check, and how hard."""

    name: str
    make: Callable[[], PlayedEnv]
    """A fresh instance each time."""
    num_tasks: int = 8
    """Tasks of each split that the oracle and the random policy play."""
    num_episodes: int = 1000
    """Episodes that are played at the same time, fewer where they would take longer than the budget."""
    budget_s: float = 5.0
    """About how long a check may go on repeating episodes."""
    answer_s: float = 5.0
    """How long one step may take to answer a message that was made to be hard."""
    form_parts: tuple[str, ...] = ("format",)
    """Reward parts that are for the form of an answer and not for what it says; a probe may earn them."""
    sabotage: tuple[Callable[[PlayedEnv], None], ...] = ()
    """Functions that break what stands behind a new environment; the oracle's next episode must then be a fault."""

    @contextlib.contextmanager
    def open(self) -> Iterator[PlayedEnv]:
        """A fresh instance that is closed at the end."""
        env = self.make()
        try:
            yield env
        finally:
            env.close()

    def splits(self, env: PlayedEnv) -> dict[str, TaskSource]:
        """The splits that the environment has: those it names in an attribute `splits`, and the common ones."""
        found: dict[str, TaskSource] = {}
        for split in dict.fromkeys((*getattr(innermost(env), "splits", ()), *COMMON_SPLITS)):
            try:
                source = env.tasks(split)
            except ValueError:
                continue
            except Exception as error:
                raise Nonconforming(
                    f"tasks({split!r}) raised {type(error).__name__}: {error}; "
                    "raise a ValueError that names the splits for one that does not exist"
                ) from error
            if len(source):
                found[split] = source
        if not found:
            raise Nonconforming(
                f"none of the splits {', '.join(COMMON_SPLITS)} has a task; define `tasks(split)`, "
                "and name unusual splits in an attribute `splits`"
            )
        return found

    def tasks(self, source: TaskSource) -> list[Task]:
        """`num_tasks` of a split at most, spread evenly over it."""
        count = min(self.num_tasks, len(source))
        return [source[index * len(source) // count] for index in range(count)]


def innermost(env: PlayedEnv) -> ToolEnv:
    """The environment inside of wrappers."""
    inner = env.unwrapped
    assert isinstance(inner, ToolEnv), "the kit makes environments in its own process"
    return inner


Value = TypeVar("Value")


class Hung(Nonconforming):
    """Something did not end in time; its thread is still at it."""


def within(seconds: float, function: Callable[[], Value], what: str) -> Value:
    """The function's value, if it comes in time.

    It runs in a thread of its own, which cannot be ended: whoever catches `Hung` should end the process before long.
    Something that holds the interpreter's lock is beyond this; `runner.py` ends that from another process.

    Raises:
        Hung: it does not; the text is `what` and the place where the function is.
    """
    values: list[Value] = []
    errors: list[BaseException] = []

    def run() -> None:
        try:
            values.append(function())
        except BaseException as error:  # noqa: BLE001  it is raised again by whoever waits
            errors.append(error)

    thread = threading.Thread(target=run, name="conformance check", daemon=True)
    thread.start()
    thread.join(seconds)
    if thread.is_alive():
        raise Hung(f"{what} (now at {_place(thread)})")
    if errors:
        raise errors[0]
    return values[0]


def _place(thread: threading.Thread) -> str:
    frame = sys._current_frames().get(thread.ident or 0)
    if frame is None:
        return "an unknown place"
    stack = traceback.extract_stack(frame)
    return " < ".join(f"{entry.name} in {entry.filename}:{entry.lineno}" for entry in reversed(stack[-4:]))


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


def policy_of(env: PlayedEnv, name: PolicyName, seed: int = 0) -> Script:
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
    env: PlayedEnv, script: Script, *, seed: int, task: Task | None = None, max_turns: int = MAX_TURNS
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
    env: PlayedEnv, script: Script, *, seed: int, slots: asyncio.Semaphore | None = None
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
