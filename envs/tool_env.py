"""The base class of tool environments: a `gymnasium.Env` whose actions are assistant messages.

An author writes tools, `grade`, and where the tasks come from:

    class Arithmetic(ToolEnv):
        @tool
        def add(self, a: int, b: int) -> int:
            "Add two numbers."
            return a + b

        def grade(self, message):
            return {"correct": exact_match(message.content, self.task.label)}

        def tasks(self, split):
            return ListTasks([Task.from_prompt("sum", "What is 17 + 25?", label="42")])

How it is stepped, with an event loop or without, is `envs.played_env`.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import inspect
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from typing import Any, Literal, TypeVar, get_args

import gymnasium

from polyturn.envs.border import ROLES, read_messages, read_numbers, read_text
from polyturn.envs.faults import EnvironmentFault, describe
from polyturn.envs.hooks import current_task, is_async_function, is_interruption
from polyturn.envs.messages import (
    AssistantMessage,
    EpisodeView,
    Grade,
    Message,
    Observation,
    Reward,
    Role,
    Score,
    Task,
    TaskSource,
    as_score,
    is_async,
    one_line,
)
from polyturn.envs.played_env import PlayedEnv, StepResult, where_hooks_ran
from polyturn.envs.spaces import ChatSpace, ReplySpace
from polyturn.tools.plain import as_number, shown
from polyturn.tools.threads import Escaped, GivenUp, Offload, PinnedThread, inline, on_loop
from polyturn.tools.tool import OutOfTime, StatefulTool, tools_of
from polyturn.tools.toolset import ToolLike, Toolset
from polyturn.tools.types import ToolCall, ToolResult, ToolSpec

State = TypeVar("State", bound=StatefulTool)
HooksRun = Literal["own_thread", "event_loop", "own_process"]
_RESET_OPTIONS = ("task", "split")


class ToolEnv(PlayedEnv):
    """A task, tools to work on it, and a grade for the answer.

    An observation is what is new since the last action; the history belongs to the agent. An action without tool calls
    is the answer and ends the episode, unless `follow_up` goes on. A call that cannot be made, and a `ToolError`, are
    observations. Any other exception from tools, `begin`, `follow_up` or `grade` is an `EnvironmentFault`: it ends the
    episode without a reward.

    `begin`, `follow_up`, `grade` and tools may be `async`; `step_async` awaits them, and runs those that are not where
    `hooks_run` says. Override these, not `step`; and `oracle`, `random_policy`, `answer_of`, `check_label` where what
    `PlayedEnv` says of them does not serve.
    """

    hooks_run: HooksRun = "own_thread"
    """Where `step_async` runs what is not `async`. In `own_thread`, one for the environment, from its making to its
    closing, code may block and keep what is bound to a thread. On the `event_loop`, which plays all other episodes too,
    code must return at once, well below a millisecond: for thousands of episodes, whose threads would cost more than
    what they run. A tool with a `timeout_s` has a thread there all the same. In `own_process` rollout keeps the whole
    environment in a process of its own (`envs.process_env`), so that code may hold the interpreter. A subclass does not
    inherit it."""

    metadata: dict[str, Any] = {"render_modes": ["ansi"], "render_fps": 1}  # noqa: RUF012  as Gymnasium types it

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        if "hooks_run" not in cls.__dict__:
            cls.hooks_run = "own_thread"  # what a subclass adds may block: it says for itself
        if "is_replayable" not in cls.__dict__:
            cls.is_replayable = False  # as above: what it adds may draw from anywhere
        if cls.hooks_run not in get_args(HooksRun):
            raise ValueError(
                f"{cls.__name__}.hooks_run must be one of {', '.join(get_args(HooksRun))}, not {shown(cls.hooks_run)}"
            )
        if "close" in cls.__dict__:
            setattr(cls, "close", where_hooks_ran(cls.close))  # noqa: B010  an assignment is no method to mypy

    def __init__(
        self,
        *,
        tools: Sequence[ToolLike] = (),
        tasks: TaskSource | None = None,
        split: str = "train",
        max_turns: int | None = None,
        render_mode: str | None = None,
    ) -> None:
        """
        Args:
            tools: Further tools beside the methods marked with `@tool`: functions, `Tool`s, `StatefulTool` classes.
            tasks: Takes the place of `tasks(split)`.
            split: Where `reset` takes a task from when it is given none.
            max_turns: Truncate the episode after so many actions; None leaves limits to the caller.
            render_mode: None or "ansi".
        """
        if max_turns is not None and max_turns < 1:
            raise ValueError(f"max_turns must be at least 1, not {max_turns}")
        if render_mode not in (None, *self.metadata["render_modes"]):
            raise ValueError(
                f"render_mode must be None or one of {self.metadata['render_modes']}, not {render_mode!r}"
            )
        self.toolset = Toolset([*tools_of(self), *tools])
        self.render_mode = render_mode
        self.observation_space = ChatSpace(tuple(get_args(Role)))
        self.action_space = ReplySpace(self.toolset.specs)
        self._given_tasks = tasks
        self._split = split
        self._max_turns = max_turns
        self._done = True
        self._num_turns = 0
        self._finished = False
        self._transcript: list[Message] = []
        self.metrics: dict[str, float] = {}
        """Counted and recorded, not rewarded: tools and hooks write to it, `reset` empties it, `info` has it."""
        self.role = ""
        """Whose turn it is in an episode of several agents, such as `solver/0`: `begin` and `follow_up` set it."""
        self.role_rewards: dict[str, float] = {}
        """Rewards of single roles: `grade` sets them beside what it returns."""
        self.turn_reward = 0.0
        """Paid for the step under way, beside the grade at the end: tools and `follow_up` may set it."""
        self.anchor = ""
        """Names the state that the next step is taken in, for GiGPO; empty: what was observed last is the state."""

    # What an author writes.

    def tasks(self, split: str) -> TaskSource:
        """The tasks of a split. Raises `ValueError` for a split that does not exist."""
        if self._given_tasks is not None:
            return self._given_tasks
        raise ValueError(
            f"{type(self).__name__} has no tasks of split {split!r}: define `tasks`, or pass it some"
        )

    def begin(self, task: Task) -> Sequence[Message] | Awaitable[Sequence[Message]]:
        """Set up `task` and return its first messages. `self.np_random` is seeded by now."""
        return task.messages

    def follow_up(self, message: AssistantMessage) -> Sequence[Message] | Awaitable[Sequence[Message]]:
        """What a user says to a message without tool calls; nothing ends the episode and has it graded."""
        del message
        return ()

    def grade(self, message: AssistantMessage) -> Grade | Awaitable[Grade]:
        """The parts of the final answer's reward by name; the reward is their sum."""
        raise NotImplementedError(f"{type(self).__name__} must define grade(message)")

    def finish(self) -> None:
        """End the episode with the step under way, as a tool does when a game is won or lost; it is graded then."""
        self._finished = True

    def state_of(self, kind: type[State]) -> State:
        """The episode's instance of a `StatefulTool` class among the tools. Raises `LookupError` if there is none."""
        return self.toolset.state_of(kind)

    # What a player calls.

    @property
    def tools(self) -> tuple[ToolSpec, ...]:
        return self.toolset.specs

    @property
    def needs_thread(self) -> bool:
        """Whether anything of it may have to run in a thread of its own, all that its author wrote considered."""
        if self.hooks_run == "event_loop":
            return False
        hooks = [hook for name in _HOOKS if (hook := getattr(self, name)) and not _is_default(hook, name)]
        rewards = () if self.graded_by is None else (self.graded_by,)
        return (
            not _is_default(self.close, "close")
            or self.toolset.needs_thread
            or not all(map(is_async, (*hooks, *rewards)))
        )

    @property
    def is_reusable(self) -> bool:
        return self.toolset.num_still_running == 0 and super().is_reusable

    def close(self) -> None:
        """Free what the environment holds; one that overrides this calls it too.

        Whoever calls it, it runs in the thread that hooks ran in, where there is one.
        """
        self._done = True
        try:
            self.toolset.close_state()
        finally:
            super().close()

    def render(self) -> str | None:  # type: ignore[override]
        """The transcript so far as text, where `render_mode` is "ansi"."""
        if self.render_mode is None:
            return None
        return "\n".join(one_line(message) for message in self._transcript)

    async def _reset(
        self, seed: int | None, options: dict[str, Any] | None, offload: Offload
    ) -> tuple[Observation, dict[str, Any]]:
        gymnasium.Env.reset(self, seed=seed)  # which seeds `np_random`
        self._done = True
        self.metrics, self.role, self.role_rewards, self.anchor = {}, "", {}, ""
        self._finished = False
        self._task = task = self._choose_task(options or {})
        if self.toolset.is_stateful:
            open_state = functools.partial(self.toolset.open_state, task, self.np_random)
            await self._guard("setting up the tools", open_state, offload=offload)
        self.toolset.max_result_chars = self.step_limits.max_result_chars
        observation = await self._messages("begin", task, offload)
        with self._entering("begin()"):
            if not observation:
                raise ValueError("a conversation needs a message to begin with")
        self._done, self._num_turns, self._transcript = False, 0, list(observation)
        info: dict[str, Any] = {"task_id": task.task_id, "tools": self.tools}
        marks = (("role", read_text(self.role)), ("anchor", read_text(self.anchor)))
        info |= {name: value for name, value in marks if value}
        return observation, info

    async def _step(self, action: AssistantMessage, offload: Offload) -> StepResult:
        if self._done:
            raise gymnasium.error.ResetNeeded("the episode is over: call reset() before step()")
        if action not in self.action_space:
            raise ValueError(f"an action is an AssistantMessage, not {type(action).__name__}")
        self._done, self.turn_reward = True, 0.0  # done until this step has gone well
        self._num_turns += 1
        self._transcript.append(action.to_message())
        results: list[ToolResult] = []
        if action.tool_calls:
            results = await self._answer_calls(action.tool_calls, offload)
            observation: Observation = tuple(
                {
                    "role": "tool",
                    "tool_call_id": result.call_id,
                    "name": result.name,
                    "content": result.content,
                }
                for result in results
            )
        else:
            observation = await self._messages("follow_up", action, offload)
        info: dict[str, Any] = {"reward_parts": {}, "tool_results": tuple(results)}
        reward = turn_reward = 0.0
        if type(self.turn_reward) is not float or self.turn_reward != 0.0:
            with self._entering("turn_reward"):
                reward = turn_reward = as_number(self.turn_reward)
        terminated = self._finished or (not action.tool_calls and not observation)
        if terminated:
            score = await self._score(action, offload)
            reward, info["reward_parts"] = reward + score.value, score.parts
            info["stop_reason"] = "terminated"
            info["given_answer"] = await self._guard("answer_of", self.answer_of, action, offload=inline)
        truncated = not terminated and self._num_turns == self._max_turns
        if truncated:
            info["stop_reason"] = "max_turns"
        if turn_reward:
            info["reward_parts"] = {**info["reward_parts"], "turns": turn_reward}
        metrics = {}
        if type(self.metrics) is not dict or self.metrics:
            with self._entering("metrics"):
                metrics = read_numbers(self.metrics)
        marks = {"metrics": metrics, "role": read_text(self.role), "anchor": read_text(self.anchor)}
        info |= {name: value for name, value in marks.items() if value}
        if self.role:
            with self._entering("role_rewards"):
                info["role_rewards"] = read_numbers(self.role_rewards)
        self._done = terminated or truncated
        self._transcript += observation
        return observation, reward, terminated, truncated, info

    async def _answer_calls(self, calls: Sequence[ToolCall], offload: Offload) -> list[ToolResult]:
        """The results of the calls of one action, in order. Raises `OutOfTime`."""
        limits, left_s = self.step_limits, self.step_limits.tools_timeout_s
        self.toolset.max_result_chars = limits.max_result_chars
        results: list[ToolResult] = []
        for call in calls:
            if limits.max_tool_calls is not None and len(results) >= limits.max_tool_calls:
                results.append(_not_made(call, limits.max_tool_calls))
                continue
            results.append(await self._call(call, offload, left_s))
            if left_s is not None:
                left_s = max(0.0, left_s - results[-1].seconds)
        return results

    async def _call(self, call: ToolCall, offload: Offload, left_s: float | None) -> ToolResult:
        answer: Callable[..., Any] = functools.partial(self.toolset.call, left_s=left_s)
        if offload is not inline or self.toolset.is_async(call.name):
            answer = functools.partial(
                self.toolset.call_async,
                offload=offload,
                left_s=left_s,
                queue_timeout_s=self.step_limits.queue_timeout_s,
            )
        return await self._guard(f"tool {call.name!r}", answer, call, offload=None)

    async def _guard(
        self, what: str, function: Callable[..., Any], *args: Any, offload: Offload | None
    ) -> Any:
        """The function's value, awaited if it is one to await; whatever it raises becomes a fault that says where.

        `offload` runs what is not `async`; None: the function sees to that itself, and to its deadline.
        """
        timeout_s = None if offload is None or offload is inline else self.step_limits.hook_timeout_s
        own_task, deadline = current_task(), None
        try:
            if offload is None or offload is inline or is_async_function(function):
                value = function(*args)
            else:
                value = await offload(functools.partial(function, *args), timeout_s=timeout_s, what=what)
            # As `inspect.isawaitable`, at a tenth of its price.
            if not hasattr(value, "__await__"):
                return value
            if timeout_s is None:
                return await value
            deadline = asyncio.timeout(timeout_s)
            async with deadline:
                value = await value
            if not deadline.expired():  # it may have held on to the cancellation
                return value
        except EnvironmentFault as fault:
            raise fault.of(what) from fault.__cause__
        except OutOfTime:
            raise
        except BaseException as error:
            given_up = isinstance(error, GivenUp) and timeout_s is not None
            late = given_up or (deadline is not None and deadline.expired())
            if is_interruption(error, own_task):
                raise
            if not late:
                raised = error.error if isinstance(error, Escaped) else error
                where = f"{self.env_id}: {what} failed on task {self.task.task_id!r}"
                raise EnvironmentFault(f"{where}: {describe(raised)}").of(what) from raised
        raise EnvironmentFault(
            f"{self.env_id}: {what} did not end within {timeout_s:g} s on task {self.task.task_id!r}"
        ).of(what)

    async def _messages(self, hook: str, argument: Any, offload: Offload) -> Observation:
        """What `begin` or `follow_up` returns, copied: whoever keeps an observation must not share it with the task."""
        function = getattr(self, hook)
        # The defaults of this class are worth no thread.
        where = None if _is_default(function, hook) else offload
        messages = await self._guard(hook, function, argument, offload=where)
        with self._entering(f"{hook}()"):
            # Only a prompt may hold what an assistant said.
            roles = ROLES if hook == "begin" else ROLES - {"assistant"}
            space = self.observation_space
            return read_messages(
                messages, roles=roles & space.roles if isinstance(space, ChatSpace) else roles
            )

    @contextlib.contextmanager
    def _entering(self, what: str) -> Iterator[None]:
        """Around the reading of a value of the author's code: what it cannot be read as is a fault."""
        try:
            yield
        except ValueError as error:
            task = shown(self.task.task_id)
            raise EnvironmentFault(f"{self.env_id}: {what} failed on task {task}: {error}") from error

    async def _score(self, message: AssistantMessage, offload: Offload) -> Score:
        """The grade of the final answer: by what grades in its place where there is such, else by `grade`."""
        reward = self._reward()
        if reward is None:
            return await self._graded("grade", self.grade, message, None, offload)
        own: Mapping[str, float] = {}
        if getattr(reward, "uses_environment_grade", False):
            own = (await self._graded("grade", self.grade, message, None, offload)).parts
        transcript, metrics = tuple(self._transcript), dict(self.metrics)
        episode = EpisodeView(
            task=self.task, message=message, messages=transcript, metrics=metrics, reward_parts=own
        )
        return await self._graded("reward", reward, episode, getattr(reward, "name", "reward"), offload)

    async def _graded(
        self, what: str, function: Callable[..., Any], argument: Any, name: str | None, offload: Offload
    ) -> Score:
        value = await self._guard(what, function, argument, offload=offload)
        with self._entering(what):
            return as_score(value, name=name)

    def _reward(self) -> Reward | None:
        """What grades in place of `grade`."""
        return self.graded_by if self._task is None or self._task.reward is None else self._task.reward

    def _choose_task(self, options: Mapping[str, Any]) -> Task:
        for name in options:
            if name not in _RESET_OPTIONS:
                raise ValueError(
                    f"unknown option {name!r} of reset; the options are {', '.join(_RESET_OPTIONS)}"
                )
        wanted = options.get("task")
        if isinstance(wanted, Task):
            return wanted
        split = options.get("split", self._split)
        source = self._given_tasks if self._given_tasks is not None else self.tasks(split)
        if wanted is None:
            if len(source) == 0:
                raise ValueError(f"{self.env_id}: the task source is empty")
            return source[int(self.np_random.integers(len(source)))]
        find = getattr(source, "find", None)
        if find is None:
            raise ValueError(f"{type(source).__name__} cannot find tasks by id; pass a Task")
        return find(wanted)

    def _awaited_offload(self) -> Offload:
        return on_loop if self.hooks_run == "event_loop" else super()._awaited_offload()

    def _own_offload(self) -> Offload:
        if self._hook_thread is None and self.toolset.has_deadlines:
            self._hook_thread = PinnedThread("environment")
        return super()._own_offload()

    def _waits(self) -> bool:
        """Whether an event loop is needed. Asked at every step, so the common case, plain methods, is quick."""
        reward = self._reward()
        if self.toolset.has_async or (reward is not None and is_async(reward)):
            return True
        begin, follow_up, grade = self.begin, self.follow_up, self.grade
        try:
            flags = (
                begin.__code__.co_flags | follow_up.__code__.co_flags | grade.__code__.co_flags  # type: ignore[attr-defined]
            )
        except AttributeError:  # a callable object in place of a method
            return any(is_async_function(hook) for hook in (begin, follow_up, grade))
        return bool(flags & inspect.CO_COROUTINE)


_HOOKS = ("begin", "follow_up", "grade")


def _is_default(method: Callable[..., Any], name: str) -> bool:
    """Whether a method is that of this class."""
    return getattr(method, "__func__", None) is getattr(ToolEnv, name)


def _not_made(call: ToolCall, max_calls: int) -> ToolResult:
    reason = f"no more than {max_calls} can be made in this turn"
    if not max_calls:
        reason = "the tool calls of this episode are used up"
    text = f"This call was not made: {reason}."
    return ToolResult(call_id=call.id, name=call.name, content=text, ok=False)
