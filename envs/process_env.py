"""Environments in processes of their own: what blocks or holds the interpreter in one holds up nothing but its episode.

    player's process                       child, `python -m polyturn.envs.process_env OWNER`
    ProcessEnv.reset_async ---Reset--->    env.reset
                           <--Given----    observation and info
    ProcessEnv.step_async  ---Step---->    env.step

A message is a pickle behind its length: both ends are this package, and the child runs code that its user trusts. It is
a place for slow code, no sandbox. A child plays one episode after the other; it ends with its owner, and Ctrl-C is not
for it.
"""

from __future__ import annotations

import contextlib
import functools
import os
import pickle
import select
import struct
import subprocess
import sys
import time
import traceback
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, BinaryIO, get_args

import gymnasium
from gymnasium.envs.registration import load_env_creator

from polyturn.envs.faults import EnvironmentFault, UserFault, describe, message_of, printable
from polyturn.envs.hooks import StepLimits
from polyturn.envs.messages import AssistantMessage, Observation, Reward, Role
from polyturn.envs.played_env import PlayedEnv, StepResult, where_hooks_ran
from polyturn.envs.registry import find, make, register
from polyturn.envs.spaces import ChatSpace, ReplySpace
from polyturn.envs.tool_env import ToolEnv
from polyturn.tools.children import end_child, end_with, how_it_ended, start_child
from polyturn.tools.threads import Offload
from polyturn.tools.tool import OutOfTime
from polyturn.tools.types import ToolSpec

LENGTH = struct.Struct("<Q")
PROCESS = "process"
"""What of such an environment has failed where the rest of it cannot say."""
START_S = 120.0
"""How long a child may take to start and to make its environment."""
MARGIN_S = 10.0
"""How much longer than the limits of a reset or step its answer is waited for: the child sees to them itself."""
CLOSE_S = 5.0


@dataclass(frozen=True, kw_only=True, slots=True)
class Make:
    """Make the environment; answered by what was `Made`."""

    env_id: str
    entry_point: str
    """`module:name`, for an id that is not registered in the child."""
    registered: Mapping[str, Any]
    """Arguments of the constructor that it was registered with."""
    options: Mapping[str, Any]
    graded_by: Reward | None


@dataclass(frozen=True, kw_only=True, slots=True)
class Made:
    """What does not change of an environment."""

    tools: tuple[ToolSpec, ...]
    is_replayable: bool


@dataclass(frozen=True, kw_only=True, slots=True)
class Reset:
    """Begin an episode."""

    seed: int | None
    options: Mapping[str, Any] | None
    limits: StepLimits
    engine_urls: tuple[str, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class Step:
    """Answer a message."""

    action: AssistantMessage
    limits: StepLimits


@dataclass(frozen=True, kw_only=True, slots=True)
class Given:
    """What a call gave."""

    value: Any


@dataclass(frozen=True, kw_only=True, slots=True)
class Failed:
    """A call raised."""

    kind: str
    """One of `KINDS`: whose fault it is."""
    sentence: str
    trace: str
    """Where it was raised in the child."""


Request = Make | Reset | Step
KINDS: Mapping[str, type[Exception]] = {
    "user": UserFault,
    "environment": EnvironmentFault,
    "out_of_time": OutOfTime,
}


class RaisedInChild(Exception):
    """What an exception of the child is raised from: its text is the traceback there."""


def make_for_rollout(env_id: str, /, *, graded_by: Reward | None = None, **options: Any) -> PlayedEnv:
    """As `make`, in a process of its own where the environment's class says `hooks_run = "own_process"`.

    Args:
        graded_by: What grades in place of the environment's `grade`; None: nothing does.

    Raises:
        ValueError: as `make`; or another process could not import the environment, or what grades cannot be sent there.
        EnvironmentFault: the process died, or did not get so far in time.
    """
    find(env_id)
    creator = gymnasium.registry[env_id].entry_point
    kind = load_env_creator(creator) if isinstance(creator, str) else creator
    if isinstance(kind, type) and issubclass(kind, ToolEnv) and kind.hooks_run == "own_process":
        return ProcessEnv(env_id, options, graded_by=graded_by)
    env = make(env_id, **options)
    inner = env.unwrapped
    if isinstance(inner, ToolEnv) and inner.hooks_run == "own_process":
        # It is a function that makes it, so that nobody could know before.
        env.close()
        return ProcessEnv(env_id, options, graded_by=graded_by)
    if graded_by is not None:
        env.graded_by = graded_by
    return env


class ProcessEnv(PlayedEnv):
    """Stands for an environment that lives in a child, which it waits for in a thread. Close it at the end."""

    def __init__(self, env_id: str, options: Mapping[str, Any], *, graded_by: Reward | None = None) -> None:
        """Start the child and have it make the environment. Raises as `make_for_rollout`."""
        self._id = env_id
        info = find(env_id)
        if info.entry_point.startswith("__main__:"):
            raise ValueError(
                f"{env_id} says hooks_run = 'own_process', but no other process can import it from the program itself; "
                "move it into a module"
            )
        self._child: _Child | None = _Child()
        try:
            made: Made = self._ask(
                Make(
                    env_id=env_id,
                    entry_point=info.entry_point,
                    registered=info.kwargs,
                    options=options,
                    graded_by=graded_by,
                ),
                START_S,
            )
        except BaseException:
            self.close()
            raise
        self._tools, self.is_replayable = made.tools, made.is_replayable
        self.action_space = ReplySpace(self._tools)
        self.observation_space = ChatSpace(tuple(get_args(Role)))

    @property
    def env_id(self) -> str:
        return self._id

    @property
    def tools(self) -> tuple[ToolSpec, ...]:
        return self._tools

    @property
    def is_reusable(self) -> bool:
        return super().is_reusable and self._child is not None and self._child.is_alive

    @where_hooks_ran
    def close(self) -> None:
        """Let the child close its environment, and end it."""
        child, self._child = self._child, None
        if child is not None:
            child.close()
        super().close()

    async def _reset(
        self, seed: int | None, options: dict[str, Any] | None, offload: Offload
    ) -> tuple[Observation, dict[str, Any]]:
        self._task = (options or {}).get("task")
        request = Reset(seed=seed, options=options, limits=self.step_limits, engine_urls=self.engine_urls)
        given: tuple[Observation, dict[str, Any]] = await self._answer(request, offload)
        return given

    async def _step(self, action: AssistantMessage, offload: Offload) -> StepResult:
        if action not in self.action_space:
            raise ValueError(f"an action is an AssistantMessage, not {type(action).__name__}")
        given: StepResult = await self._answer(Step(action=action, limits=self.step_limits), offload)
        return given

    async def _answer(self, request: Reset | Step, offload: Offload) -> Any:
        limits = request.limits
        hooks_s, tools_s = limits.hook_timeout_s, limits.tools_timeout_s
        timeout_s = None
        if hooks_s is not None and tools_s is not None:
            # Setting up tools and `begin`, or `follow_up` and a grade that another reward may go with.
            timeout_s = 3 * hooks_s + tools_s + MARGIN_S
        return await offload(functools.partial(self._ask, request, timeout_s))

    def _ask(self, request: Request, timeout_s: float | None) -> Any:
        """The child's answer. Raises what of `KINDS` the environment raised, or that the child is gone."""
        if self._child is None:
            raise EnvironmentFault(f"{self._id}: its process has ended").of(PROCESS)
        try:
            answer = self._child.ask(request, timeout_s)
        except (_ChildEnded, TimeoutError) as fault:
            self._child.kill()
            raise EnvironmentFault(f"{self._id}: {fault}").of(PROCESS) from fault
        if isinstance(answer, Given):
            return answer.value
        kind = ValueError if isinstance(request, Make) else KINDS[answer.kind]
        raise kind(answer.sentence) from RaisedInChild(answer.trace)


class _ChildEnded(Exception):
    """The process has ended, and this is how."""


@dataclass(slots=True)
class _Child:
    """A process that holds an environment. One call at a time."""

    _process: subprocess.Popen[bytes] = field(default_factory=lambda: _start())

    @property
    def is_alive(self) -> bool:
        return self._process.poll() is None

    def ask(self, request: Request, timeout_s: float | None) -> Given | Failed:
        """Raises `_ChildEnded`, `TimeoutError` where no answer came in time, and `ValueError`: it cannot be sent."""
        try:
            message = pickle.dumps(request)
        except (pickle.PicklingError, TypeError, AttributeError) as error:
            raise ValueError(
                f"hooks_run = 'own_process': what the environment is given cannot be sent to another process: {error}"
            ) from error
        deadline = None if timeout_s is None else time.monotonic() + timeout_s
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(LENGTH.pack(len(message)) + message)
            self._process.stdin.flush()
        except (BrokenPipeError, ValueError) as error:
            raise self._end() from error
        (length,) = LENGTH.unpack(self._read(LENGTH.size, deadline))
        answer: Given | Failed = pickle.loads(self._read(length, deadline))
        return answer

    def _read(self, num_bytes: int, deadline: float | None) -> bytes:
        assert self._process.stdout is not None
        stdout = self._process.stdout.fileno()
        poll = select.poll()
        poll.register(stdout, select.POLLIN)
        parts: list[bytes] = []
        while num_bytes:
            left_s = None if deadline is None else max(0.0, deadline - time.monotonic())
            if not poll.poll(None if left_s is None else left_s * 1000):
                raise TimeoutError("its process did not answer in time, and was killed")
            part = os.read(stdout, min(num_bytes, 1 << 20))
            if not part:
                raise self._end()
            parts.append(part)
            num_bytes -= len(part)
        return b"".join(parts)

    def _end(self) -> _ChildEnded:
        return _ChildEnded(f"its process {how_it_ended(self._process.wait())}")

    def close(self) -> None:
        """Let it close its environment: it does at the end of its input."""
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError):  # it has ended
            self._process.stdin.close()
        end_child(self._process, wait_s=CLOSE_S)
        assert self._process.stdout is not None
        self._process.stdout.close()

    def kill(self) -> None:
        end_child(self._process)


def _start() -> subprocess.Popen[bytes]:
    return start_child(
        [sys.executable, "-m", "polyturn.envs.process_env", str(os.getpid())],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        # What this program can import, the child can.
        env={**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)},
    )


class _Held:
    """The environment in the child."""

    env: PlayedEnv | None = None

    def answer(self, request: Request) -> Any:
        """What a request asks for. Raises what the environment raises."""
        if isinstance(request, Make):
            self.env = _made(request)
            return Made(tools=self.env.tools, is_replayable=self.env.is_replayable)
        assert self.env is not None, "nothing was made"
        self.env.step_limits = request.limits
        if isinstance(request, Reset):
            self.env.engine_urls = request.engine_urls
            options = None if request.options is None else dict(request.options)
            return self.env.reset(seed=request.seed, options=options)
        return self.env.step(request.action)

    def close(self) -> None:
        """Close it."""
        if self.env is not None:
            self.env.close()


def _made(request: Make) -> PlayedEnv:
    try:
        find(request.env_id)
    except ValueError:
        register(request.env_id, request.entry_point, kwargs=dict(request.registered))
    env = make(request.env_id, **request.options)
    if request.graded_by is not None:
        env.graded_by = request.graded_by
    return env


def serve(requests: BinaryIO, answers: BinaryIO) -> None:
    """Answer requests until there are no more."""
    held = _Held()
    try:
        while len(head := requests.read(LENGTH.size)) == LENGTH.size:
            (length,) = LENGTH.unpack(head)
            request: Request = pickle.loads(requests.read(length))
            message = _message(held, request)
            answers.write(LENGTH.pack(len(message)) + message)
            answers.flush()
    finally:
        held.close()


def _message(held: _Held, request: Request) -> bytes:
    """The answer to a request as bytes, whatever comes of it."""
    try:
        return pickle.dumps(Given(value=held.answer(request)))
    except Exception as error:  # noqa: BLE001  the border of one episode
        kind = next((name for name, kind in KINDS.items() if isinstance(error, kind)), None)
        sentence = describe(error) if kind is None else message_of(error)
        # A fault says itself what failed: where it came from is what it was made of.
        origin = error if kind is None else error.__cause__ or error
        trace = printable("".join(traceback.format_exception(origin)))
        return pickle.dumps(Failed(kind=kind or "environment", sentence=sentence, trace=trace))


def main(owner: int) -> None:
    """Serve the owner through standard input and output, which is taken away from everything that prints."""
    end_with(owner)
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    serve(sys.stdin.buffer, answers)


if __name__ == "__main__":
    # What is pickled is of the module by its own name.
    from polyturn.envs.process_env import main as named_main

    named_main(int(sys.argv[1]))
