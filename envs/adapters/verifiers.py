"""A taskset of verifiers as an environment: its prompts, its tools, its rewards.

Needs `polyturn[verifiers]` (Prime Intellect, version 1 of its API).
"""

from __future__ import annotations

import asyncio
import functools
import importlib
import inspect
import json
from collections.abc import Mapping, Sequence
from typing import Any

from polyturn.envs.adapters.peer import require
from polyturn.envs.messages import AssistantMessage, ListTasks, Message, Task, TaskSource, known_split
from polyturn.envs.tool_env import ToolEnv
from polyturn.tools.tool import Tool
from polyturn.tools.types import ToolError, ToolSpec


@functools.lru_cache(maxsize=16)
def load_taskset(path: str, config: str) -> tuple[Any, tuple[Any, ...]]:
    """The taskset at `module:Class` with options as JSON, and its tasks. Shared, and to be left unchanged.

    Raises:
        ValueError: there is none, or it does not take these options, or never ends.
    """
    import verifiers.v1 as vf
    from verifiers.v1.utils.generic import concrete_type

    module, _, name = path.partition(":")
    try:
        kind: Any = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError, ValueError) as error:
        raise ValueError(f"taskset must be 'module:Class', and {path!r} is none: {error}") from error
    if not (inspect.isclass(kind) and issubclass(kind, vf.Taskset)):
        raise ValueError(f"{path!r} is no verifiers.v1.Taskset")
    config_kind = concrete_type(kind, vf.TasksetConfig) or vf.TasksetConfig
    make: Any = kind
    taskset = make(config_kind(**json.loads(config)))
    if not taskset.bounded:
        raise ValueError(f"{path!r} never ends; make a taskset of its first tasks, with `take`")
    return taskset, tuple(taskset)


@functools.lru_cache(maxsize=32)
def load_tasks(path: str, config: str, first: int, end: int) -> ListTasks:
    """The tasks at the positions from `first` to `end`, less the last, as tasks of ours."""
    _, tasks = load_taskset(path, config)
    return ListTasks([task_of(task) for task in tasks[first:end]])


def refuse_what_needs_a_runtime(kind: type, task: Any) -> None:
    """Raises ValueError where a task's hooks want the machine that verifiers would have started for a rollout."""
    import verifiers.v1 as vf

    needs = [hook for hook in ("setup", "finalize") if getattr(kind, hook) is not getattr(vf.Task, hook)]
    for hook in [*task.hooks("reward"), *task.hooks("metric")]:
        runtime = inspect.signature(hook).parameters.get("runtime")
        if runtime is not None and runtime.default is inspect.Parameter.empty:
            needs.append(hook.__name__)
    if getattr(kind, "NEEDS_CONTAINER", False):
        needs.append("NEEDS_CONTAINER")
    if task.hooks("stop"):
        needs.append("@stop")
    if needs:
        raise ValueError(
            f"{kind.__name__} cannot be played as a conversation: {', '.join(needs)} needs the runtime of a verifiers "
            "rollout. Play it with verifiers itself."
        )


def task_of(task: Any) -> Task:
    """A task of ours; ids are those of the data where it has some."""
    data = task.data
    messages: list[Message] = []
    if data.system_prompt:
        messages.append({"role": "system", "content": data.system_prompt})
    if isinstance(data.prompt, str):
        messages.append({"role": "user", "content": data.prompt})
    else:
        messages += [
            {"role": message.role, "content": _text(message.content)} for message in data.prompt or ()
        ]
    return Task(
        task_id=str(data.id or data.idx),
        messages=tuple(messages),
        label=getattr(data, "answer", None),
        metadata={"idx": data.idx},
    )


def _text(content: Any) -> str:
    from verifiers.v1.types import content_text

    return str(content_text(content) or "")


def new_trace(task: Any) -> Any:
    """An empty trace of an episode on `task`, as verifiers keeps it."""
    import verifiers.v1 as vf
    from verifiers.v1.state import state_cls

    return vf.Trace(
        task=vf.TraceTask(type=type(task).__name__, data=task.data, key=task.key, hash=task.hash),
        state=state_cls(type(task))(),
        agent=vf.AgentInfo(config=vf.AgentConfig()),
    )


def record(trace: Any, message: Mapping[str, Any]) -> None:
    """Add a message of the conversation to a trace."""
    import verifiers.v1 as vf
    from verifiers.v1.types import AssistantMessage, SystemMessage, ToolMessage, UserMessage

    kinds = {"assistant": AssistantMessage, "system": SystemMessage, "tool": ToolMessage, "user": UserMessage}
    fields = {name: value for name, value in message.items() if name != "tool_calls"}
    if calls := message.get("tool_calls"):
        fields["tool_calls"] = [
            {
                "id": call["id"],
                "name": call["function"]["name"],
                "arguments": json.dumps(call["function"]["arguments"]),
            }
            for call in calls
        ]
    trace.nodes.append(
        vf.MessageNode(
            parent=len(trace.nodes) - 1 if trace.nodes else None,
            message=kinds[message["role"]](**fields),
            sampled=message["role"] == "assistant",
        )
    )


DEMO = "polyturn.envs.adapters.verifiers_demo:Sums"


class VerifiersEnv(ToolEnv):
    """Plays the tasks of a taskset as conversations, and has verifiers score them.

    Tools of the task's toolsets run in this process; a `ValueError` of theirs is told to the model. Every weighted
    reward is a part of the reward, and metrics are metrics. Rewards, metrics and judges that raise, that take longer
    than `deadline_s` (where they await), or that verifiers leaves unscored, are an `EnvironmentFault`.

    Tasksets that need a rollout's runtime (containers, `setup`, rewards that take `runtime`) are refused.
    """

    def __init__(
        self,
        *,
        taskset: str = DEMO,
        config: Mapping[str, Any] | None = None,
        num_heldout: int = 100,
        answer: str = "\\boxed{{{}}}",
        max_turns: int | None = 16,
        deadline_s: float = 60.0,
        split: str = "train",
        render_mode: str | None = None,
    ) -> None:
        """
        Args:
            taskset: `module:Class` of a `verifiers.v1.Taskset`.
            config: Options of its `TasksetConfig`.
            num_heldout: So many tasks at the end are the split `heldout`; the rest is `train`.
            answer: How the oracle writes a task's `answer`, where tasks have one.
            max_turns: Actions.
            deadline_s: For scoring.
            split: `train` or `heldout`.
            render_mode: None or "ansi".

        Raises:
            MissingPackage: verifiers is not installed.
            ValueError: a taskset that does not exist or cannot be played as a conversation.
        """
        require("verifiers.v1", extra="verifiers")
        options = json.dumps(dict(config or {}), sort_keys=True)
        self._source = taskset, options
        self._taskset, self._peer_tasks = load_taskset(taskset, options)
        if not 0 <= num_heldout < len(self._peer_tasks):
            raise ValueError(
                f"num_heldout must be from 0 to {len(self._peer_tasks) - 1}, all tasks but one, not {num_heldout}"
            )
        kind, first = type(self._peer_tasks[0]), self._peer_tasks[0]
        refuse_what_needs_a_runtime(kind, first)
        toolsets = [*self._taskset.toolsets(self._taskset.config), *kind.toolsets(first.config)]
        self._num_heldout, self._answer, self._deadline_s = num_heldout, answer, deadline_s
        self._trace: Any = None
        self._check(split)
        super().__init__(
            tools=[tool for toolset in toolsets for tool in self._tools_of(toolset)],
            split=split,
            max_turns=max_turns,
            render_mode=render_mode,
        )
        self.oracle = self._tell_answer if getattr(first.data, "answer", None) is not None else None

    def tasks(self, split: str) -> TaskSource:
        """The taskset's tasks in its own order: the last `num_heldout` are `heldout`, those before are `train`."""
        self._check(split)
        end = len(self._peer_tasks)
        border = end - self._num_heldout
        first, end = (0, border) if split == "train" else (border, end)
        return load_tasks(*self._source, first, end)

    def begin(self, task: Task) -> Sequence[Message]:
        self._trace = new_trace(self._peer_tasks[task.metadata["idx"]])
        return task.messages

    async def grade(self, message: AssistantMessage) -> Mapping[str, float]:
        """verifiers' rewards by name, each times its weight."""
        del message
        trace = self._trace
        for said in self._transcript:
            record(trace, said)
        peer_task = self._peer_tasks[self.task.metadata["idx"]]
        async with asyncio.timeout(self._deadline_s):
            await peer_task.score(trace)
        if unscored := [name for name, reward in trace.rewards.items() if reward is None]:
            raise RuntimeError(f"verifiers did not score {', '.join(unscored)}")
        self.metrics.update({name: value for name, value in trace.metrics.items() if value is not None})
        return {name: reward.value for name, reward in trace.rewards.items()}

    def _tools_of(self, toolset: Any) -> list[Tool]:
        from mcp.server.mcpserver.tools import Tool as McpTool
        from verifiers.v1.utils.decorators import discover_decorated

        if getattr(toolset.config, "url", None):
            raise ValueError(
                f"{type(toolset).__name__} is a server elsewhere; take it as McpTools(HttpServer(...))"
            )
        tools = []
        prefix = f"{toolset.server_name}_" if toolset.server_name else ""
        for function in discover_decorated(toolset, "tool"):
            name = f"{prefix}{getattr(function, 'tool_name', None) or function.__name__}"
            schema = McpTool.from_function(function).parameters
            spec = ToolSpec(name=name, description=(function.__doc__ or "").strip(), parameters=schema)
            tools.append(Tool(spec=spec, function=self._called(function)))
        return tools

    def _called(self, function: Any) -> Any:
        """The tool's function, on this episode's state."""

        async def call(**arguments: Any) -> Any:
            from verifiers.v1.mcp.server import _call_state

            token = _call_state.set(self._trace.state)
            try:
                result = function(**arguments)
                return await result if asyncio.iscoroutine(result) else result
            except ValueError as error:
                raise ToolError(str(error)) from error
            finally:
                _call_state.reset(token)

        return call

    def _tell_answer(self, messages: Sequence[Message], tools: Sequence[ToolSpec]) -> AssistantMessage:
        del messages, tools
        return AssistantMessage(content=self._answer.format(self.task.label))

    def _check(self, split: str) -> None:
        splits = ("train", "heldout") if self._num_heldout else ("train",)
        known_split(split, splits)
