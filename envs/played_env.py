"""An environment as whoever plays it holds it: stepped in messages, with an event loop or without.

What authors write is a `ToolEnv`. One with Gymnasium's wrappers around it (`envs.wrappers`) and one in a process of its
own (`envs.process_env`) are played in the same way.
"""

from __future__ import annotations

import asyncio
import functools
import weakref
from collections.abc import Callable, Coroutine
from typing import Any, TypeVar

import gymnasium

from polyturn.envs.hooks import NO_LIMITS, StepLimits, current_task
from polyturn.envs.messages import AssistantMessage, Observation, Reward, Script, Task, TaskSource
from polyturn.envs.spaces import ReplySpace, random_script
from polyturn.tools.threads import Blocking, GivenUp, Offload, PinnedThread, inline
from polyturn.tools.types import ToolSpec

Value = TypeVar("Value")
StepResult = tuple[Observation, float, bool, bool, dict[str, Any]]
CLOSE_S = 60.0
"""How long `close` may take in the environment's own thread."""


class PlayedEnv(gymnasium.Env[Observation, AssistantMessage]):
    """Reset and stepped, or awaited, within limits; and what a player may ask of it.

    A kind of it says in `_reset` and `_step` what happens. Both get an `Offload` to run what may block.
    """

    action_space: ReplySpace
    step_limits: StepLimits = NO_LIMITS
    """What a reset or step may take; whoever plays sets it."""
    engine_urls: tuple[str, ...] = ()
    """Where the engines of the policy that plays answer chat requests, up to and with `/v1`: for simulated users that
    they play. Whoever plays sets it; empty where there are none."""
    graded_by: Reward | None = None
    """Grades in place of the environment's own grade where it is set. A task's own reward goes before both."""
    oracle: Script | None = None
    """A script that scores 1.0 on every task; a method may read `self.task`. The conformance kit plays it."""
    is_replayable: bool = False
    """Whether the environment can be rebuilt: reset with the same seed and task, and stepped with the same actions, it
    says the same, whoever played in between. Then episodes can branch in it (`rollout.branching`); the conformance kit
    holds those to it that say so. A subclass of a `ToolEnv` does not inherit it."""

    _hook_thread: PinnedThread | None = None
    _hook_loop: asyncio.Runner | None = None
    _task: Task | None = None

    @property
    def unwrapped(self) -> PlayedEnv:
        """What its author wrote; itself where that is not in this process."""
        return self

    def tasks(self, split: str) -> TaskSource:
        """The tasks of a split. Raises `ValueError` for a split that does not exist."""
        raise ValueError(f"{self.env_id} has no tasks of split {split!r}")

    def check_label(self, label: Any) -> None:
        """Raise `ValueError` for a label that no answer is paid for. Asked of tasks before a run starts."""
        del label

    def answer_of(self, message: AssistantMessage) -> str | None:
        """What the message that ends an episode answers, in a form in which equal answers are equal; None: it gives no
        answer. Evaluations count them (majority@k, no-answer rate)."""
        return None if message.tool_calls else message.content.strip() or None

    def random_policy(self, seed: int) -> Script:
        """A script that acts at random and scores less than the oracle: by default any messages of the action space."""
        return random_script(self.action_space, seed)

    @property
    def tools(self) -> tuple[ToolSpec, ...]:
        raise NotImplementedError

    @property
    def env_id(self) -> str:
        """The registered id, or the class's name for an environment made by hand."""
        return self.spec.id if self.spec is not None else type(self).__name__

    @property
    def task(self) -> Task:
        """The task that is being played."""
        if self._task is None:
            raise gymnasium.error.ResetNeeded("there is no task before reset()")
        return self._task

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[Observation, dict[str, Any]]:
        """Begin an episode.

        Args:
            seed: Seeds `self.np_random`, and with it which task is drawn where `options` names none.
            options: `task`: a `Task`, or the id of one; `split`: where to take it from.

        Raises:
            ValueError: an option or a task that does not exist.
            EnvironmentFault: the environment could not set the task up.
        """
        return self._drive(self._reset(seed, options, self._own_offload()))

    def step(self, action: AssistantMessage) -> StepResult:
        """Answer one assistant message.

        `info` holds `reward_parts`, `tool_results` (one for each call, in order), `metrics` where there are any, and,
        at the end, `stop_reason`; in an episode of several agents also `role`, whose turn it is, and `role_rewards`.

        Raises:
            gymnasium.error.ResetNeeded: the episode is over, or has not begun.
            EnvironmentFault: something behind the environment failed.
        """
        return self._drive(self._step(action, self._own_offload()))

    async def reset_async(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[Observation, dict[str, Any]]:
        """As `reset`; what is not `async` runs in a thread, unless a `ToolEnv` says otherwise in `hooks_run`."""
        return await self._reset(seed, options, self._awaited_offload())

    async def step_async(self, action: AssistantMessage) -> StepResult:
        """As `step`; what is not `async` runs as in `reset_async`."""
        return await self._step(action, self._awaited_offload())

    def keep_thread(self, thread: PinnedThread) -> None:
        """Run what may block in the thread that the environment was made in."""
        self._hook_thread = thread

    @property
    def needs_thread(self) -> bool:
        """Whether anything of it may have to run in a thread of its own."""
        return True

    @property
    def is_reusable(self) -> bool:
        """Whether another episode may be played: not while anything that was given up may still touch this one."""
        return self._hook_thread is None or self._hook_thread.is_idle

    @property
    def still_running(self) -> tuple[str, ...]:
        """What was given up and has not returned, in a thread of the environment's own."""
        named = () if self._hook_thread is None else self._hook_thread.still_running
        return named if named or self.is_reusable else ("a call",)

    def close(self) -> None:
        """Free what the environment holds; one that overrides this calls it too."""
        if self._hook_thread is not None:
            self._hook_thread.shutdown()
        if self._hook_loop is not None and current_task() is None:
            self._hook_loop.close()
            self._hook_loop = None

    # What a kind of environment says.

    async def _reset(
        self, seed: int | None, options: dict[str, Any] | None, offload: Offload
    ) -> tuple[Observation, dict[str, Any]]:
        raise NotImplementedError

    async def _step(self, action: AssistantMessage, offload: Offload) -> StepResult:
        raise NotImplementedError

    def _awaited_offload(self) -> Offload:
        """Where what is not `async` runs in `reset_async` and `step_async`."""
        if self._hook_thread is None:
            self._hook_thread = PinnedThread("environment")
        return self._hook_thread

    def _own_offload(self) -> Offload:
        """Where it runs in `reset` and `step`: with deadlines, in one thread, or what one makes fails in another."""
        if self._hook_thread is None:
            if self.step_limits == NO_LIMITS:
                return inline
            self._hook_thread = PinnedThread("environment")
        return Blocking(self._hook_thread)

    def _waits(self) -> bool:
        """Whether an event loop is needed."""
        return False

    def _drive(self, steps: Coroutine[Any, Any, Value]) -> Value:
        """Run `steps` to its end. With nothing `async` in the environment it never waits, and needs no event loop.

        Otherwise one loop serves all steps: a connection that is opened in one cannot be used in another loop.
        """
        if self._waits():
            try:
                asyncio.get_running_loop()
            except RuntimeError:
                return self._own_loop().run(steps)
            steps.close()
            raise RuntimeError(
                f"{self.env_id} is asynchronous: await reset_async and step_async in an event loop"
            )
        try:
            steps.send(None)
        except StopIteration as end:
            return end.value
        steps.close()
        raise RuntimeError(f"{self.env_id} waits in a function that is not declared `async`: declare it so")

    def _own_loop(self) -> asyncio.Runner:
        if self._hook_loop is None:
            self._hook_loop = asyncio.Runner()
            weakref.finalize(self, _close_loop, self._hook_loop.get_loop())
        return self._hook_loop


def where_hooks_ran(close: Callable[[Any], None]) -> Callable[[Any], None]:
    """A `close` that runs in the environment's own thread: what was opened there may be closed nowhere else."""

    @functools.wraps(close)
    def run(env: PlayedEnv) -> None:
        thread = env._hook_thread
        if thread is not None and thread.is_shut_down:
            return  # closed already, with the thread that held what hooks opened
        if thread is None or thread.is_current:
            close(env)
            return
        try:
            thread.call(functools.partial(close, env), timeout_s=CLOSE_S, what="close")
        except GivenUp:
            raise RuntimeError(f"{env.env_id}: close did not end within {CLOSE_S:g} s") from None

    return run


def _close_loop(loop: asyncio.AbstractEventLoop) -> None:
    if not loop.is_closed() and not loop.is_running():
        loop.close()
